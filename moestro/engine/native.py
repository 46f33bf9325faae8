"""The decoder without torch: weights as stored in the checkpoint, float32 arithmetic in the native kernels, routed experts at the seam.

Padding is never computed: the valid tokens of all sequences lie one after another and each sequence has its own cache.
Shapes: B sequences, T tokens of one pass, N valid rows of it, D model width, V vocabulary, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moestro.core.errors import CheckpointError, InputError, UnsupportedModel
from moestro.core.layer import LayerFacts
from moestro.engine.attention_cache import DTYPES, SequenceCache
from moestro.engine.native_attention import GroupedAttention, LatentAttention, Scratch, Step
from moestro.engine.native_layer import NativeLayer, NativeRouter
from moestro.engine.trunk import Enough, Kept, Seam, State, closed
from moestro.kernels.ffn import ExpertView, grouped_ffn
from moestro.kernels.linear import linear
from moestro.kernels.norm import add_rms_norm, rms_norm
from moestro.kernels.softmax import sigmoid
from moestro.kernels.step import LayerStep, Shelf, Stack
from moestro.kernels.topk import topk
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import parse_trunk_codec
from moestro.models.codecs.trunk import PackedTrunk
from moestro.models.layout import Layout
from moestro.models.native import describe, native_supported
from moestro.models.native.decoder import Attention, Decoder, Layer, Mlp
from moestro.models.native.router import liked, route
from moestro.models.native.weights import Weights, embed, matrices

Watch = Callable[[np.ndarray, np.ndarray], None]  # watch(logits_NE, residual_ND): buffers that are used again


@dataclass(frozen=True, slots=True)
class Resident:
    """How one row finds experts that are in memory.

    views: fn(ordinal, x_1D, experts_1K, weights_1K) -> the chosen experts' views in this order, counted as the seam counts, if all are there.
    shelf: fn() -> where a whole pass may find them by itself, or None when each layer has to be asked for.
    used: fn(ordinals, experts_LK, weights_LK) is told what was found so, before anything else is asked.
    """

    views: Callable[[int, np.ndarray, np.ndarray, np.ndarray], list[ExpertView] | None]
    shelf: Callable[[], Shelf | None]
    used: Callable[[Sequence[int], np.ndarray, np.ndarray], None]


TRUNKS = ("auto", "native", "transformers")


def choose_trunk(checkpoint: Checkpoint, layout: Layout, trunk: str = "auto", dtype: str = "auto") -> str:
    """'native' or 'transformers': what is asked for, or with 'auto' the native trunk where it computes this checkpoint.

    Reads no weight and imports neither torch nor transformers.

    Raises:
        InputError: no such trunk. UnsupportedModel: the native trunk is asked for and cannot run this checkpoint.
    """
    if trunk not in TRUNKS:
        raise InputError(f"the trunk is {trunk!r}", expected=", ".join(TRUNKS))
    reason = None if trunk == "transformers" else native_supported(checkpoint, layout, dtype)
    if trunk == "native" and reason is not None:
        raise UnsupportedModel(reason, expected="a decoder that the native trunk computes", fix="use the transformers trunk")
    return "transformers" if trunk == "transformers" or reason is not None else "native"


class NativeTrunk:
    """A `Trunk` for the families of models.native. See `native_supported`.

    seam: computes the routed experts. resident: gives them for one row, which then takes two native calls per layer, or one for all
    layers as far as the experts lie on its shelf; where it gives none, the seam is asked. dtype: of cached keys and values, 'auto' for the checkpoint's own; arithmetic is float32
    and weights stay as stored, or matrices are in few bits: `codec` names how, and `packed` holds them so already.
    stack: all layers as one for such a row, or None. threads: of the arithmetic, 0 for all cores. watch: told of each MoE layer before its seam is asked; None when nobody asks.

    Raises:
        UnsupportedModel: a decoder it does not compute, or a dtype that would round the weights.
        CheckpointError: a weight is missing, left over, of another shape, or not a number.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        seam: Seam,
        dtype: str = "auto",
        *,
        codec: str = "stored",
        packed: PackedTrunk | None = None,
        threads: int = 0,
        resident: Resident | None = None,
    ) -> None:
        self.seam, self.layout, self.threads, self.resident = seam, layout, threads, resident
        own = layout.facts.dtype
        if dtype not in ("auto", "float32", own):
            raise UnsupportedModel(
                f"the weights are {own} and {dtype} is asked for", expected="the checkpoint's dtype, which the native trunk keeps"
            )
        self.dtype = own if dtype == "auto" else dtype
        assert self.dtype in DTYPES
        self.watch: Watch | None = None
        self._closed: list[np.ndarray] = []
        self.decoder: Decoder = describe(checkpoint, layout)
        self._turns_R = np.tile(self.decoder.rope.frequency_R, 2)  # both halves of a head turn alike
        weights = Weights(checkpoint, matrices(self.decoder), parse_trunk_codec(codec), packed)
        self._embedding, self._head = weights.outer(self.decoder)
        self._norm = weights.required(self.decoder.norm)
        by_index = {layer.index: layer for layer in layout.facts.layers}
        self._layers = [self._layer(la, weights, by_index.get(i)) for i, la in enumerate(self.decoder.layers)]
        if left := sorted(set(layout.trunk) - weights.read):
            raise CheckpointError(f"{left[0]} was not used", expected="every weight in its place")
        self._nbytes = weights.nbytes
        self._following = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        pairs = zip(self._layers, self._following, strict=True)
        self._steps = [None if resident is None else layer.step(norm, self.decoder) for layer, norm in pairs]
        self.stack = self._stacked()
        self._routers = [layer.router for layer in self._layers if layer.router is not None]
        self._rooms = [layer.attention.room for layer in self._layers]
        self._scratch = Scratch()

    def _layer(self, layer: Layer, weights: Weights, facts: LayerFacts | None) -> NativeLayer:
        kind = GroupedAttention if isinstance(layer.attention, Attention) else LatentAttention
        attention = kind(layer.attention, weights, self.decoder.eps, self.decoder.rope.interleaved)  # type: ignore[arg-type]
        router = None
        if layer.router is not None:
            assert facts is not None
            router = NativeRouter(facts, *weights.linear(layer.router.linear), weights.vector(layer.router.choice))
        return NativeLayer(
            weights.required(layer.input_norm),
            attention,
            weights.required(layer.post_norm),
            router,
            None if layer.mlp is None else _view(layer.mlp, weights),
            None if layer.mlp_gate is None else weights.linear(layer.mlp_gate),
        )

    def _stacked(self) -> Stack | None:
        """All layers as one, where each can be a step; layers with routers choose equally many."""
        steps = [step for step in self._steps if step is not None]  # none without `resident`
        routers = [layer.router for layer in self._layers]
        slots = {router.facts.top_k for router in routers if router is not None}
        if len(steps) < len(self._steps) or len(slots) > 1:
            return None
        return Stack(steps, [0 if router is None else router.facts.ordinal for router in routers], max(slots, default=0))

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self._nbytes

    @property
    def continues(self) -> bool:
        """Always: its only state is keys and values."""
        return True

    def start(self, batch: int, capacity: int) -> State:
        """New sequences with room for `capacity` tokens each."""
        return State([SequenceCache(self._rooms, capacity, self.dtype) for _ in range(batch)], batch)

    def back(self, state: State, length: int) -> bool:
        """Forget what came after the first `length` tokens of one sequence; False where the state cannot."""
        assert state.batch == 1 and state.valid_BT is None, "one sequence without padding"
        if not state.cache[0].back(length):
            return False
        state.length = length
        return True

    def forward(
        self, tokens_BT: np.ndarray, state: State, valid_BT: np.ndarray | None = None, *, every: bool = False
    ) -> np.ndarray:
        """Logits after the last token, float32 [B, V]; with `every` after each, [B, T, V]; zeros for padding. The state moves on."""
        batch, width = tokens_BT.shape
        assert batch == state.batch, "the state is of another number of sequences"
        if valid_BT is None and state.valid_BT is not None:
            valid_BT = np.ones((batch, width), bool)
        token_N = tokens_BT.reshape(-1) if valid_BT is None else tokens_BT[valid_BT]
        counts_B = [width] * batch if valid_BT is None else valid_BT.sum(1).tolist()
        step = self._step(state.cache, counts_B)
        shown_BT = _shown(batch, width, valid_BT, every)
        make = np.empty if shown_BT.all() else np.zeros
        logits_BTV = make((batch, width if every else 1, self._head.rows), np.float32)
        if len(token_N):
            normed_ND = self._run(token_N, step)
            rows_ND = normed_ND if every else normed_ND[np.cumsum(counts_B)[shown_BT[:, -1]] - 1]
            if shown_BT.any():
                self._logits(rows_ND, logits_BTV, None if shown_BT.all() else shown_BT)
        else:
            self._rest()
        for (cache, _), count in zip(step.sequences, counts_B, strict=True):
            cache.advance(count)
        if valid_BT is not None:
            before = state.valid_BT if state.valid_BT is not None else np.ones((batch, state.length), bool)
            state.valid_BT = np.concatenate([before, valid_BT], axis=1)
        state.length += width
        return logits_BTV if every else logits_BTV[:, -1]

    def _step(self, caches: list[SequenceCache], counts_B: list[int]) -> Step:
        """Positions go on from what each sequence holds."""
        ends = np.cumsum([0, *counts_B])
        parts = tuple((cache, slice(int(a), int(b))) for cache, a, b in zip(caches, ends[:-1], ends[1:], strict=True))
        lengths_N = np.empty(int(ends[-1]), np.int64)
        for cache, part in parts:
            lengths_N[part] = np.arange(cache.length + 1, cache.length + 1 + part.stop - part.start)
        rope = self.decoder.rope
        angle_NR = (lengths_N - 1).astype(np.float32)[:, None] * self._turns_R
        scale = np.float32(rope.scale)
        return Step(parts, lengths_N, np.cos(angle_NR) * scale, np.sin(angle_NR) * scale, self._scratch, self.threads)

    def _run(self, token_N: np.ndarray, step: Step) -> np.ndarray:
        """The final norm's output, in scratch memory."""
        decoder, rows, width = self.decoder, len(token_N), self.layout.facts.d_model
        x_ND = embed(self._embedding, token_N, step.scratch.take("x", rows, width))
        if decoder.embedding_scale != 1.0:
            x_ND *= np.float32(decoder.embedding_scale)
        normed_ND, y_ND = step.scratch.take("normed", rows, width), step.scratch.take("y", rows, width)
        rms_norm(x_ND, self._layers[0].input_norm, decoder.eps, out_TD=normed_ND)
        alone = self.watch is None and not self._closed and rows == len(step.sequences) == 1
        if alone and self.stack is not None and self.resident is not None and (shelf := self.resident.shelf()) is not None:
            self._climb(self.stack, shelf, x_ND, normed_ND, step, y_ND)
            return normed_ND
        for index, (layer, norm) in enumerate(zip(self._layers, self._following, strict=True)):
            fast = self._steps[index]
            if fast is not None and alone:
                self._one_row(fast, index, x_ND, normed_ND, step, y_ND)
                continue
            layer.attention(normed_ND, step, index, y_ND)
            add_rms_norm(x_ND, y_ND, layer.post_norm, decoder.eps, scale=decoder.residual_scale, out_TD=normed_ND)
            added_ND = self._feed_forward(layer, normed_ND, x_ND, step, y_ND)
            add_rms_norm(x_ND, added_ND, norm, decoder.eps, scale=decoder.residual_scale, out_TD=normed_ND)
        return normed_ND

    def _feed_forward(
        self, layer: NativeLayer, x_ND: np.ndarray, residual_ND: np.ndarray, step: Step, out_ND: np.ndarray
    ) -> np.ndarray:
        """The dense MLP, or routed experts and what every token passes. The seam's own result is left as it is."""
        router = layer.router
        if router is None:
            self._dense(layer, x_ND, step, out_ND)
            return out_ND
        logits_NE = router.logits(x_ND, step.scratch.take("logits", len(x_ND), router.weight.rows), step.threads)
        if self._closed:
            logits_NE[:, self._closed[router.facts.ordinal]] = -np.inf
        if self.watch is not None:
            self.watch(logits_NE, residual_ND)
        return self._routed(layer, x_ND, *route(logits_NE, router.facts, router.choice), step, out_ND)

    def _routed(
        self, layer: NativeLayer, x_ND: np.ndarray, ids_NK: np.ndarray, weights_NK: np.ndarray, step: Step, out_ND: np.ndarray
    ) -> np.ndarray:
        """The chosen experts by the seam, and what every token passes."""
        assert layer.router is not None
        ordinal = layer.router.facts.ordinal
        if layer.mlp is None:
            return self.seam(ordinal, x_ND, ids_NK, weights_NK, None)
        meanwhile = partial(self._dense, layer, x_ND, step, out_ND)
        out_ND += self.seam(ordinal, x_ND, ids_NK, weights_NK, None, meanwhile)
        return out_ND

    def _one_row(
        self, fast: LayerStep, index: int, x_1D: np.ndarray, normed_1D: np.ndarray, step: Step, y_1D: np.ndarray
    ) -> None:
        """One layer of a single row in two native calls, if its experts are in memory; the bits of the general way."""
        layer, cache = self._layers[index], step.sequences[0][0]
        slots = 0 if layer.router is None else layer.router.facts.top_k
        ids_1K, weights_1K = np.empty((1, slots), np.int64), np.empty((1, slots), np.float32)
        fast.before_experts(x_1D, normed_1D, *cache.place(index), step.cos_NR, step.sin_NR, ids_1K, weights_1K, step.threads)
        self._after_choice(fast, index, x_1D, normed_1D, ids_1K, weights_1K, step, y_1D)

    def _after_choice(
        self, fast: LayerStep, index: int, x_1D: np.ndarray, normed_1D: np.ndarray, ids_1K: np.ndarray, weights_1K: np.ndarray,
        step: Step, y_1D: np.ndarray,
    ) -> None:  # fmt: skip
        """The second half of a layer: what is in memory natively, else by the seam."""
        layer, decoder = self._layers[index], self.decoder
        assert self.resident is not None
        views = [] if layer.router is None else self.resident.views(layer.router.facts.ordinal, normed_1D, ids_1K, weights_1K)
        if views is not None:
            fast.after_choice(x_1D, normed_1D, views, weights_1K, step.threads)
            return
        added_1D = self._routed(layer, normed_1D, ids_1K, weights_1K, step, y_1D)
        add_rms_norm(x_1D, added_1D, self._following[index], decoder.eps, scale=decoder.residual_scale, out_TD=normed_1D)

    def _climb(self, stack: Stack, shelf: Shelf, x_1D: np.ndarray, normed_1D: np.ndarray, step: Step, y_1D: np.ndarray) -> None:
        """All layers of a single row: natively from one layer whose experts are not all in memory to the next."""
        assert self.resident is not None
        cache, count, index = step.sequences[0][0], len(self._layers), 0
        ids_LK, weights_LK = np.empty((count, stack.slots), np.int64), np.empty((count, stack.slots), np.float32)
        rooms = [cache.place(layer) for layer in range(count)]
        while index < count:
            reached = stack.climb(
                index, x_1D, normed_1D, rooms[index:], step.cos_NR, step.sin_NR, shelf, ids_LK, weights_LK, step.threads
            )
            routed = [i for i in range(index, reached) if self._layers[i].router is not None]
            ordinals = [router.facts.ordinal for i in routed if (router := self._layers[i].router) is not None]
            self.resident.used(ordinals, ids_LK[routed], weights_LK[routed])
            if reached < count:
                one = slice(reached, reached + 1)
                self._after_choice(stack.layers[reached], reached, x_1D, normed_1D, ids_LK[one], weights_LK[one], step, y_1D)
            index = reached + 1

    def _dense(self, layer: NativeLayer, x_ND: np.ndarray, step: Step, out_ND: np.ndarray) -> None:
        """out_ND: the MLP that every row passes, times its gate if it has one."""
        assert layer.mlp is not None
        rows = len(x_ND)
        grouped_ffn(
            x_ND, np.arange(rows), np.array([0, rows]), [layer.mlp], activation=self.decoder.activation, out_ND=out_ND,
            threads=step.threads,
        )  # fmt: skip
        if layer.mlp_gate is not None:
            out_ND *= sigmoid(linear(x_ND, layer.mlp_gate[0], bias_R=layer.mlp_gate[1], threads=1))

    def _rest(self) -> None:
        """A pass of padding alone: every layer's seam is told that nothing is demanded."""
        none_0 = np.zeros(0, bool)
        for layer in self.layout.facts.layers:
            empty = np.zeros((0, layer.top_k))
            x_0D = np.zeros((0, self.layout.facts.d_model), np.float32)
            self.seam(layer.ordinal, x_0D, empty.astype(np.int64), empty.astype(np.float32), none_0)

    def _logits(self, x_ND: np.ndarray, logits_BTV: np.ndarray, shown_BT: np.ndarray | None) -> None:
        """Fill the logits of the shown tokens, whose rows are x_ND."""
        target = logits_BTV.reshape(-1, logits_BTV.shape[2]) if shown_BT is None else None
        found = linear(x_ND, self._head, out_TR=target, threads=self.threads)
        if self.decoder.logits_divisor != 1.0:
            found /= np.float32(self.decoder.logits_divisor)
        if shown_BT is not None:
            logits_BTV[shown_BT] = found

    def ahead(self, ordinal: int, x_TD: np.ndarray, width: int) -> np.ndarray | None:
        """ids_TW: the `width` experts that layer `ordinal`'s router likes best for x_TD, best first."""
        router = self._routers[ordinal]
        scores_TE = liked(router.logits(x_TD, threads=self.threads), router.facts, router.choice)
        if self._closed:
            scores_TE[:, self._closed[ordinal]] = -np.inf
        return topk(scores_TE, min(width, scores_TE.shape[1]))[0]

    def restrict(self, kept: Kept | None) -> None:
        """The routers of one token at a time then take the general way, not the two native calls."""
        self._closed = [] if kept is None else closed(self.layout.facts, kept)

    def glance(self, tokens_1T: np.ndarray) -> np.ndarray:
        found: list[np.ndarray] = []

        def first(logits_NE: np.ndarray, residual_ND: np.ndarray) -> None:
            found.append(logits_NE.copy())
            raise Enough

        self._closed, self.watch = [], first
        try:
            self.forward(tokens_1T, self.start(1, tokens_1T.shape[1]))
        except Enough:
            pass
        finally:
            self.watch = None
        return found[0]


def _view(mlp: Mlp, weights: Weights) -> ExpertView:
    down, down_bias = weights.linear(mlp.down)
    if mlp.up is not None:
        (gate, gate_bias), (up, up_bias) = weights.linear(mlp.gate), weights.linear(mlp.up)
        return ExpertView(gate, up, down, gate_bias, up_bias, down_bias)
    gate, up = weights.pieces(mlp.gate.weight, 2)
    both = weights.vector(mlp.gate.bias)
    biases = (None, None) if both is None else (both[: gate.rows], both[gate.rows :])
    return ExpertView(gate, up, down, *biases, down_bias)


def _shown(batch: int, width: int, valid_BT: np.ndarray | None, every: bool) -> np.ndarray:
    """Which tokens' logits are asked for and exist: bool [B, T], or [B, 1] without `every`."""
    valid_BT = np.ones((batch, width), bool) if valid_BT is None else valid_BT
    return valid_BT if every else valid_BT[:, -1:]
