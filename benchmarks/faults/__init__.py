"""Faults injected for real into running ranks, and a soak: `make faults`, `make soak`."""
