"""How expert slots are divided among layers: one file each."""
