"""MODEL: a twin without memory, in a patcher without bytes, whose innermost call crosses the bridge."""
