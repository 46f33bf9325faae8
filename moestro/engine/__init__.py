"""Inference when experts do not fit: store, cache, policies, trunk, generation."""
