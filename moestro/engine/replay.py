"""Replays a trace through the same slot table, policies and predictor as the live engine, and counts.

`replay` answers for one setting, `sweep` for every policy at every budget with Belady as the bound and uniform random routing as
the null. Experts per pass and layer are demanded once, in the order that `table.needed` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.core.layer import ModelFacts
from moestro.core.method import card_of, catalogue, load
from moestro.core.trace import Trace
from moestro.engine.evict.lru import Lru
from moestro.engine.prefetch import Glimpse, Prefetcher
from moestro.engine.table import Counts, Eviction, Moment, SlotTable, needed
from moestro.engine.widths import Widths, table_of
from moestro.kernels import replay as native
from moestro.kernels.native import cores

LRU, BELADY, NONE, GATE = "engine.evict.lru", "engine.evict.belady", "engine.predict.none", "engine.predict.gate"


class Demand(NamedTuple):
    """What one forward pass needs of one layer. rows: the trace's tokens of that pass."""

    moment: Moment
    keys: list[ExpertKey]
    rows: slice


class Demands:
    """Every demand of a trace, pass by pass and layer by layer; made once, replayed at any setting."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    @functools.cached_property
    def list(self) -> Sequence[Demand]:
        """As the live engine makes them, in order."""
        return _demands(self._trace)

    @functools.cached_property
    def future(self) -> dict[ExpertKey, list[int]]:
        """For each expert the forward passes that use it, ascending: what Belady and the oracle know."""
        return future(self.list)

    @functools.cached_property
    def largest(self) -> tuple[int, ...]:
        """The most experts that one pass needs of each layer."""
        out = [0] * self._trace.layers
        for moment, keys, _ in self.list:
            out[moment.layer] = max(out[moment.layer], len(keys))
        return tuple(out)

    @functools.cached_property
    def flat(self) -> native.Asked | None:
        """The same for native replays; None where there is no native code."""
        starts_P1 = self._trace.cuts()
        prefill_P = np.asarray(self._trace.prefill_T)[starts_P1[:-1]]
        return native.asked(self._trace.experts_LTK, starts_P1, prefill_P, self._trace.num_experts)


def count(
    asked: Demands, eviction: str, scope: str, slots: Sequence[Sequence[int]]
) -> list[tuple[list[Counts], list[Counts]]] | None:
    """For each budget the counts (decode, prefill) per layer, natively: no prefetching, pinned experts or options.

    slots: of each budget, as `SlotTable` takes them. None when the policy has no native form, or nothing native is there.
    """
    policy = getattr(load(eviction, "eviction"), "native", None)
    if policy is None or asked.flat is None:
        return None
    tally = np.zeros((len(slots), 2, len(asked.flat.first_L1) - 1, 3), np.int64)
    for pool in range(len(slots[0])):
        order = sorted(range(len(slots)), key=lambda i: slots[i][pool])
        found = native.count(asked.flat, policy, [slots[i][pool] for i in order], None if scope == "global" else pool)
        if found is None:
            return None
        tally[order] += found
    return [(_counts(decode), _counts(prefill)) for decode, prefill in tally]


def _count_all(
    demands: Mapping[str, Demands], wanted: Sequence[tuple[str, str]], scope: str, splits: Sequence[Sequence[int]]
) -> dict[tuple[str, str], list[tuple[list[Counts], list[Counts]]] | None]:
    """`count` for each (routing, policy), on all cores: those that take every budget in one pass first, for they take longest."""
    parts = {
        (routing, name): [splits] if getattr(load(name, "eviction"), "native", "") in native.ONE_PASS else [[s] for s in splits]
        for routing, name in wanted
    }
    with ThreadPoolExecutor(cores()) as threads:
        ran = {
            (routing, name): [threads.submit(count, demands[routing], name, scope, part) for part in parts[routing, name]]
            for routing, name in sorted(wanted, key=lambda run: len(parts[run]))
            if demands[routing].flat is not None
        }
        done = {run: [future.result() for future in futures] for run, futures in ran.items()}
    return {run: None if None in found else [one for part in found for one in part or ()] for run, found in done.items()}


def _counts(tally_L3: np.ndarray) -> list[Counts]:
    return [Counts(demands, demands - misses, misses, evictions) for demands, misses, evictions in tally_L3.tolist()]


def _demands(trace: Trace) -> list[Demand]:
    names = [[ExpertKey(layer, e) for e in range(n)] for layer, n in enumerate(trace.num_experts)]
    experts_LTK = np.asarray(trace.experts_LTK)
    sorted_TLK = np.sort(experts_LTK, -1).transpose(1, 0, 2)
    out: list[Demand] = []
    for step in trace.steps():
        alone = step.rows.stop - step.rows.start == 1
        rows_LK = sorted_TLK[step.rows.start].tolist() if alone else []
        for layer in range(trace.layers):
            if alone:
                keys = [names[layer][e] for e in rows_LK[layer] if e >= 0]
            else:
                keys = needed(layer, experts_LTK[layer, step.rows])
            out.append(Demand(Moment(step.step, layer, step.prefill), keys, step.rows))
    return out


def future(asked: Sequence[Demand]) -> dict[ExpertKey, list[int]]:
    """For each expert the forward passes that use it, ascending: what Belady and the oracle know."""
    out: dict[ExpertKey, list[int]] = {}
    for demand in asked:
        for key in demand.keys:
            out.setdefault(key, []).append(demand.moment.step)
    return out


def eviction_factory(
    name: str, options: Mapping[str, Any] | None = None, future: Mapping[ExpertKey, Sequence[int]] | None = None
) -> Callable[[int, int], Eviction]:
    """What `SlotTable` calls to make a policy. Raises InputError for an unknown name or option, or for one that needs the future."""
    cls = load(name, "eviction")
    given = dict(options or {})
    _check_options(cls, given)
    if "future" in card_of(cls).needs:
        if future is None:
            raise InputError(f"{name} knows the future: it is for replay only", fix="choose another eviction policy")
        return lambda capacity, layers: cls(capacity, layers, future, **given)
    return lambda capacity, layers: cls(capacity, layers, **given)


def make_predictor(
    name: str,
    layers: int,
    num_experts: tuple[int, ...],
    options: Mapping[str, Any] | None = None,
    future: Mapping[ExpertKey, Sequence[int]] | None = None,
) -> Any:
    """A `Predictor` by name. Raises InputError as `eviction_factory` does."""
    cls = load(name, "predictor")
    given = dict(options or {})
    _check_options(cls, given)
    if "future" in card_of(cls).needs:
        if future is None:
            raise InputError(f"{name} knows the future: it is for replay only", fix="choose another predictor")
        return cls(layers, num_experts, future, **given)
    return cls(layers, num_experts, **given)


def _check_options(cls: Any, given: Mapping[str, Any]) -> None:
    known = [option.name for option in card_of(cls).options]
    if unknown := sorted(set(given) - set(known)):
        raise InputError(
            f"{card_of(cls).name} has no option {', '.join(unknown)}",
            expected=", ".join(known) or "no options",
            fix="moestro methods",
        )


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Counts of one setting on one trace, prefill and decode apart, and what follows from them.

    slots: as the slot table takes them. layers: decode counts per MoE layer. read_bytes_per_token: missed and prefetched
    experts of the phase times their size, over its tokens; missed_bytes_per_token: the missed ones alone.
    """

    eviction: str
    predictor: str
    scope: str
    slots: tuple[int, ...]
    prefetch: int
    pinned: int
    prefill: Counts
    decode: Counts
    layers: tuple[Counts, ...]
    prefill_tokens: int
    decode_tokens: int
    missed_bytes: tuple[int, int]  # prefill, decode
    read_bytes: tuple[int, int]
    routing: str = "trace"  # or 'uniform': the null

    @property
    def hit_rate(self) -> float:
        """Of decode, or of prefill when nothing was decoded."""
        return (self.decode if self.decode_tokens else self.prefill).hit_rate

    def missed_bytes_per_token(self, *, prefill: bool = False) -> float:
        """Bytes read because a demand found nothing, per token of the phase."""
        return self.missed_bytes[not prefill] / max(1, self.prefill_tokens if prefill else self.decode_tokens)

    def read_bytes_per_token(self, *, prefill: bool = False) -> float:
        """All bytes read, prefetches too, per token of the phase."""
        return self.read_bytes[not prefill] / max(1, self.prefill_tokens if prefill else self.decode_tokens)

    @property
    def precision(self) -> float:
        """Share of prefetched experts that were used before they were evicted; 0 without prefetching."""
        both = self.prefill + self.decode
        return both.prefetch_used / both.prefetch_issued if both.prefetch_issued else 0.0

    @property
    def recall(self) -> float:
        """Share of what would have been a miss that a prefetch had brought; 0 without prefetching."""
        both = self.prefill + self.decode
        missed = both.prefetch_used + both.misses
        return both.prefetch_used / missed if missed else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, the derived figures included."""
        said = asdict(self)
        said |= {"hit_rate": self.hit_rate, "precision": self.precision, "recall": self.recall}
        for phase in ("prefill", "decode"):
            prefill = phase == "prefill"
            said[phase]["hit_rate"] = (self.prefill if prefill else self.decode).hit_rate
            said[phase]["missed_bytes_per_token"] = self.missed_bytes_per_token(prefill=prefill)
            said[phase]["read_bytes_per_token"] = self.read_bytes_per_token(prefill=prefill)
        return said


def replay(
    trace: Trace,
    slots: Sequence[int],
    scope: str = "global",
    eviction: str = LRU,
    *,
    eviction_options: Mapping[str, Any] | None = None,
    predictor: str = NONE,
    predictor_options: Mapping[str, Any] | None = None,
    prefetch: int = 0,
    pinned: Sequence[ExpertKey] = (),
    expert_bytes: Sequence[int] | None = None,
    asked: Demands | None = None,
    widths: Widths | None = None,
) -> CacheReport:
    """Count hits and misses as the live engine would.

    Args:
        slots, scope, pinned: as `SlotTable` takes them, or scope 'width' with one number per width.
        prefetch: experts asked for ahead per layer; 0 for none.
        expert_bytes: of one expert, per layer; without it bytes are 0.
        asked: `Demands(trace)`, if it is there already.
        widths: of experts that differ in size; bytes are then counted expert by expert instead of by `expert_bytes`.

    Raises:
        InputError: slots, names or options that cannot be.
    """
    asked = Demands(trace) if asked is None else asked
    ahead = bool(prefetch) and predictor != NONE
    if not (ahead or pinned or eviction_options or predictor_options or widths):
        SlotTable(slots, scope, Lru, layers=trace.layers)  # refuses what cannot be
        load(predictor, "predictor")
        if found := count(asked, eviction, scope, [slots]):
            return _report(trace, slots, scope, found[0], eviction, expert_bytes, predictor=predictor, prefetch=prefetch)
    needs = {
        need for name, kind in ((eviction, "eviction"), (predictor, "predictor")) for need in card_of(load(name, kind)).needs
    }
    known = asked.future if "future" in needs else None
    factory = eviction_factory(eviction, eviction_options, known)
    table = table_of(slots, scope, factory, layers=trace.layers, pinned=pinned, widths=widths)
    missed, loaded = [0, 0], [0, 0]  # bytes in decode and prefill
    guesser = make_predictor(predictor, trace.layers, trace.num_experts, predictor_options, known)
    if ahead:
        prefetcher = Prefetcher(guesser, table, prefetch)
        experts_LTK = np.asarray(trace.experts_LTK)
        ahead_LTK = None if trace.ahead_LTK is None else np.asarray(trace.ahead_LTK)
        for moment, keys, rows in asked.list:
            layer = moment.layer
            for wave in table.waves(keys, moment):
                if widths is not None:
                    missed[moment.prefill] += widths.read(wave.placements)
                if wave.last:
                    glimpse = None if ahead_LTK is None or layer + 1 == trace.layers else Glimpse(ahead_TW=ahead_LTK[layer, rows])
                    hinted = prefetcher.routed(experts_LTK[layer, rows], moment, glimpse)
                    if widths is not None:
                        loaded[moment.prefill] += widths.read(hinted)
    else:
        for moment, keys, _ in asked.list:
            for wave in table.waves(keys, moment):
                if widths is not None:
                    missed[moment.prefill] += widths.read(wave.placements)
    decode, prefill = ([table.counts(prefill=p, layer=i) for i in range(trace.layers)] for p in (False, True))
    said = {"predictor": predictor, "prefetch": prefetch, "pinned": len(pinned)}
    report = _report(trace, slots, scope, (decode, prefill), eviction, expert_bytes, **said)
    if widths is None:
        return report
    both = (missed[1], missed[0]), (missed[1] + loaded[1], missed[0] + loaded[0])
    return replace(report, missed_bytes=both[0], read_bytes=both[1])


def _report(
    trace: Trace,
    slots: Sequence[int],
    scope: str,
    counted: tuple[list[Counts], list[Counts]],
    eviction: str,
    expert_bytes: Sequence[int] | None,
    *,
    predictor: str = NONE,
    prefetch: int = 0,
    pinned: int = 0,
) -> CacheReport:
    sizes = list(expert_bytes) if expert_bytes is not None else [0] * trace.layers
    read_in_prompts = int(np.count_nonzero(np.asarray(trace.prefill_T)))

    def total(prefill: bool, attribute: str) -> int:
        return sum(size * getattr(counts, attribute) for size, counts in zip(sizes, counted[prefill], strict=True))

    return CacheReport(
        eviction,
        predictor,
        scope,
        tuple(int(n) for n in slots),
        prefetch,
        pinned,
        sum(counted[True], Counts()),
        sum(counted[False], Counts()),
        tuple(counted[False]),
        read_in_prompts,
        trace.tokens - read_in_prompts,
        (total(True, "misses"), total(False, "misses")),
        (total(True, "loads"), total(False, "loads")),
    )


def uniform_like(trace: Trace, seed: int = 0) -> Trace:
    """The null: the same passes and slots per token, but experts drawn uniformly without repetition."""
    rng = np.random.default_rng(seed)
    experts_LTK = np.full(trace.experts_LTK.shape, -1, np.int16)
    for layer, n in enumerate(trace.num_experts):
        used_TK = np.asarray(trace.experts_LTK[layer]) >= 0
        k = min(used_TK.shape[1], n)
        drawn_TK = np.argsort(rng.random((trace.tokens, n)), axis=1)[:, :k].astype(np.int16)
        experts_LTK[layer, :, :k] = drawn_TK
        experts_LTK[layer][~used_TK] = -1
    return replace(trace, experts_LTK=experts_LTK, logits_LTE=None, ahead_LTK=None)


def policies() -> list[str]:
    """Every eviction policy that can run live, plainest first: LRU, then by what it needs, its options and its name."""
    rows = [row for row in catalogue() if row["kind"] == "eviction" and "future" not in row["needs"]]
    rows.sort(key=lambda row: (row["name"] != LRU, len(row["needs"]), len(row["options"]), row["name"]))
    return [row["name"] for row in rows]


def pins_of(
    eviction: str, trace: Trace, slots: Sequence[int], scope: str, options: Mapping[str, Any] | None = None
) -> tuple[ExpertKey, ...]:
    """The experts that a policy wants pinned, from the trace's counts; () for policies that pin nothing."""
    cls = load(eviction, "eviction")
    if "counts" not in card_of(cls).needs:
        return ()
    top_k = (np.asarray(trace.experts_LTK) >= 0).sum(-1).max(-1).tolist() if trace.tokens else [1] * trace.layers
    return cls.pins(trace.counts(), slots, scope, top_k, **dict(options or {}))


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every report of a sweep. budgets: bytes (0 without facts) and slots in all, ascending."""

    budgets: tuple[tuple[int, int], ...]
    experts: int
    reports: tuple[CacheReport, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per routing and policy: name and the decode hit rate (prefill's, if nothing was decoded) at each budget."""
        out: dict[tuple[str, str], dict[str, Any]] = {}
        for report in self.reports:
            row = out.setdefault(
                (report.routing, report.eviction), {"routing": report.routing, "eviction": report.eviction, "hit_rate": []}
            )
            row["hit_rate"].append(report.hit_rate)
        return list(out.values())

    def table(self) -> str:
        """For people: decode hit rate and missed MB per token of each policy at each budget."""
        width = 16
        head = "".join(f"{f'{slots} ({100 * slots / self.experts:.0f} %)':>{width}}" for _, slots in self.budgets)
        lines = [f"{'slots':<28}{head}"]
        for routing, eviction in dict.fromkeys((r.routing, r.eviction) for r in self.reports):
            cells = ""
            for r in self.reports:
                if (r.routing, r.eviction) == (routing, eviction):
                    cell = f"{100 * r.hit_rate:.1f} %"
                    if any(r.missed_bytes):
                        cell += f" {r.missed_bytes_per_token(prefill=not r.decode_tokens) / 1e6:.1f} MB"
                    cells += f"{cell:>{width}}"
            lines.append(f"{routing + ' ' + eviction.rsplit('.', 1)[-1]:<28}{cells}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "budgets": [{"bytes": size, "slots": slots} for size, slots in self.budgets],
            "experts": self.experts,
            "reports": [report.to_json() for report in self.reports],
        }


