"""The training loop: optimizer, schedule, logging, signals, resume."""
