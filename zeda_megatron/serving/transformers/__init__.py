"""The dynamic models for transformers: these files travel with exports and import one another alone."""
