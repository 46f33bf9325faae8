"""Edits of a routing that can be put on any router: one a file."""
