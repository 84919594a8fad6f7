"""The router's metrics and how they are written out."""
