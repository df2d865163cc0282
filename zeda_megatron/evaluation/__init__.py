"""Benchmarks and their comparison, the distance to the teacher."""
