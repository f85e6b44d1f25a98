"""Tasks that score a model by what it answers, and the sandbox for answers that are programs."""
