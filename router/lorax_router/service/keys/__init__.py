"""API keys: whom a key stands for, read from flags and a file, and what each tenant has taken."""
