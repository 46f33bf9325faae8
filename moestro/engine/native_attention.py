"""The native trunk's attention blocks: grouped-query and latent. Rows of all sequences are projected together, then each attends alone.

Shapes: N rows of a pass (the sequences' tokens one after another), D model width, H heads, K key heads, d head width, R rotated dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from moestro.engine.attention_cache import Room, SequenceCache
from moestro.kernels.attention import attend
from moestro.kernels.convert import transpose
from moestro.kernels.ffn import Matrix
from moestro.kernels.linear import linear, linears
from moestro.kernels.norm import rms_norm
from moestro.kernels.reader import aligned
from moestro.kernels.rope import rotate
from moestro.models.native.decoder import Attention, Latent
from moestro.models.native.weights import Weights, wrap

SMALL = 1 << 21  # multiplications below which a second thread costs more than it gains


@dataclass(slots=True)
class Scratch:
    """float32 buffers by name, kept from pass to pass and never larger than the largest pass needed."""

    rooms: dict[str, np.ndarray] = field(default_factory=dict)
    views: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> np.ndarray:
        """An array of this shape with anything in it; the next `take` of the name may be the same memory."""
        view = self.views.get(name)
        if view is None or view.shape != shape:
            size, room = math.prod(shape), self.rooms.get(name)
            if room is None or room.size < size:
                room = self.rooms[name] = np.empty(size, np.float32)
            view = self.views[name] = room[:size].reshape(shape)
        return view


@dataclass(frozen=True, slots=True)
class Step:
    """One pass. sequences: each cache with its rows. lengths_N: keys that each row sees. cos_NR, sin_NR: see kernels.rope."""

    sequences: tuple[tuple[SequenceCache, slice], ...]
    lengths_N: np.ndarray
    cos_NR: np.ndarray
    sin_NR: np.ndarray
    scratch: Scratch
    threads: int


class GroupedAttention:
    """Queries, keys and values of equal width, with norms, rotation, a window and sinks as the description says."""

    def __init__(self, at: Attention, weights: Weights, eps: float, interleaved: bool) -> None:
        self.at, self.eps, self.interleaved = at, eps, interleaved
        pairs = [weights.linear(one) for one in (at.q, at.k, at.v)]
        self.matrices, self.biases = [m for m, _ in pairs], [b for _, b in pairs]
        self.o, self.o_bias = weights.linear(at.o)
        self.q_norm, self.k_norm, self.sinks = (weights.vector(n) for n in (at.q_norm, at.k_norm, at.sinks))

    @property
    def room(self) -> Room:
        return Room(self.at.kv_heads, self.at.width, self.at.width, window=self.at.window)

    def __call__(self, x_ND: np.ndarray, step: Step, layer: int, out_ND: np.ndarray) -> None:
        at, rows, take = self.at, len(x_ND), step.scratch.take
        outs = [take(name, rows, m.rows) for name, m in zip("qkv", self.matrices)]
        linears(x_ND, self.matrices, outs=outs, biases=self.biases, threads=step.threads)
        q, k, v = (out.reshape(rows, -1, at.width) for out in outs)
        for whole, heads, norm in ((outs[0], q, self.q_norm), (outs[1], k, self.k_norm)):
            if norm is not None:
                target = heads if at.norm_heads else whole
                rms_norm(target, norm, self.eps, out_TD=target)
        if at.clip:
            for out in outs:
                np.clip(out, -at.clip, at.clip, out=out)
        for heads in (q, k):
            rotate(heads, step.cos_NR, step.sin_NR, interleaved=self.interleaved)
        seen = take("seen", rows, at.heads, at.width)
        for cache, part in step.sequences:
            held = cache.put(layer, k[part], v[part])
            attend(
                q[part],
                held.keys_SKd,
                held.values_SKv,
                lengths_T=step.lengths_N[part] - held.first if held.first else step.lengths_N[part],
                scale=at.scale,
                window=at.window,
                sinks_H=self.sinks,
                threads=step.threads,
                out_THv=seen[part],
            )
        linear(seen.reshape(rows, -1), self.o, out_TR=out_ND, bias_R=self.o_bias, threads=step.threads)


class LatentAttention:
    """Latent attention that never expands the cache: each head's key map is applied to its query, its value map to what it saw.

    So the cache holds `rank` + `rope` numbers per token, and all heads share one key. The sums are those of the expanded form
    in another order.
    """

    def __init__(self, at: Latent, weights: Weights, eps: float, interleaved: bool) -> None:
        self.at, self.interleaved = at, interleaved
        first = at.q if at.q_a is None else at.q_a
        (self.first, self.first_bias), (self.kv_a, self.kv_a_bias) = weights.linear(first), weights.linear(at.kv_a)
        self.q_b = None if at.q_a is None else weights.matrix(at.q.weight)
        self.q_norm, self.kv_norm = weights.vector(at.q_norm), weights.required(at.kv_norm)
        self.o, self.o_bias = weights.linear(at.o)
        kv_b = weights.array(at.kv_b.weight).reshape(at.heads, at.nope + at.value, at.rank)
        keys = _room((at.heads, at.rank, at.nope), kv_b.dtype)
        values = _room((at.heads, at.value, at.rank), kv_b.dtype)
        for head in range(at.heads):
            transpose(kv_b[head, : at.nope], keys[head])
            values[head] = kv_b[head, at.nope :]
        self.to_latent: list[Matrix] = [wrap(keys[head]) for head in range(at.heads)]
        self.from_latent: list[Matrix] = [wrap(values[head]) for head in range(at.heads)]

    @property
    def room(self) -> Room:
        return Room(1, self.at.rank + self.at.rope, 0, self.at.rank)

    def __call__(self, x_ND: np.ndarray, step: Step, layer: int, out_ND: np.ndarray) -> None:
        at, rows, take = self.at, len(x_ND), step.scratch.take
        width, kept = at.nope + at.rope, at.rank + at.rope
        flat, latent = take("first", rows, self.first.rows), take("latent", rows, kept)
        linears(
            x_ND, [self.first, self.kv_a], outs=[flat, latent], biases=[self.first_bias, self.kv_a_bias], threads=step.threads
        )
        if self.q_b is not None:
            assert self.q_norm is not None
            rms_norm(flat, self.q_norm, at.eps, out_TD=flat)
            flat = linear(flat, self.q_b, out_TR=take("q", rows, self.q_b.rows), threads=step.threads)
        q = flat.reshape(rows, at.heads, width)
        rms_norm(latent[:, : at.rank], self.kv_norm, at.eps, out_TD=latent[:, : at.rank])
        key = latent.reshape(rows, 1, kept)
        rotate(q, step.cos_NR, step.sin_NR, interleaved=self.interleaved, start=at.nope)
        rotate(key, step.cos_NR, step.sin_NR, interleaved=self.interleaved, start=at.rank)
        asked, seen = take("asked", rows, at.heads, kept), take("seen", rows, at.heads, at.rank)
        threads = 1 if rows * at.nope * at.rank < SMALL else step.threads
        for head, matrix in enumerate(self.to_latent):
            linear(q[:, head, : at.nope], matrix, out_TR=asked[:, head, : at.rank], threads=threads)
        asked[:, :, at.rank :] = q[:, :, at.nope :]
        for cache, part in step.sequences:
            held = cache.put(layer, key[part])
            attend(
                asked[part],
                held.keys_SKd,
                held.values_SKv,
                lengths_T=step.lengths_N[part],
                scale=at.scale,
                threads=step.threads,
                out_THv=seen[part],
            )
        given = take("given", rows, at.heads, at.value)
        for head, matrix in enumerate(self.from_latent):
            linear(seen[:, head], matrix, out_TR=given[:, head], threads=threads)
        linear(given.reshape(rows, -1), self.o, out_TR=out_ND, bias_R=self.o_bias, threads=step.threads)


def _room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return aligned(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
