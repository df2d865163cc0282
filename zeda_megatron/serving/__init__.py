"""Files that travel with exported checkpoints."""
