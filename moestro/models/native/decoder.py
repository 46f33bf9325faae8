"""A decoder in numbers and tensor names: what the native trunk computes, whatever the family is called.

Every layer is x += s attention(norm(x)); x += s mlp(norm(x)), where the mlp is dense, or routed experts with or without an MLP
that every token passes. Names are those on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Linear:
    """The tensors of one linear map."""

    weight: str
    bias: str = ""


@dataclass(frozen=True, slots=True)
class Rope:
    """frequency_R: float32, radians per position of each rotated pair. scale: of cosines and sines. interleaved: pairs lie side by side."""

    frequency_R: np.ndarray
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention; rotation turns the first dimensions of each head.

    scale: of the scores. q_norm, k_norm: RMS norms before the rotation, of each head when `norm_heads`, else of all heads together.
    window: keys that a query sees, itself included (0: all). sinks: one more logit per head. clip: of queries, keys and values (0: none).
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    width: int
    scale: float
    q_norm: str = ""
    k_norm: str = ""
    norm_heads: bool = True
    window: int = 0
    sinks: str = ""
    clip: float = 0.0


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are made from `rank` numbers per token.

    q: from the layer's input, or with q_a from its low-rank normalised image. kv_a makes the latent and one rotated key of
    `rope` dimensions for all heads; kv_b makes each head's `nope` key dimensions and `value` value dimensions.
    """

    q: Linear
    q_a: Linear | None
    q_norm: str
    kv_a: Linear
    kv_norm: str
    kv_b: Linear
    o: Linear
    heads: int
    nope: int
    rope: int
    value: int
    rank: int
    scale: float
    eps: float


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate(x)) * up(x)). Without `up`, `gate` holds the gate's rows and then up's."""

    gate: Linear
    up: Linear | None
    down: Linear


@dataclass(frozen=True, slots=True)
class Router:
    """logits = linear(x); choice: a bias on the choice alone. The arithmetic after that is in the layer's RouterFacts."""

    linear: Linear
    choice: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """router: None in a dense layer, whose MLP is `mlp`; beside a router `mlp` is what every token passes, times sigmoid(mlp_gate(x))."""

    input_norm: str
    attention: Attention | Latent
    post_norm: str
    router: Router | None
    mlp: Mlp | None
    mlp_gate: Linear | None = None


@dataclass(frozen=True, slots=True)
class Decoder:
    """embedding, head: the same name where one tensor is both. tied: the two are one weight if their values are equal.

    embedding_scale multiplies the embeddings, residual_scale what each block adds, logits_divisor divides the logits.
    """

    embedding: str
    norm: str
    head: str
    tied: bool
    layers: tuple[Layer, ...]
    rope: Rope
    eps: float
    activation: str
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0

    def names(self) -> list[str]:
        """Every tensor that is used, each once."""
        return list(dict.fromkeys([self.embedding, self.norm, self.head, *_names(self.layers)]))


def _names(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield from [part] if part else []
    elif isinstance(part, tuple):
        for one in part:
            yield from _names(one)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _names(getattr(part, field.name))
