"""OpenAI's Responses, stateless: nothing of an answer is kept."""
