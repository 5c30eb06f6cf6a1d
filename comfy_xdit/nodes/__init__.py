"""The nodes: widgets to a spec or a request, to the ranks, to the types the graph carries."""
