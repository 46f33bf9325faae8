"""Trying fewer bits without packing anything: experts are read from the checkpoint and put into a candidate's codecs as they come.

Shapes: L MoE layers, E experts (the most of any layer), W widths, T tokens, K slots, N rows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import LayerRecord
from moestro.core.plans.residency import Measured
from moestro.engine import memory as accounting
from moestro.engine.engine import Engine
from moestro.engine.precision.search import Evidence
from moestro.engine.residency import plan_residency
from moestro.engine.store import SourceStore, Views
from moestro.engine.store import load as load_expert
from moestro.evaluate.perplexity import Quality, error_of, measure
from moestro.kernels.ffn import ExpertView, Matrix, grouped_ffn
from moestro.kernels.packed import Packed
from moestro.kernels.reader import Read, Reader
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import Codec, encode
from moestro.models.codecs.packed import Record
from moestro.models.layout import Layout

ROWS = 64  # of each expert, for what it does to its layer's output
SHARE = 0.4  # of the memory that is available, for each of the two engines that are open at once
Candidate = Mapping[ExpertKey, Codec]


class TrialStore:
    """The checkpoint's experts, each put into its codec when it has been read."""

    codec = "stored"  # as the plan of a trial says: nothing is packed

    def __init__(self, source: SourceStore, codecs: Candidate) -> None:
        self.source, self.codecs = source, codecs
        self.slot_bytes, self.extra_bytes = source.slot_bytes, source.extra_bytes
        self.changes: tuple[str, ...] = ("experts are tried in fewer bits",)

    def attach(self, reader: Reader) -> None:
        self.source.attach(reader)

    def check(self) -> None:
        self.source.check()

    def reads(self, key: ExpertKey, slot: np.ndarray) -> list[Read]:
        return self.source.reads(key, slot)

    def finish(self, key: ExpertKey, slot: np.ndarray, made: Views | None = None) -> ExpertView:
        codec = self.codecs[key]
        return cut_planes(encode(self.source.finish(key, slot), codec), codec)


def cut_planes(expert: ExpertView, codec: Codec) -> ExpertView:
    """The expert with no more bits than the codec uses."""
    if codec.format != "nested":
        return expert

    def cut(matrix: Matrix | Packed) -> Packed:
        assert isinstance(matrix, Packed)
        return replace(matrix, parts=matrix.parts[: codec.planes - 1])

    gate = None if expert.gate is None else cut(expert.gate)
    return ExpertView(gate, cut(expert.up), cut(expert.down), expert.gate_bias, expert.up_bias, expert.down_bias)


