"""How expert weights are encoded in bytes."""