def sweep(
    trace: Trace,
    facts: ModelFacts | None,
    budgets: Sequence[float],
    policies_: Sequence[str] | None = None,
    *,
    scope: str = "global",
    null: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Every policy at every budget, Belady as the bound, and beside it LRU and Belady on uniform random routing.

    Args:
        facts: sizes of the model; may be None when all budgets are shares.
        budgets: of expert memory: up to 1 a share of all experts, above that bytes.
        policies_: catalogue names; all that run live, and Belady, by default.
        scope: 'global', or 'layer' with an equal share of slots per layer.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: a budget below one token's experts of a layer, or bytes without facts.
    """
    from moestro.engine.allocate.uniform import uniform

    experts = sum(trace.num_experts)
    top_k = (
        [max(1, n) for n in (np.asarray(trace.experts_LTK) >= 0).sum(-1).max(-1).tolist()] if trace.tokens else [1] * trace.layers
    )
    sizes = [layer.expert_bytes for layer in facts.layers] if facts else None
    slot = max(sizes) if sizes else 0
    least = max(top_k) if scope == "global" else sum(top_k)
    sized: set[tuple[int, int]] = set()
    for budget in budgets:
        if budget > 1 and not slot:
            raise InputError(f"a budget of {budget:.0f} bytes without a model", fix="give budgets as shares, such as 0.25")
        slots = min(experts, int(budget // slot) if budget > 1 else round(budget * experts))
        if slots < least:
            raise InputError(f"a budget of {budget:g} gives {slots} expert slots", expected=f"at least {least}")
        sized.add((slots * slot, slots))
    names = list(policies_) if policies_ is not None else [*policies(), BELADY]
    runs = [("trace", trace, name) for name in names]
    if null:
        random = uniform_like(trace, seed)
        runs += [("uniform", random, name) for name in (LRU, BELADY)]
    splits = [(slots,) if scope == "global" else uniform(slots, trace.num_experts, top_k) for _, slots in sorted(sized)]
    cached = {routing: Demands(which) for routing, which in {r: t for r, t, _ in runs}.items()}
    pins = {(routing, name): [pins_of(name, which, split, scope) for split in splits] for routing, which, name in runs}
    counted = _count_all(cached, [(routing, name) for routing, _, name in runs if not any(pins[routing, name])], scope, splits)
    reports: list[CacheReport] = []
    for routing, which, name in runs:
        found = counted.get((routing, name))
        for i, split in enumerate(splits):
            if found is not None:
                report = _report(which, split, scope, found[i], name, sizes)
            else:
                pinned = pins[routing, name][i]
                report = replay(which, split, scope, name, pinned=pinned, expert_bytes=sizes, asked=cached[routing])
            reports.append(replace(report, routing=routing))
            if progress:
                progress(len(reports), len(runs) * len(sized))
    return Sweep(tuple(sorted(sized)), experts, tuple(reports))
