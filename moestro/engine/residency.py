"""Plans what stays in memory: spends a budget on runtime, trunk, KV cache, buffers and expert slots, and chooses policies by replay.

`decide` is pure: numbers in, plan out. `plan_residency` measures the numbers on a checkpoint's headers and disk, and loads nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import BudgetError, InputError
from moestro.core.experts import ExpertKey
from moestro.core.layer import ModelFacts
from moestro.core.method import card_of, load
from moestro.core.plan import Subject
from moestro.core.plans.residency import Forecast, Memory, Precision, ResidencyPlan
from moestro.core.trace import Trace
from moestro.engine.allocate.demand import demand, working_set
from moestro.engine.allocate.shallow import shallow
from moestro.engine.allocate.uniform import uniform
from moestro.engine.evict.edgemoe import EdgeMoe
from moestro.engine.forecast import REPEATED, assumed_hit_rate, compute_seconds, forecast, seconds_per_token
from moestro.engine.replay import (
    GATE,
    LRU,
    NONE,
    CacheReport,
    Demands,
    eviction_factory,
    make_predictor,
    pins_of,
    policies,
    replay,
)
from moestro.engine.sizes import format_size, parse_size
from moestro.engine.widths import Widths, fill, split_by_use, split_evenly

if TYPE_CHECKING:
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.layout import Layout

MIB = 1 << 20
CHUNKS = (512, 256, 128, 64, 32)  # tokens per prefill pass, tried from the largest
SHARE = 1 / 6  # of what trunk, runtime and KV cache leave, for buffers: a longer chunk reads each expert less often in prefill
TIE = 0.002  # hit rates closer than this are equal: the simpler setting wins
PAYS = 0.97  # a predictor has to bring decode time below this share
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
MARGIN = 16 * MIB  # what allocators keep beyond what is in use
MEMORY_PROBED = 64 * MIB  # more than caches hold, and less than a small budget
GRAIN = 8 * MIB  # the measured runtime is rounded up to it, so that a budget named once works the next time


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to run the cache. allocation: how per-layer slots were divided, or ''."""

    scope: str
    slots: tuple[int, ...]
    eviction: str
    eviction_options: dict[str, Any] = field(default_factory=dict)
    pinned: tuple[ExpertKey, ...] = ()
    allocation: str = ""
    predictor: str = NONE
    predictor_options: dict[str, Any] = field(default_factory=dict)
    prefetch: int = 0

    def replay(self, trace: Trace, asked: Demands, sizes: Sequence[int], widths: Widths | None = None) -> CacheReport:
        """Count this setting on a trace. sizes: bytes of one expert, per layer; widths: of each, where they differ."""
        return replay(
            trace,
            self.slots,
            self.scope,
            self.eviction,
            eviction_options=self.eviction_options,
            predictor=self.predictor,
            predictor_options=self.predictor_options,
            prefetch=self.prefetch,
            pinned=self.pinned,
            expert_bytes=sizes,
            asked=asked,
            widths=widths,
        )


def buffer_bytes(facts: ModelFacts, *, chunk: int, context: int, batch: int, itemsize: int, mask: bool = True) -> int:
    """What one forward pass needs besides weights and KV cache: activations of `chunk` tokens, expert rows, logits, and transformers' mask."""
    rows, d = max(chunk, batch), facts.d_model
    k = max(layer.top_k for layer in facts.layers)
    width = max(max(layer.spec.d_expert, layer.shared) for layer in facts.layers)
    hidden = rows * d * (8 * itemsize + 16)
    mlp = rows * max(width, 4 * d) * 3 * max(itemsize, 4)
    pairs = rows * k * (4 * d + 24)
    seen = rows * context * (1 + itemsize) if mask else 0
    logits = batch * facts.vocabulary * 4 * 6
    return hidden + mlp + pairs + seen + logits + MARGIN


