"""Programs that run with other people's clients, each in an environment of its own.

Each is called with the server's URL, the name of an adapter alone:
it imports its client and the standard library alone, prints what it checked, and raises at
the first thing that is not as the client has it.
"""
