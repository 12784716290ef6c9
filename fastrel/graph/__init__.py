"""A model's forward pass as a graph, where it is valid and what it is of. Knows nothing of relevance."""
