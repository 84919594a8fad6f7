"""Where adapters come from: the hub, local folders, S3."""
