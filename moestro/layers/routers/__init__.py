"""Routers: one published method a file; each builds a `StagedRouter` at a `Site`."""
