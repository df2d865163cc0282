"""Process-group start-up and the CPU runtime."""
