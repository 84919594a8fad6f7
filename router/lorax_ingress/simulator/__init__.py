"""Many replicas over one virtual clock: routing policies in front of the server's own scheduler."""
