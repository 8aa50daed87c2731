"""Training: the step, the engines that run it, schedules, checkpoints and the run directory."""
