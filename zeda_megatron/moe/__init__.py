"""Zero experts: routing, group loss, dispatch, experts, layer spec, statistics."""
