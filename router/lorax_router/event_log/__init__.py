"""A log of all that enters the scheduler's core, from which its plans can be made again."""