def decide(
    source: str,
    facts: ModelFacts,
    *,
    memory: int,
    runtime_bytes: int,
    trunk_bytes: int,
    slot_bytes: int,
    disk_rate: float,
    memory_rate: float,
    context: int | None = None,
    batch: int = 1,
    chunk: int | None = None,
    dtype: str = "auto",
    codec: str = "stored",
    extra_bytes: int = 0,
    trace: Trace | None = None,
    scope: str | None = None,
    eviction: str | None = None,
    eviction_options: Mapping[str, Any] | None = None,
    predictor: str | None = None,
    predictor_options: Mapping[str, Any] | None = None,
    prefetch: int | None = None,
    trunk: str = "transformers",
    trunk_codec: str = "stored",
    precision: Precision | None = None,
    widths: Widths | None = None,
) -> ResidencyPlan:
    """The plan for `memory` bytes in all.

    Args:
        source: where the model was found. runtime_bytes: of the process before any weight. trunk_bytes: in memory.
        slot_bytes: of one expert's slot. extra_bytes: what the store needs besides slots.
        disk_rate, memory_rate: bytes/s, for the forecast and for whether a predictor pays.
        context: tokens of KV cache per sequence, at most the model's own; 2048 by default. batch: sequences.
        chunk: tokens per prefill pass; by default the largest power of two up to 512 whose buffers stay small.
        trace: of this model; policies are chosen by replaying it. Without one: the next layer's router predicts, LRU evicts
            or, with so few slots that it could never hit, EdgeMoE's rule; slots shared or per layer, whichever does better on
            assumed routings.
        scope, eviction, predictor, prefetch and options: chosen by the caller, not here.
        trunk: 'native' or 'transformers'. codec, trunk_codec, precision: as the plan says them.
        widths: sizes of the experts, where `precision` gives them different ones: slots may then be as large as the widths need.

    Raises:
        BudgetError: the budget cannot hold the trunk and the experts of one token's layer; `.smallest` can.
        InputError: a name, an option or a number that cannot be. TraceError: a trace of another model.
    """
    _check(facts, context, batch, chunk, dtype, scope, widths)
    if trace is not None:
        trace.check_model(facts.fingerprint)
        if not trace.tokens:
            raise InputError("the trace holds no tokens", fix="record a longer one, or plan without it")
    itemsize = ITEMSIZE[facts.dtype if dtype == "auto" else dtype]
    context = min(context or 2048, facts.context)
    kv_cache = facts.kv_values_per_token * context * batch * itemsize
    top_k = [layer.top_k for layer in facts.layers]
    if scope == "width":
        least_bytes = sum(n * size for n, size in zip(widths.least_W(top_k), widths.slot_bytes_W))  # type: ignore[union-attr]
    else:
        least_bytes = (sum(top_k) if scope == "layer" else max(top_k)) * slot_bytes

    def buffers_of(chunk: int) -> int:
        masked = trunk == "transformers"
        return buffer_bytes(facts, chunk=chunk, context=context, batch=batch, itemsize=itemsize, mask=masked) + extra_bytes

    fixed = runtime_bytes + trunk_bytes + kv_cache
    if chunk is None:
        left = memory - fixed
        fits = [c for c in CHUNKS if buffers_of(c) - MARGIN <= SHARE * left and buffers_of(c) + least_bytes <= left]
        chunk = fits[0] if fits else CHUNKS[-1]
    buffers = buffers_of(chunk)
    smallest = fixed + buffers + least_bytes
    if memory < smallest:
        raise BudgetError(
            f"{format_size(memory)} cannot hold this model: runtime {format_size(runtime_bytes)}, trunk {format_size(trunk_bytes)}, "
            f"KV cache {format_size(kv_cache)}, buffers {format_size(buffers)} and one token's experts {format_size(least_bytes)}",
            smallest=smallest,
            expected=f"at least {format_size(smallest)}",
            fix=f"--memory {format_size(smallest)}" + (", or a smaller --context" if kv_cache > smallest // 10 else ""),
        )
    total = sum(layer.num_experts for layer in facts.layers)
    left = memory - fixed - buffers
    capacity = min(total, left // slot_bytes)
    asked = _named(eviction, eviction_options, predictor, predictor_options, facts)
    room = None if widths is None else _Room(left, widths)
    chosen, report = _choose(facts, capacity, scope, asked, prefetch, trace, trunk_bytes, disk_rate, memory_rate, trunk, room)
    if chosen.scope == "width":
        experts = sum(n * size for n, size in zip(chosen.slots, widths.slot_bytes_W, strict=True))  # type: ignore[union-attr]
    else:
        experts = sum(chosen.slots) * slot_bytes
    spent = Memory(memory, runtime_bytes, trunk_bytes, kv_cache, buffers, experts)
    options: dict[str, Any] = {"memory": memory, "context": context, "batch": batch, "chunk": chunk}
    if chosen.allocation:
        options["allocation"] = chosen.allocation
    plan = ResidencyPlan(
        subjects=(Subject(source, facts.fingerprint),),
        method="engine.residency",
        options=options,
        inputs={} if trace is None else {"trace": _digest(trace)},
        memory=spent,
        scope=chosen.scope,
        slots=chosen.slots,
        eviction=chosen.eviction,
        predictor=chosen.predictor,
        eviction_options=chosen.eviction_options,
        predictor_options=chosen.predictor_options,
        pinned=chosen.pinned,
        codec=codec,
        dtype=dtype,
        context=context,
        batch=batch,
        chunk=chunk,
        prefetch=chosen.prefetch,
        trunk=trunk,
        trunk_codec=trunk_codec,
        precision=precision,
        forecast=_forecast(facts, chosen, report, sum(chosen.slots) == total, trunk_bytes, disk_rate, memory_rate, trunk, widths),
    )
    plan.check(facts)
    return plan


def _check(
    facts: ModelFacts, context: int | None, batch: int, chunk: int | None, dtype: str, scope: str | None, widths: Widths | None
) -> None:
    if dtype != "auto" and dtype not in ITEMSIZE:
        raise InputError(f"dtype is {dtype!r}", expected="auto, " + ", ".join(ITEMSIZE))
    if scope not in (None, "global", "layer", "width"):
        raise InputError(f"scope is {scope!r}", expected="'global', 'layer' or 'width'")
    if scope == "width" and widths is None:
        raise InputError("scope is 'width', and the experts have one width", expected="'global' or 'layer'")
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}", expected="at least 1")
    if not facts.layers:
        raise InputError("this model has no routed experts", expected="a Mixture-of-Experts model")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the caller has chosen: full names, or None."""

    eviction: str | None
    eviction_options: dict[str, Any]
    predictor: str | None
    predictor_options: dict[str, Any]


def _named(
    eviction: str | None,
    eviction_options: Mapping[str, Any] | None,
    predictor: str | None,
    predictor_options: Mapping[str, Any] | None,
    facts: ModelFacts,
) -> _Asked:
    """Short names become full ones; impossible names and options are refused here."""
    if eviction is not None:
        eviction = card_of(load(eviction, "eviction")).name
        eviction_factory(eviction, eviction_options)(max(la.top_k for la in facts.layers), len(facts.layers))
    elif eviction_options:
        raise InputError("eviction options without an eviction policy", fix="name the policy")
    if predictor is not None:
        predictor = card_of(load(predictor, "predictor")).name
        make_predictor(predictor, len(facts.layers), tuple(la.num_experts for la in facts.layers), predictor_options)
    elif predictor_options:
        raise InputError("predictor options without a predictor", fix="name the predictor")
    return _Asked(eviction, dict(eviction_options or {}), predictor, dict(predictor_options or {}))


def _settings(
    facts: ModelFacts, capacity: int, scope: str | None, asked: _Asked, trace: Trace | None
) -> tuple[list[Setting], list[Setting]]:
    """What is worth trying, the simplest first: LRU before others, one shared pool before slots per layer.

    The second list divides the slots among layers by other rules than evenly; only its settings with the policy that did best
    with even slots need a try.
    """
    experts, top_k = [la.num_experts for la in facts.layers], [la.top_k for la in facts.layers]
    # With no more slots than a token's other layers use, LRU evicts everything just before it is needed again: no hit at all.
    usual = LRU if capacity > sum(top_k) - max(top_k) else card_of(EdgeMoe).name
    names = [asked.eviction] if asked.eviction else policies() if trace is not None else [usual]

    def made(where: str, slots: tuple[int, ...], allocation: str = "") -> list[Setting]:
        out = []
        for name in names:
            pins: tuple[ExpertKey, ...] = ()
            if trace is not None:
                pins = pins_of(name, trace, slots, where, asked.eviction_options)
            elif "counts" in card_of(load(name, "eviction")).needs:
                raise InputError(f"{name} pins what a trace used most, and there is no trace", fix="give one with --trace")
            out.append(Setting(where, slots, name, asked.eviction_options, pins, allocation))
        return out

    even, uneven = [], []
    if scope != "layer":
        even += made("global", (capacity,))
    if scope != "global" and capacity >= sum(top_k):
        even += made("layer", uniform(capacity, experts, top_k), card_of(uniform).name)
        if trace is not None:
            uneven += made("layer", demand(capacity, experts, top_k, working_set(trace)), card_of(demand).name)
            uneven += made("layer", shallow(capacity, experts, top_k), card_of(shallow).name)
    return even, uneven


def _choose(
    facts: ModelFacts,
    capacity: int,
    scope: str | None,
    asked: _Asked,
    prefetch: int | None,
    trace: Trace | None,
    trunk_bytes: int,
    disk_rate: float,
    memory_rate: float,
    trunk: str,
    room: _Room | None,
) -> tuple[Setting, CacheReport | None]:
    """The setting, and its replay if there is a trace."""
    sizes, top_k = [la.expert_bytes for la in facts.layers], max(la.top_k for la in facts.layers)
    total = sum(la.num_experts for la in facts.layers)
    by_width = [] if room is None or (scope or "width") != "width" else room.settings(facts, asked, trace)
    if scope == "width" and not by_width:
        raise InputError(
            f"{asked.eviction} pins experts, whatever their widths", expected="another policy, or scope 'global' or 'layer'"
        )
    settings, uneven = ([], []) if scope == "width" else _settings(facts, capacity, scope, asked, trace)
    if prefetch == 0 or (prefetch is None and asked.predictor == NONE):
        asked = replace(asked, predictor=NONE, predictor_options={})
    fixed = None
    if asked.predictor is not None:
        width = 0 if asked.predictor == NONE else prefetch or top_k
        fixed = {"predictor": asked.predictor, "predictor_options": asked.predictor_options, "prefetch": width}
    if trace is None:
        whole = next((s for s in (*settings, *by_width) if sum(s.slots) == total), None)
        if whole is not None:
            return replace(whole, **(fixed or {})), None
        best = _by_assumption(facts, [*settings, *by_width], None if room is None else room.widths)
        return replace(best, **(fixed or {"predictor": GATE, "prefetch": prefetch or top_k})), None
    demands, widths = Demands(trace), None if room is None else room.widths
    if capacity == total and settings:  # all policies are the same
        settings, uneven, by_width = settings[:1], [], []
    reports = [setting.replay(trace, demands, sizes) for setting in settings]
    layered = [(report.hit_rate, setting.eviction) for setting, report in zip(settings, reports) if setting.scope == "layer"]
    if layered:
        more = [setting for setting in uneven if setting.eviction == max(layered)[1]]
        settings = [*settings, *more]
        reports += [setting.replay(trace, demands, sizes) for setting in more]
    best = max((report.hit_rate for report in reports), default=0.0)
    number = next((i for i, report in enumerate(reports) if report.hit_rate >= best - TIE), None)
    # Hits are not alike where experts differ in size: what counts is what has to be read.
    tried = [*settings[number : number + 1], *by_width] if widths is not None and number is not None else by_width
    if tried:
        exact = [setting.replay(trace, demands, sizes, widths) for setting in tried]
        least_bytes = min(report.missed_bytes_per_token() for report in exact)
        number = next(i for i, report in enumerate(exact) if report.missed_bytes_per_token() * PAYS <= least_bytes)
        settings, reports = tried, exact
    assert number is not None, "there is a setting"
    chosen, report = settings[number], reports[number]
    if fixed is not None:
        chosen = replace(chosen, **fixed)
        return chosen, chosen.replay(trace, demands, sizes, widths) if chosen.prefetch else report
    compute = compute_seconds(facts, trunk_bytes, memory_rate, trunk)
    least = PAYS * seconds_per_token(report, compute, disk_rate)
    if not report.decode_tokens or not report.missed_bytes_per_token():
        return chosen, report
    names = ["engine.predict.previous", "engine.predict.edgemoe"] + [GATE] * (trace.ahead_LTK is not None)
    plain = chosen
    for name in names:
        for width in [prefetch] if prefetch else sorted({max(1, top_k // 2), top_k}):
            candidate = replace(plain, predictor=name, prefetch=width)
            found = candidate.replay(trace, demands, sizes, widths)
            if (seconds := seconds_per_token(found, compute, disk_rate)) < least:
                chosen, report, least = candidate, found, seconds
    if chosen is plain and trace.ahead_LTK is None:  # the trace cannot say, so the engine finds out while it runs
        chosen = replace(plain, predictor=GATE, prefetch=prefetch or top_k)
    return chosen, report


@dataclass(frozen=True, slots=True)
class _Room:
    """Bytes for experts that differ in size."""

    nbytes: int
    widths: Widths

    def settings(self, facts: ModelFacts, asked: _Asked, trace: Trace | None) -> list[Setting]:
        """Slots as large as each width needs: of every width the same share and, with a trace, as its uses of the experts say, and halfway."""
        top_k = [la.top_k for la in facts.layers]
        low_W = self.widths.least_W(top_k)
        if sum(n * size for n, size in zip(low_W, self.widths.slot_bytes_W)) > self.nbytes:
            return []
        names = [asked.eviction] if asked.eviction else [LRU, card_of(EdgeMoe).name]
        if any("counts" in card_of(load(name, "eviction")).needs for name in names):
            return []  # what it pins is not chosen by width
        splits = [split_evenly(self.nbytes, self.widths, low_W)]
        if trace is not None:
            splits.append(split_by_use(self.nbytes, self.widths, low_W, trace.counts()))
            splits.append(fill(self.nbytes, self.widths, low_W, np.sum(splits, axis=0)))  # halfway
        return [Setting("width", slots, name, asked.eviction_options) for slots in dict.fromkeys(splits) for name in names]


def _by_assumption(facts: ModelFacts, settings: Sequence[Setting], widths: Widths | None = None) -> Setting:
    """The setting with the best mean hit rate over the two assumed routings, uniform and repeating; the simpler one on a tie."""
    if len(settings) == 1:
        return settings[0]
    rates = [
        sum(
            assumed_hit_rate(facts, s.scope, s.slots, s.eviction, s.eviction_options, repeated=p, widths=widths)
            for p in (0.0, REPEATED)
        )
        / 2
        for s in settings
    ]
    return next(s for s, rate in zip(settings, rates, strict=True) if rate >= max(rates) - TIE)


def _forecast(
    facts: ModelFacts,
    chosen: Setting,
    report: CacheReport | None,
    whole: bool,
    trunk_bytes: int,
    disk_rate: float,
    memory_rate: float,
    trunk: str,
    widths: Widths | None,
) -> Forecast:
    """Hit rates from uniform routing to the trace's; without a trace to that of routing that repeats 60 % of the experts."""
    rates: dict[str, Any] = {"trunk_bytes": trunk_bytes, "disk_rate": disk_rate, "memory_rate": memory_rate, "trunk": trunk}
    if whole:
        return forecast(facts, (1.0, 1.0), expert_bytes=facts.active_expert_bytes, **rates)
    # Pins and predictors were fitted to the trace; on other routing they are worth nothing, so the low end goes without.
    eviction = chosen.eviction if not chosen.pinned else LRU
    options = chosen.eviction_options if not chosen.pinned else {}
    low = assumed_hit_rate(facts, chosen.scope, chosen.slots, eviction, options, repeated=0.0, widths=widths)
    if report is not None and report.decode_tokens:
        # A prefetched expert has been read all the same, so what counts for the disk is what was read, not what hit.
        read = report.read_bytes_per_token()
        high = 1 - read / max(1, facts.active_expert_bytes)
        return forecast(
            facts,
            (low, max(low, high)),
            expert_bytes=facts.active_expert_bytes,
            hit_rate=report.decode.hit_rate,
            missed_bytes_per_token=read,
            **rates,
        )
    high = assumed_hit_rate(facts, chosen.scope, chosen.slots, eviction, options, repeated=REPEATED, widths=widths)
    return forecast(facts, (low, max(low, high)), expert_bytes=facts.active_expert_bytes, **rates)


def _digest(trace: Trace) -> str:
    digest = hashlib.sha256(trace.model.encode())
    for array in (trace.steps_T, trace.prefill_T, trace.experts_LTK):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def plan_residency(
    checkpoint: Checkpoint,
    layout: Layout,
    memory: int | str,
    *,
    trace: Trace | None = None,
    dtype: str = "auto",
    codec: str = "stored",
    trunk_codec: str = "stored",
    precision: Precision | None = None,
    runtime_bytes: int | None = None,
    disk_rate: float | None = None,
    memory_rate: float | None = None,
    trunk: str = "auto",
    **options: Any,
) -> ResidencyPlan:
    """The plan for a checkpoint, from its headers and from measured rates; loads nothing.

    Args:
        memory: bytes, or '2GiB'.
        trace: of this model; policies are chosen by replaying it.
        dtype: of the trunk; 'auto' is the checkpoint's own.
        codec: how a packed store is to keep the experts; 'stored' reads the checkpoint itself, 'mixed' does as `precision` says.
        trunk_codec: how the native trunk's matrices are kept. precision: bits expert by expert.
        runtime_bytes: of the process once its libraries are in; measured by importing them if not given.
        disk_rate, memory_rate: bytes/s; measured if not given, the disk with reads as large as the experts' own.
        trunk: 'native', 'transformers', or 'auto' for the native one where it computes this checkpoint.
        options: as `decide` takes them.

    Raises: as `decide` and `choose_trunk`; UnsupportedModel for experts that no store can hold.
    """
    from moestro.engine import memory as accounting
    from moestro.engine.native import choose_trunk
    from moestro.engine.store import SourceStore, pages
    from moestro.kernels import bandwidth
    from moestro.kernels.reader import probe
    from moestro.models.codecs.encode import parse_trunk_codec
    from moestro.models.native import describe
    from moestro.models.native.weights import trunk_bytes as coded_bytes

    facts = layout.facts
    if dtype != "auto" and dtype not in ITEMSIZE:
        raise InputError(f"dtype is {dtype!r}", expected="auto, " + ", ".join(ITEMSIZE))
    trunk = choose_trunk(checkpoint, layout, trunk, dtype)
    coder = parse_trunk_codec(trunk_codec)
    if coder is not None and trunk != "native":
        raise InputError(
            f"the trunk is to be kept as {trunk_codec}, and this is the {trunk} trunk",
            expected="the native trunk, which computes with quantised weights",
            fix="leave the trunk as stored",
        )
    store, widths = SourceStore(checkpoint, layout), None
    slot_bytes, extra_bytes = store.slot_bytes, store.extra_bytes
    first = layout.parts(ExpertKey(0, 0))
    if codec != "stored":
        sizes_LE = expert_sizes(checkpoint, layout, codec, precision)
        slot_bytes, extra_bytes = pages(max(max(row) for row in sizes_LE)), 0
        if precision is not None and len(set(itertools.chain(*sizes_LE))) > 1:
            found = Widths.of(precision.experts_LE, sizes_LE)
            widths = found if len(found.experts_W) == len(precision.widths) and all(found.experts_W) else None
        means = [sum(row) // len(row) for row in sizes_LE]
        facts = replace(facts, layers=tuple(replace(la, expert_bytes=n) for la, n in zip(facts.layers, means, strict=True)))
    if disk_rate is None:
        disk_rate = probe(first[0].file, max(part.nbytes for part in first))
    if runtime_bytes is None:
        runtime_bytes = accounting.runtime_bytes(torch=trunk == "transformers")
    trunk_bytes = facts.trunk_bytes
    if coder is not None:
        trunk_bytes = coded_bytes(checkpoint, layout.trunk, describe(checkpoint, layout), coder)
    elif trunk == "transformers":  # it holds every weight in the dtype it runs in; the native trunk keeps them as stored
        itemsize = ITEMSIZE[facts.dtype if dtype == "auto" else dtype]
        trunk_bytes = sum(math.prod(checkpoint.tensors[name].shape) * itemsize for name in layout.trunk)
    return decide(
        checkpoint.source,
        facts,
        memory=parse_size(memory),
        runtime_bytes=-(-runtime_bytes // GRAIN) * GRAIN,
        trunk_bytes=trunk_bytes,
        slot_bytes=slot_bytes,
        disk_rate=disk_rate,
        memory_rate=bandwidth.probe(nbytes=MEMORY_PROBED) if memory_rate is None else memory_rate,
        dtype=dtype,
        codec=codec,
        extra_bytes=extra_bytes,
        trace=trace,
        trunk=trunk,
        trunk_codec=trunk_codec,
        precision=precision,
        widths=widths,
        **options,
    )


def expert_sizes(checkpoint: Checkpoint, layout: Layout, codec: str, precision: Precision | None = None) -> list[list[int]]:
    """Bytes to read for each expert of each layer from a packed store. Raises InputError for a codec that does not fit."""
    from moestro.engine.pack import codecs_of
    from moestro.engine.store import MIXED
    from moestro.models.codecs.encode import parse_codec
    from moestro.models.codecs.packed import Record

    held = codecs_of(checkpoint, layout, codec, precision if codec == MIXED else None)
    out = []
    for layer in layout.facts.layers:
        keys = [ExpertKey(layer.ordinal, e) for e in range(layer.num_experts)]
        records = {codec: Record.of(layer.spec, codec) for codec in {held[key] for key in keys}}
        planes = [0 if precision is None or codec == MIXED else parse_codec(precision.width(key)).planes for key in keys]
        out.append([records[held[key]].size(p) for key, p in zip(keys, planes, strict=True)])
    return out
