"""What a model's text means in a chat: reasoning, content and tool calls, as they form."""
