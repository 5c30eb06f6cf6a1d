"""A loaded transformer, and one call of it."""
