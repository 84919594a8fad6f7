"""One module for each way to store codes."""
