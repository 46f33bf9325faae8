"""Profiles and traces made by hand, for measures whose answer is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moestro.core.experts import ExpertSpec
from moestro.core.trace import Trace
from moestro.profile.profile import Profile


def layer(experts: int, top_k: int = 1, *, shared: int = 0, d_model: int = 32, d_expert: int = 16) -> dict[str, Any]:
    spec = dataclasses.asdict(ExpertSpec(d_model, d_expert))
    return {"index": 0, "num_experts": experts, "top_k": top_k, "shared": shared, "spec": spec, "score": "softmax"}


def profile(arrays: dict[str, np.ndarray] | None = None, **fields: Any) -> Profile:
    """A profile of one layer of 4 experts, one label and 100 tokens, unless told otherwise."""
    given: dict[str, Any] = {
        "arrays": arrays or {},
        "model": "m",
        "family": "made",
        "layers": (layer(4),),
        "labels": ("all",),
        "tokens_G": (100,),
        "characters_G": (100,),
        "data": "d",
        "sources": (),
        "probes": {},
    }
    return Profile(**(given | fields))


def trace(experts_LTK: np.ndarray, experts: int, *, lengths: list[int] | None = None, **fields: Any) -> Trace:
    """Sequences of these lengths, one by default."""
    layers, tokens, _ = experts_LTK.shape
    lengths = lengths or [tokens]
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    given: dict[str, Any] = {
        "tokens_T": np.zeros(tokens, np.int32),
        "sequences_T": sequence,
        "positions_T": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "steps_T": sequence,
        "prefill_T": np.ones(tokens, np.uint8),
        "experts_LTK": experts_LTK.astype(np.int16),
        "weights_LTK": None,
        "num_experts": (experts,) * layers,
        "model": "m",
        "info": {"data": "d"},
    }
    return Trace(**(given | fields))


def traced(experts_LTK: np.ndarray, experts: int, **options: Any) -> Profile:
    made = trace(experts_LTK, experts, **options)
    return profile(trace=made, layers=tuple(layer(experts, experts_LTK.shape[2]) for _ in experts_LTK))
