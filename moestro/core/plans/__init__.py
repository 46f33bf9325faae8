"""The plans: one file per thing that can be decided."""
