"""One step of a shard on this machine, part by part, beside what the machine could do.

Needs what a shard needs; the rest of the benchmark does not.
"""
