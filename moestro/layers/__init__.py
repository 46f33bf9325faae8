"""Trainable MoE layers: routers, losses, taps, experts, blocks and a small decoder, each method one file."""
