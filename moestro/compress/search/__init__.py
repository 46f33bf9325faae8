"""Searches for the set of experts that changes a layer least: one file per search, from samples of its inputs to the experts kept."""
