"""Facts of each block family: names, shapes and router arithmetic."""
