"""Upcycling: a dense model's feed-forward becomes experts."""
