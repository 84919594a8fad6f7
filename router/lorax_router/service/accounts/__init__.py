"""The account of each request: its one line in the log, its spans, its part of the metrics."""
