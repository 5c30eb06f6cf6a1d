"""PipeFusion from a plan: which blocks a stage has, its forward on a patch, what travels to the next."""
