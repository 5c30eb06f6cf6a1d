"""VAEs over all ranks."""
