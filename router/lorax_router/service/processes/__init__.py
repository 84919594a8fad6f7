"""Limited processes: what comes with an adapter and must be run, runs there, not in the router."""
