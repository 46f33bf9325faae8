"""Rescaling what goes into a layer so that weights and activations bear few bits better: one file per rule. The model computes the same."""
