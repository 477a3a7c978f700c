"""Several decode steps of one sequence in one launch."""
