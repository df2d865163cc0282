"""Every setting as a dataclass, and flags and YAML files made of them. Nothing here needs torch."""
