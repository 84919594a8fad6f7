"""Many machines: replicas, manifests, ranks."""
