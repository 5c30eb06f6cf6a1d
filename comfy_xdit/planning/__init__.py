"""Which layout: a description of machine and model to a plan. Nothing here knows a family."""
