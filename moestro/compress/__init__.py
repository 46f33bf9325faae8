"""Smaller and cheaper models: what to keep, merge, slim and encode, decided over statistics, written as a plan, carried out by one executor."""
