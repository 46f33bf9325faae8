"""One row through one decoder layer in two native calls instead of twenty: what lies before the choice of experts, and what after.

A `Stack` runs many layers in one call, as far as the experts that they choose lie on a `Shelf`.

The calls are made of the other kernels, in the order and with the bits of calling them one by one, which is their reference; so there
is no numpy form. A `LayerStep` holds a layer's weights by address. Shapes: D model width, K slots, H heads, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moestro.kernels import native
from moestro.kernels.ffn import ACTIVATIONS, ExpertView, Matrix
from moestro.kernels.packed import Packed

SCORES = ("logits", "softmax", "sigmoid")

Map = tuple[Matrix | Packed, np.ndarray | None]  # a linear map and its bias


@dataclass(frozen=True, slots=True, eq=False)
class AttentionStep:
    """q, k, v, o and what happens between them. Arrays float32 or None. clip 0: none; window 0: all."""

    maps: tuple[Map, Map, Map, Map]
    heads: int
    kv_heads: int
    width: int
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    norm_heads: bool
    clip: float
    interleaved: bool
    scale: float
    window: int
    sinks: np.ndarray | None


@dataclass(frozen=True, slots=True, eq=False)
class RouterStep:
    """A router whose groups are all kept, and the arithmetic of its experts. score: 'softmax' or 'sigmoid' of all logits, or 'logits': softmax over the chosen."""

    map: Map
    chosen: int
    score: str
    bias: np.ndarray | None
    renormalised: bool
    scale: float
    activation: str
    limit: float
    alpha: float


@dataclass(frozen=True, slots=True, eq=False)
class DenseStep:
    """What every row passes, times the sigmoid of its gate if it has one."""

    mlp: ExpertView
    gate: Map | None
    activation: str


class LayerStep:
    """A decoder layer's plan. Needs native code.

    post_norm, next_norm: weights [D] of the norms after attention and after the layer. residual multiplies what each half adds.

    Raises:
        ValueError: weights that do not fit one another, or an unknown score or activation.
    """

    def __init__(
        self,
        post_norm: np.ndarray,
        next_norm: np.ndarray,
        eps: float,
        residual: float,
        attention: AttentionStep,
        router: RouterStep | None,
        dense: DenseStep | None,
    ) -> None:
        module = native.extension()
        assert module is not None, "a step needs native code"
        width, at = len(post_norm), attention
        asked, kept = at.heads * at.width, at.kv_heads * at.width
        _fits(
            [
                (matrix.shape, shape)
                for (matrix, _), shape in zip(at.maps, ((asked, width), (kept, width), (kept, width), (width, asked)))
            ]
        )
        _fits([(bias.shape, (matrix.rows,)) for matrix, bias in at.maps if bias is not None])
        of_q, of_k = (at.width, at.width) if at.norm_heads else (asked, kept)
        vectors = ((at.q_norm, of_q), (at.k_norm, of_k), (at.sinks, at.heads), (next_norm, width))
        _fits([(vector.shape, (size,)) for vector, size in vectors if vector is not None])
        parts: list[Any] = [
            (
                [_map(module, one) for one in at.maps],
                (at.heads, at.kv_heads, at.width),
                (_at(at.q_norm), _at(at.k_norm), at.norm_heads),
                at.clip,
                at.interleaved,
                at.scale,
                at.window,
                _at(at.sinks),
            ),
            None,
            None,
        ]
        if router is not None:
            matrix, bias = router.map
            _fits([(matrix.cols, width)])
            _fits([(one.shape, (matrix.rows,)) for one in (bias, router.bias) if one is not None])
            if router.score not in SCORES or not 0 < router.chosen <= matrix.rows:
                raise ValueError(f"cannot choose {router.chosen} of {matrix.rows} experts by {router.score!r}")
            parts[1] = (
                _map(module, router.map),
                matrix.rows,
                router.chosen,
                SCORES.index(router.score),
                _at(router.bias),
                router.renormalised,
                router.scale,
                ACTIVATIONS.index(router.activation),
                router.limit,
                router.alpha,
            )
        if dense is not None:
            _fits([(dense.mlp.up.cols, width)])
            gate = None if dense.gate is None else _map(module, dense.gate)
            if dense.gate is not None:
                _fits([(dense.gate[0].shape, (1, width))])
            parts[2] = (dense.mlp.handle, gate, ACTIVATIONS.index(dense.activation))
        self._module, self.plan = module, module.LayerPlan(width, eps, residual, _at(post_norm), _at(next_norm), *parts)
        self._held = (post_norm, next_norm, attention, router, dense)

    def before_experts(
        self,
        x_1D: np.ndarray,
        normed_1D: np.ndarray,
        keys_KSd: np.ndarray,
        values_KSd: np.ndarray,
        at: int,
        cos_1R: np.ndarray,
        sin_1R: np.ndarray,
        ids_1K: np.ndarray,
        weights_1K: np.ndarray,
        threads: int = 0,
    ) -> None:
        """Attention of one row whose key goes to position `at` of the rooms, and the router's choice.

        x_1D: the residual stream; normed_1D: its image under the layer's first norm. Both move on to after the second norm.
        ids_1K (int64), weights_1K: filled when there is a router.
        """
        self._module.before_experts(
            self.plan, x_1D, normed_1D, keys_KSd, values_KSd, at, cos_1R, sin_1R, ids_1K, weights_1K, threads
        )

    def after_choice(
        self, x_1D: np.ndarray, normed_1D: np.ndarray, experts: Sequence[ExpertView], weights_1K: np.ndarray, threads: int = 0
    ) -> None:
        """The chosen experts, in the order of their weights, and what every row passes; then the next layer's first norm.

        Raises:
            ValueError: another number of experts, or experts that do not fit.
        """
        self._module.after_choice(self.plan, x_1D, normed_1D, [one.handle for one in experts], weights_1K, threads)


class Shelf:
    """Where experts lie in memory, by layer and number. The views put there are kept alive. Needs native code."""

    def __init__(self, layers: int, experts: int) -> None:
        module = native.extension()
        assert module is not None, "a shelf needs native code"
        self.native = module.Shelf(layers, experts)
        self._held: dict[tuple[int, int], ExpertView] = {}

    def put(self, layer: int, expert: int, view: ExpertView | None) -> None:
        """The expert is here now, or with None nowhere. Raises IndexError when there is no such place."""
        self.native.put(layer, expert, None if view is None else view.handle)
        if view is None:
            self._held.pop((layer, expert), None)
        else:
            self._held[layer, expert] = view


class Stack:
    """Decoder layers on top of one another. shelves: the layer of the shelf that each layer's experts are in; any for one without."""

    def __init__(self, layers: Sequence[LayerStep], shelves: Sequence[int], slots: int) -> None:
        module = native.extension()
        assert module is not None, "a stack needs native code"
        self._module, self.layers = module, tuple(layers)
        self._plan = module.Stack([layer.plan for layer in layers], list(shelves))
        self.slots = slots  # K, of the layer with the most

    @property
    def spent(self) -> tuple[float, float]:
        """Seconds spent in the layers' first halves (attention, the router) and second ones (experts), in all calls so far."""
        return self._plan.spent

    def climb(
        self,
        first: int,
        x_1D: np.ndarray,
        normed_1D: np.ndarray,
        rooms: list[tuple[np.ndarray, np.ndarray, int]],
        cos_1R: np.ndarray,
        sin_1R: np.ndarray,
        shelf: Shelf,
        ids_LK: np.ndarray,
        weights_LK: np.ndarray,
        threads: int = 0,
    ) -> int:
        """Layers from `first` on, as by `LayerStep`; the layer whose experts are not all on the shelf, or have weight 0, else L.

        Of the layer that is returned the experts are chosen and `after_choice` is still to be done. rooms: keys [H, S, d], values
        and position of each layer from `first` on. ids_LK (int64), weights_LK: rows are filled up to that layer.

        Raises:
            ValueError: arrays or experts that do not fit.
        """
        return self._module.climb(
            self._plan, first, x_1D, normed_1D, rooms, cos_1R, sin_1R, shelf.native, ids_LK, weights_LK, threads
        )


def _at(array: np.ndarray | None) -> int:
    assert array is None or (array.dtype == np.float32 and array.flags.c_contiguous)
    return 0 if array is None else array.ctypes.data


def _map(module: Any, one: Map) -> tuple[Any, int]:
    return one[0].handle or one[0].bind(module), _at(one[1])


def _fits(pairs: Sequence[tuple[Any, Any]]) -> None:
    for found, expected in pairs:
        if found != expected:
            raise ValueError(f"a layer's weights do not fit: {found} where {expected} is expected")
