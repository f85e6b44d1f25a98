"""What a call of a model takes: a decode step of our own, stacks of sublayers, ranks, and how they are timed."""
