"""Hugging Face models and checkpoints seen as MoE layers."""
