"""Whole decoders: one file each; a factory from a `MoEConfig` to a module."""
