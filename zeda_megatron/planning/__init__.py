"""What a run will cost: geometry, FLOPs, memory, steps. Runs no model and loads no weight."""
