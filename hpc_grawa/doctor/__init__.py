"""Whether ranks can train here, and what is missing."""
