"""Routes that make something of what the last layer gives for texts: labels, ranks, scores."""
