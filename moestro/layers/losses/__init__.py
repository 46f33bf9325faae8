"""Auxiliary losses: one a file; each is a module from a `Decision` to a scalar that is already weighted."""
