"""The gRPC front end: the standard health service and reflection."""
