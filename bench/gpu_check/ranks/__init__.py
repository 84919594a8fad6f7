"""The part of the check for a machine with several GPUs: ``--ranks N``.

Over nccl, a GPU a rank; in its small form over gloo, on CPUs. Every stage compares N ranks with one.
"""
