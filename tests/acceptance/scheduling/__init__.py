"""The list of scheduling: what policies promise, over a virtual clock and on the server."""
