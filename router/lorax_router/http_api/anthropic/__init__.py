"""Anthropic's dialect: its routes, its bodies, its errors."""
