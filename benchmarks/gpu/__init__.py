"""One rank on a GPU against plain diffusers, at published models' real shapes: `make bench-gpu`."""
