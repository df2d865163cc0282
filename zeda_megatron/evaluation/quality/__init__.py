"""How near a model is to its teacher: measured on held-out rows and on answers of its own."""
