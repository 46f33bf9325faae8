"""The learning rate as a function of the step: linear warm-up, then cosine, warm-up-stable-decay (arXiv 2404.06395) or constant."""

from __future__ import annotations

import math

from moestro.train.config import RateConfig


def factor(config: RateConfig, step: int, steps: int) -> float:
    """What the highest rate is multiplied with in step `step` (from 0) of `steps`. The first step has a rate above 0, the last is at the end."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.shape == "constant":
        return 1.0
    falling = steps - warmup if config.shape == "cosine" else max(1, round(config.decay * steps))
    done = min(1.0, max(0.0, (step + 1 - (steps - falling)) / falling))
    if config.shape == "cosine":
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
    return 1 - (1 - config.final) * done
