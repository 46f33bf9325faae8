"""Matrices with fewer numbers in them: zeros, or factors of low rank; one file per rule."""
