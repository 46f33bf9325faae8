"""moestro: a workbench and runtime for Mixture-of-Experts models and systems of experts."""

__version__ = "0.1.0"
