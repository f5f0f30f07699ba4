"""Programs: what a forward pass does, in which order, on which lane. No torch."""
