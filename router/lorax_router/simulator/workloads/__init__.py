"""Workloads of papers and benchmarks of the field, as columns of requests."""
