"""The pure core: decides as data, performs nothing, reads no clock."""
