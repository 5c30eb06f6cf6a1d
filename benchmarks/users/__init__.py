"""Many users: G GPUs, cut into groups, serve several models: `make simulate-users`, docs/scale.md."""
