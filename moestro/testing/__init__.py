"""Tiny random models, planted models and text corpora for tests, docs and benchmarks."""
