"""Server groups on the machines of a Ray cluster: placed, watched, scaled, upgraded."""
