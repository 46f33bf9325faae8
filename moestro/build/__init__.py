"""Make an MoE from dense models."""
