"""Spans on their way to a collector, by OpenTelemetry's SDK; imported where they are asked for."""
