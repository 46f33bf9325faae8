"""Kinds of experts: one file each; a factory that builds an `ExpertBank` at a `Site`."""
