"""Training a student back to its parent: text, ranks, teacher, the loop, its guards."""
