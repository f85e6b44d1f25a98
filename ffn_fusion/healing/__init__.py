"""Training students: distillation with its guards, the teacher's data, alignment; text, ranks, the loop."""
