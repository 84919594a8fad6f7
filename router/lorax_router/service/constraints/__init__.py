"""What outputs are bound to: read from requests, checked in limited processes, made ready."""
