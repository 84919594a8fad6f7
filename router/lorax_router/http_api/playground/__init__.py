"""A page to try the server with: its files, their headers, and the document that it polls."""
