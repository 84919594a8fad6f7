"""Programs for the interpreters of peers: each stands alone and imports nothing of this project."""
