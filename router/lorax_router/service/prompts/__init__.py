"""Prompts: chat templates and tokenizers."""
