"""A run's folder: what is in it, who holds it, what it came to."""
