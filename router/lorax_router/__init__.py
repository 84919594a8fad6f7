"""The router process: queue, budgets, scheduling, and the HTTP and gRPC front ends."""
