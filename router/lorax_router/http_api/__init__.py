"""The HTTP front end: unpack, call the inference service, map the error."""
