"""Runs a model over texts and lets probes watch: streaming, resumable, and the same whatever the order.

Every sequence is run and added on its own, and statistics add exactly (`profile.statistics`), so neither the order of shards nor
stopping and going on can change a bit of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import InputError, ProfileError
from moestro.core.layer import ExpertAccess, Runner
from moestro.core.method import card_of
from moestro.core.trace import Trace
from moestro.profile.data import Piece, Texts
from moestro.profile.probe import Probe, Setting, Statistics, requires, settings_of
from moestro.profile.profile import Profile, layer_facts, read_arrays, write_arrays
from moestro.profile.seen import Fetch, Seen, SeenLayer, as_numpy, heaviest_first

PARTIAL = "moestro_partial"
SECONDS = 60.0  # between two savings of what has been done


class Recording:
    """What has been seen so far of some texts. done_S: which sequences. It grows by `add` and joins another by `merge`.

    trace_tokens: the trace keeps about as many tokens, whole sequences evenly spread; 0 none.
    trace_weights: keep the combine weights in it too (two bytes per slot more).

    Raises:
        InputError: two probes give the same statistic, or the statistics take more than `most_bytes`.
    """

    def __init__(
        self,
        runner: Runner,
        texts: Texts,
        probes: Mapping[str, Probe],
        *,
        trace_tokens: int = 65536,
        trace_weights: bool = False,
        most_bytes: int = 4 * 2**30,
    ) -> None:
        self.facts, self.texts, self.probes, self.trace_weights = runner.facts, texts, dict(probes), trace_weights
        self.setting = Setting(
            runner.facts, texts.labels, texts.frequent(), len(texts.sequences), max(len(s.tokens_T) for s in texts.sequences)
        )
        self.statistics: dict[str, Statistics] = {}
        for name, probe in self.probes.items():
            self.statistics[name] = probe.start(self.setting)
            assert set(self.statistics[name]) == set(probe.gives), f"{name} gives other statistics than it says"
        names = [name for statistics in self.statistics.values() for name in statistics]
        assert len(names) == len(set(names)), "two probes give a statistic of the same name"
        size = {name: sum(s.nbytes for s in statistics.values()) for name, statistics in self.statistics.items()}
        if sum(size.values()) > most_bytes:
            worst = max(size, key=lambda name: size[name])
            raise InputError(
                f"the statistics would take {sum(size.values()) / 2**30:.1f} GiB, {worst} alone {size[worst] / 2**30:.1f} GiB",
                expected=f"{most_bytes / 2**30:.1f} GiB or less",
                fix="choose other probes, or other options of this one",
            )
        self.done_S = np.zeros(len(texts.sequences), bool)
        self.traced_S = sampled(texts, trace_tokens)
        self._trace: dict[int, tuple[np.ndarray, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the statistics."""
        return sum(s.nbytes for statistics in self.statistics.values() for s in statistics.values())

    @property
    def key(self) -> dict[str, Any]:
        """What must be equal for two recordings to be of one run."""
        probes = {name: settings_of(probe) for name, probe in self.probes.items()}
        return {
            "model": self.facts.fingerprint,
            "data": self.texts.digest,
            "probes": json.loads(json.dumps(probes)),
            "trace": [int(self.traced_S.sum()), self.trace_weights],
        }

    def run(
        self,
        runner: Runner,
        sequences: Iterable[int] | None = None,
        *,
        save: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Read these sequences (by default all that are not done).

        Args:
            save: a file that keeps what is done, written every minute and when anything stops the run.
            progress: called with (counted tokens done, of all).

        Raises:
            InputError: the runner does not give what a probe needs.
        """
        todo = [i for i in (sequences if sequences is not None else range(len(self.done_S))) if not self.done_S[i]]
        pieces = self.texts.sequences
        inputs = bool(requires(self.probes) - {"logits"})
        done = sum(int(pieces[i].counted_T.sum()) for i in np.flatnonzero(self.done_S))
        saved = time.monotonic()
        half = False
        try:
            for i in todo:
                (output,) = runner.run([pieces[i].tokens_T.tolist()], inputs=inputs)
                seen, layers = self._seen(runner, i, pieces[i], output)
                half = True
                for layer in layers:
                    seen.layers.append(layer)
                    for name, probe in self.probes.items():
                        probe.update(self.statistics[name], seen, layer)
                    layer.forget()
                if self.traced_S[i]:
                    self._trace[i] = _rows(output.records, self.setting.slots, self.trace_weights)
                self.done_S[i], half = True, False
                done += int(pieces[i].counted_T.sum())
                progress(done, self.texts.tokens)
                if save is not None and time.monotonic() - saved > SECONDS:
                    self.save(save)
                    saved = time.monotonic()
        except BaseException:
            if save is not None and not half and self.done_S.any():  # never with half a sequence in it
                self.save(save)
            raise

    def _seen(self, runner: Runner, index: int, piece: Piece, output: Any) -> tuple[Seen, list[SeenLayer]]:
        fetch: Fetch | None = runner.weights if isinstance(runner, ExpertAccess) else None
        missing = requires(self.probes) - given(runner, output)
        if missing:
            names = [name for name, probe in self.probes.items() if missing & set(card_of(probe).needs)]
            raise InputError(
                f"{', '.join(names)} needs {', '.join(sorted(missing))}, which this way of running the model does not give",
                expected="probes that need nothing of the kind",
                fix="keep the model in memory with --runner transformers, or leave the probe out",
            )
        rows_T = np.flatnonzero(piece.counted_T)
        seen = Seen(
            index,
            piece.tokens_T,
            piece.counted_T,
            piece.tokens_T[rows_T].astype(np.int64),
            rows_T + piece.start,
            piece.labels_T[rows_T].astype(np.int64),
            output.logits_TV,
        )
        facts = self.facts.layers
        return seen, [SeenLayer(facts[r.ordinal], r, rows_T, self.setting.width, fetch) for r in output.records]

    def merge(self, other: Recording) -> None:
        """Add what another recording of the same run has done. Raises ProfileError when it is of another run or they overlap."""
        if self.key != other.key:
            raise ProfileError("two recordings of different runs cannot be merged", expected="the same model, data and probes")
        if (self.done_S & other.done_S).any():
            raise ProfileError(
                f"sequence {int(np.argmax(self.done_S & other.done_S))} is in both recordings",
                expected="shards that do not overlap",
            )
        for name, statistics in self.statistics.items():
            for key, statistic in statistics.items():
                statistic.merge(other.statistics[name][key])
        self.done_S |= other.done_S
        self._trace |= other._trace

    def save(self, path: Path) -> None:
        """Keep what is done, to go on later. Raises StorageError."""
        arrays = {"done_S": self.done_S.astype(np.uint8)}
        for statistics in self.statistics.values():
            for key, statistic in statistics.items():
                arrays |= {f"{key}{part}": array for part, array in statistic.parts().items()}
        for i, rows in self._trace.items():
            arrays |= {f"trace.{i}.{n}": array for n, array in enumerate(rows)}
        write_arrays(path, arrays, PARTIAL, self.key)

    def restore(self, path: Path) -> None:
        """Take up what `save` kept. Raises ProfileError when it is of another run or cannot be read."""
        arrays, said = read_arrays(path, PARTIAL)
        for what in ("model", "data", "probes", "trace"):
            if said.get(what) != self.key[what]:
                raise ProfileError(
                    f"{path} is of a run with other {what} than this one",
                    expected="the same model, data, probes and options",
                    fix=f"repeat the command that was stopped, or remove {path}",
                )
        try:
            for statistics in self.statistics.values():
                for key, statistic in statistics.items():
                    statistic.restore({part: arrays[f"{key}{part}"] for part in statistic.parts()})
            self.done_S = arrays["done_S"].astype(bool)
            for name in arrays:
                if name.startswith("trace."):
                    i = int(name.split(".")[1])
                    parts = [n for n in arrays if n.startswith(f"trace.{i}.")]
                    self._trace[i] = tuple(arrays[f"trace.{i}.{n}"] for n in range(len(parts)))
        except (KeyError, ValueError) as error:
            raise ProfileError(f"{path} lacks {error}", fix="remove it and start again") from error

    def profile(self) -> Profile:
        """The statistics as they are now. Raises InputError when a sum has left its range."""
        arrays = {key: statistic.value() for statistics in self.statistics.values() for key, statistic in statistics.items()}
        labels = self.texts.labels
        tokens_G = np.zeros(len(labels), np.int64)
        for i in np.flatnonzero(self.done_S):
            piece = self.texts.sequences[i]
            tokens_G += np.bincount(piece.labels_T[piece.counted_T], minlength=len(labels))
        return Profile(
            arrays=arrays,
            model=self.facts.fingerprint,
            family=self.facts.family,
            layers=tuple(layer_facts(layer) for layer in self.facts.layers),
            labels=labels,
            tokens_G=tuple(tokens_G.tolist()),
            characters_G=tuple(self.texts.characters_G) if self.done_S.all() else None,
            data=self.texts.digest,
            sources=tuple(dict(s) for s in self.texts.sources),
            probes={name: settings_of(probe) for name, probe in self.probes.items()},
            trace=self.trace(),
        )

    def trace(self) -> Trace | None:
        """The sampled sequences whole, each a prefill of its own; in each row the heaviest expert first. None when none is kept."""
        if not self._trace:
            return None
        order = sorted(self._trace)
        pieces = [self.texts.sequences[i] for i in order]
        lengths = [len(p.tokens_T) for p in pieces]
        number = np.repeat(np.arange(len(order), dtype=np.int32), lengths)
        return Trace(
            tokens_T=np.concatenate([p.tokens_T for p in pieces]),
            sequences_T=number,
            positions_T=np.concatenate([np.arange(p.start, p.start + n, dtype=np.int32) for p, n in zip(pieces, lengths)]),
            steps_T=number,
            prefill_T=np.ones(len(number), np.uint8),
            experts_LTK=np.concatenate([self._trace[i][0] for i in order], axis=1),
            weights_LTK=np.concatenate([self._trace[i][1] for i in order], axis=1) if self.trace_weights else None,
            num_experts=tuple(layer.num_experts for layer in self.facts.layers),
            model=self.facts.fingerprint,
            info={
                "method": "profile",
                "data": self.texts.digest,
                "labels": list(self.texts.labels),
                "label_of_sequence": [int(np.bincount(p.labels_T).argmax()) for p in pieces],
            },
        )


def sampled(texts: Texts, tokens: int) -> np.ndarray:
    """bool_S: whole sequences, evenly spread over the data, of about `tokens` tokens together (at least one, unless 0 are wanted)."""
    length_S = np.array([len(s.tokens_T) for s in texts.sequences])
    if tokens <= 0:
        return np.zeros(len(length_S), bool)
    share = min(1.0, tokens / length_S.sum())
    # A sequence is taken whenever the running share of tokens passes a whole number of sequences' worth.
    due_S = np.floor(np.arange(1, len(length_S) + 1) * share + 1e-9)
    out = np.diff(due_S, prepend=0) > 0
    out[0] |= not out.any()
    return out


def given(runner: Runner, output: Any) -> frozenset[str]:
    """What a runner gives beyond ids and weights, seen on one of its outputs with inputs asked for."""
    records = output.records
    found = {"experts"} if isinstance(runner, ExpertAccess) else set()
    for name, has in (
        ("logits", lambda r: r.routing.logits_TE is not None),
        ("inputs", lambda r: r.x_TD is not None and r.y_TD is not None),
        ("residual", lambda r: r.residual_TD is not None),
    ):
        if all(has(record) for record in records):
            found.add(name)
    if any(record.sink_TH is not None for record in records):
        found.add("attention")
    return frozenset(found)


def available(runner: Runner, texts: Texts) -> frozenset[str]:
    """What a runner gives, tried out on the first tokens of the data."""
    (output,) = runner.run([texts.sequences[0].tokens_T[:4].tolist()], inputs=True)
    return given(runner, output)


def _rows(records: Any, slots: int, weights: bool) -> tuple[np.ndarray, ...]:
    """experts_LTK (and weights_LTK) of one sequence, heaviest first, layers padded to the widest."""
    tokens = int(records[0].routing.tokens)
    widest = max(slots, *(int(r.routing.slots) for r in records))
    experts_LTK = np.full((len(records), tokens, widest), -1, np.int16)
    weights_LTK = np.zeros((len(records), tokens, widest))
    for row, record in enumerate(records):
        slots = int(record.routing.slots)
        experts_LTK[row, :, :slots] = as_numpy(record.routing.experts_TK)
        weights_LTK[row, :, :slots] = as_numpy(record.routing.weights_TK)
    order_LTK = heaviest_first(experts_LTK, weights_LTK)
    experts_LTK = np.take_along_axis(experts_LTK, order_LTK, axis=2)
    if not weights:
        return (experts_LTK,)
    return experts_LTK, np.where(experts_LTK >= 0, np.take_along_axis(weights_LTK, order_LTK, axis=2), 0).astype(np.float16)
