"""One command for a machine with a GPU: does it run, is it right, and how near to the floor.

``python -m bench.gpu_check`` runs every stage in a process and a time budget of its own and
writes JSON and a Markdown table; ``--small`` runs the same code on a CPU with tiny shapes.
"""
