"""Where requests go, decided as data: no clock, randomness, threads, log, socket or file."""
