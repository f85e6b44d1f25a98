"""The student's own model code: copied unchanged into every student folder, so it imports nothing of ours."""
