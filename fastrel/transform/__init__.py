"""From a captured forward pass to two graphs: one that predicts and saves, one that explains."""