class Trials:
    """Runs candidates on text beside the model as stored, which stays open. A context manager.

    options: dtype, trunk and trunk_codec as a plan has them; the candidates' trunk is quantised, the reference's is not.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, length: int, options: Mapping[str, Any]) -> None:
        self.checkpoint, self.layout = checkpoint, layout
        budget = int(SHARE * accounting.available()) + accounting.usage().resident
        self.plan = plan_residency(checkpoint, layout, budget, context=length, chunk=length, **options)
        self.reference = Engine(checkpoint, layout, replace(self.plan, trunk_codec="stored"))
        self._known: dict[int, Quality] = {}  # of the reference, by text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reference.close()

    def measured(self, candidate: Candidate, text: list[list[int]], *, kl: bool) -> Measured:
        """The candidate against the reference; without `kl`, which takes as long again, the divergence is said to be 0."""
        if id(text) not in self._known:
            self._known[id(text)] = measure(self.reference, text)
        base = self._known[id(text)]
        with self._opened(candidate) as engine:
            found = measure(engine, text, self.reference if kl else None)
        errors = error_of(found.nll_N - base.nll_N), 0.0 if found.kl_N is None else error_of(found.kl_N)
        return Measured(found.tokens, found.perplexity, base.perplexity, found.kl or 0.0, *errors)

    @contextmanager
    def _opened(self, candidate: Candidate) -> Iterator[Engine]:
        gc.collect()  # an engine and its trunk know each other: the last candidate's experts would stay beside this one's
        store = TrialStore(SourceStore(self.checkpoint, self.layout), candidate)
        with Engine(self.checkpoint, self.layout, self.plan, store=store) as engine:
            yield engine

    def evidence(self, text: list[list[int]], codecs: Sequence[Codec]) -> Evidence:
        """Counts, and what each width does to each expert's part of its layer's output, from one pass of the reference."""
        layers = self.layout.facts.layers
        shape = (len(layers), max(la.num_experts for la in layers))
        counts_LE, harm_LEW = np.zeros(shape, np.int64), np.zeros((*shape, len(codecs)))
        bytes_LEW = np.zeros((*shape, len(codecs)), np.int64)
        records = [output.records for output in self.reference.run(text, inputs=True)]
        store = SourceStore(self.checkpoint, self.layout)
        with Reader() as reader:
            store.attach(reader)
            for number, layer in enumerate(layers):
                mine = [record[number] for record in records]
                sizes = [Record.of(layer.spec, codec).size(codec.planes) for codec in codecs]
                bytes_LEW[number, : layer.num_experts] = sizes
                seen = _Seen.of(mine)
                for e in range(layer.num_experts):
                    expert, _slot = load_expert(store, reader, ExpertKey(number, e))
                    counts_LE[number, e], harm_LEW[number, e] = seen.harm(expert, e, layer.spec, codecs)
        return Evidence(counts_LE, harm_LEW, bytes_LEW)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One layer's inputs and routing on the whole text, and the sum of squares of its output."""

    x_TD: np.ndarray
    experts_TK: np.ndarray
    weights_TK: np.ndarray
    whole: float

    @classmethod
    def of(cls, records: Sequence[LayerRecord]) -> _Seen:
        x_TD = np.concatenate([r.x_TD for r in records])  # type: ignore[misc]
        routing = (np.concatenate([getattr(r.routing, name) for r in records]) for name in ("experts_TK", "weights_TK"))
        return cls(x_TD, *routing, sum(float(np.square(r.y_TD, dtype=np.float64).sum()) for r in records))  # type: ignore[arg-type]

    def harm(self, expert: ExpertView, number: int, spec: ExpertSpec, codecs: Sequence[Codec]) -> tuple[int, np.ndarray]:
        """(tokens routed to the expert, harm_W) from a sample of these tokens, evenly spaced."""
        token_N, slot_N = np.nonzero((self.experts_TK == number) & (self.weights_TK != 0))
        count = len(token_N)
        if not count or not self.whole:
            return count, np.zeros(len(codecs))
        some = slice(None, None, max(1, count // ROWS))
        rows_N = np.ascontiguousarray(token_N[some])
        weight_N = np.ascontiguousarray(self.weights_TK[token_N, slot_N][some], np.float32)
        exact_ND = _outputs(expert, spec, self.x_TD, rows_N, weight_N)
        coded: dict[tuple[str, int], ExpertView] = {}
        harm_W = []
        for codec in codecs:
            kind = codec.format, codec.group
            coded[kind] = coded.get(kind) or encode(expert, codec)
            away_ND = _outputs(cut_planes(coded[kind], codec), spec, self.x_TD, rows_N, weight_N) - exact_ND
            harm_W.append(float(np.square(away_ND, dtype=np.float64).sum()) * count / len(rows_N) / self.whole)
        return count, np.array(harm_W)


def _outputs(expert: ExpertView, spec: ExpertSpec, x_TD: np.ndarray, rows_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """The expert's weighted part of its layer's output, float32 [N, D]."""
    out_ND = np.empty((len(rows_N), x_TD.shape[1]), np.float32)
    grouped_ffn(
        x_TD,
        rows_N,
        np.array([0, len(rows_N)], np.int64),
        [expert],
        activation=spec.activation,
        limit=spec.limit,
        alpha=spec.alpha,
        out_ND=out_ND,
        input_weight_N=weight_N if spec.weigh_input else None,
    )
    return out_ND if spec.weigh_input else out_ND * weight_N[:, None]
