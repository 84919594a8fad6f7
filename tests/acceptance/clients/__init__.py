"""Programs that run with other people's clients, each in an environment of its own.

Each is called with the server's URL, the name of its model and of an adapter. It imports its
client, ``checks`` beside it and the standard library alone, prints what it checked, and ends at
the first thing that is not as the client has it.
"""
