"""What happens around training: weights' average, checkpoints, sample grids, scores, the report, the run's record."""
