"""Plans that give bits: the encodings of experts, one for all or expert by expert, and of the trunk, and what they leave as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from moestro.compress.calibration import RARE, Calibration
from moestro.compress.dropping import lost_tensors
from moestro.compress.evidence import BitsEvidence, EvidenceFile, Progress, expert_size, measure, sampled
from moestro.compress.guard import guarded, spared
from moestro.compress.smooth.smoothing import touched
from moestro.compress.stats import layer_stats
from moestro.compress.trunk import TrunkMatrices, plain_matrices, trunk_matrices
from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.method import Card, card_of, check_options, load
from moestro.core.plan import Subject
from moestro.core.plans.compression import STORED, CompressionPlan, Encoding, LayerChange, Slot
from moestro.core.plans.residency import Precision
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import coded_bytes
from moestro.models.codecs.encode import parse_codec
from moestro.models.families.resize import router_tensors
from moestro.models.layout import Layout
from moestro.profile.profile import Profile


def blank(checkpoint: Checkpoint, layout: Layout, method: str, **fields: Any) -> CompressionPlan:
    """A plan that keeps every expert as it is."""
    layers = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in range(la.num_experts))) for la in layout.facts.layers)
    size = layout.facts.expert_bytes
    subjects = (Subject(checkpoint.source, layout.facts.fingerprint),)
    return CompressionPlan(subjects=subjects, method=method, layers=layers, sizes=(size, size), **fields)


def encode_experts(
    plan: CompressionPlan,
    layout: Layout,
    method: str,
    codecs_LE: str | Sequence[Sequence[str]],
    options: Mapping[str, Any] | None = None,
) -> CompressionPlan:
    """One more encoding for every slot, chained where the method reads inputs. codecs_LE: one codec for all, or one for each slot of each
    layer.

    Raises InputError for a codec that is unknown or does not divide the rows.
    """
    rows = [[codecs_LE] * len(la.slots) for la in plan.layers] if isinstance(codecs_LE, str) else [list(row) for row in codecs_LE]
    assert [len(row) for row in rows] == [len(la.slots) for la in plan.layers], "a codec for each slot"
    numbers = {codec: len(plan.encodings) + i for i, codec in enumerate(dict.fromkeys(codec for row in rows for codec in row))}
    layers = tuple(
        replace(la, slots=tuple(replace(s, encodings=(*s.encodings, numbers[c])) for s, c in zip(la.slots, row, strict=True)))
        for la, row in zip(plan.layers, rows, strict=True)
    )
    card = card_of(load(method))
    chained = card.kind == "encode" and "inputs" in card.needs
    encodings = (*plan.encodings, *(Encoding(method, codec, dict(options or {}), chained) for codec in numbers))
    made = replace(plan, layers=layers, encodings=encodings)
    return replace(made, sizes=(plan.sizes[0], expert_bytes(made, layout)))


def encode_trunk(
    plan: CompressionPlan, trunk: TrunkMatrices, *, inner: tuple[str, str] | None, outer: tuple[str, str] | None
) -> CompressionPlan:
    """inner: method and codec of attention, shared experts and dense layers; outer: of embedding and head; None leaves them as stored.

    What is left as it is stored is stated by name or, where it is many, by their number.
    """
    encodings, tensors = list(plan.encodings), dict(plan.tensors)
    left = [*trunk.left, *(n for n in trunk.unloaded if not any(fnmatch(n, pattern) for pattern in plan.dropped)), *trunk.kept]
    for names, wanted in ((trunk.inner, inner), (trunk.outer, outer)):
        if wanted is None:
            left += names
            continue
        tensors |= dict.fromkeys(names, (len(encodings),))
        encodings.append(Encoding(*wanted))
    text = f"{len(left)} matrices stay as they are stored: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}"
    return replace(plan, encodings=tuple(encodings), tensors=tensors, stated=(*plan.stated, *([text] if left else [])))


def expert_bytes(plan: CompressionPlan, layout: Layout) -> int:
    """Of all routed experts, each slot counted as often as the file holds it."""
    total = 0
    for la in plan.layers:
        facts = layout.facts.layers[la.ordinal]
        spec = facts.spec
        width = plan.width(layout.facts)
        shapes = [(width, spec.d_model)] * (2 if spec.gated else 1) + [(spec.d_model, width)]
        for row in la.routed:
            numbers = la.slots[row.slot].encodings
            codec = plan.encodings[numbers[-1]].codec if numbers else STORED
            if codec == STORED:
                total += facts.expert_bytes * width // spec.d_expert
            else:
                total += sum(coded_bytes(codec, shape) for shape in shapes)
    return total


@dataclass(frozen=True, slots=True)
class BitsWish:
    """What is asked for. method: of kind 'encode', with options. codecs: one, or widths to choose from, the fewest bytes first.

    bits: average bits of an expert's weight, scales included, where there are several; budget: what chooses, with options.
    trunk, ends: codecs of the trunk's inner matrices and of embedding and head, rounded to nearest; 'stored' leaves them.
    chosen: instead of codecs, what gives each expert its own, such as the bisection of `moestro plan residency --quality`.
    smooth, router: methods of kind 'smooth' and 'encode_router' that come first, with options; '' for none.
    dropped: patterns of tensors that the model does not load and that are left out.
    protect: Super Experts, where the profile looked for them, get the widest of several codecs; with one codec the plan says they change.
    """

    method: str
    codecs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: float | None = None
    budget: str = "compress.budget.mc_moe"
    budget_options: Mapping[str, Any] = field(default_factory=dict)
    trunk: str = STORED
    ends: str = STORED
    smooth: str = ""
    smooth_options: Mapping[str, Any] = field(default_factory=dict)
    router: str = ""
    router_options: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    chosen: Precision | None = None
    protect: bool = True


@dataclass(frozen=True, slots=True)
class BitsPlan:
    """plan: what will be done. plain: matrices that it leaves as they are stored. unseen: experts that no kept token was routed to."""

    plan: CompressionPlan
    plain: tuple[str, ...]
    unseen: tuple[ExpertKey, ...]


def plan_bits(
    checkpoint: Checkpoint,
    layout: Layout,
    wish: BitsWish,
    *,
    profile: Profile | None = None,
    profile_path: str = "",
    base: CompressionPlan | None = None,
    evidence: Path | None = None,
    progress: Progress | None = None,
) -> BitsPlan:
    """Give every expert and the trunk their bits. base: a plan to go on from. evidence: a file that keeps what each of several widths
    does to each expert, layer by layer, for a call that is stopped and for other bits.

    Raises InputError for a wish that cannot be fulfilled, ProfileError for a profile of another model or without a layer, PlanError
    when `base` is of another model.
    """
    card = _known(wish.method, "encode", wish.options)
    _known(wish.budget, "bits", wish.budget_options)
    if profile is not None:
        layer_stats(profile, layout.facts.fingerprint, len(layout.facts.layers))
    given = Calibration(profile, layout.facts) if profile is not None and "kept_x_LND" in profile.arrays else None
    if given is None and ("inputs" in card.needs or (len(wish.codecs) > 1 and wish.chosen is None) or wish.smooth or wish.router):
        what = card.name if "inputs" in card.needs else wish.smooth or wish.router or "choosing bits"
        raise InputError(
            f"{what} needs the inputs of the experts", fix="moestro profile MODEL DATA --probe inputs -o FILE, and --profile FILE"
        )
    codecs = tuple(parse_codec(codec).name for codec in (wish.codecs if wish.chosen is None else wish.chosen.widths))
    for la in layout.facts.layers:
        for codec in codecs:
            expert_size(la.spec, codec)  # raises where a codec does not fit
    plan = base or blank(checkpoint, layout, card.name)
    plan.check(layout.facts)
    asked = {"codec": ",".join(codecs), "bits": wish.bits, "trunk": wish.trunk, "ends": wish.ends, **wish.options}
    plan = replace(
        plan,
        method=card.name if base is None else f"{base.method} > {card.name}",
        options=asked if base is None else {**base.options, card.name: asked},
        inputs={**plan.inputs, **({"profile": profile.data} if profile is not None else {})},
        profile=profile_path or plan.profile,
        dropped=tuple(dict.fromkeys((*plan.dropped, *wish.dropped))),
    )
    lost_tensors(plan.dropped, layout)
    if wish.chosen is not None and wish.bits is not None:
        raise InputError("the bits are chosen already", expected="no --bits with --widths")
    if wish.chosen is None and (wish.bits is None) != (len(codecs) == 1):
        raise InputError(
            "the average bits are " + ("not said" if wish.bits is None else "said, and there is one codec"),
            expected="several codecs with --bits, or one without",
        )
    plan = _smoothed(plan, checkpoint, layout, wish)
    sought = profile is not None and wish.protect and "output_most_LE" in profile.arrays
    protected = guarded(profile)[0] if profile is not None and sought else ()
    if wish.chosen is not None:
        plan = _chosen(plan, layout, wish.chosen, card.name, wish.options)
    elif wish.bits is None:
        plan = encode_experts(plan, layout, card.name, codecs[0], wish.options)
    else:
        assert given is not None
        if any(len(s.sources) > 1 or s.neurons for la in plan.layers for s in la.slots):
            raise InputError(
                "the plan to start from merges or slims experts",
                expected="one that removes experts at most",
                fix="give one codec",
            )
        assert profile is not None
        told = {"model": layout.facts.fingerprint, "weights": sampled(checkpoint, layout, profile), "profile": profile.data}
        told |= {"method": card.name, "options": dict(wish.options), "widths": codecs}
        kept = None if evidence is None else EvidenceFile(evidence, told)
        seen = measure(checkpoint, layout, given, codecs, card.name, options=wish.options, kept=kept, progress=progress)
        plan = _mixed(plan, layout, wish, card.name, codecs, seen, protected)
    if wish.bits is None:
        plan = spared(plan, plan, protected, sparing=False)
    found = trunk_matrices(checkpoint, layout)
    inner, outer = (None if codec == STORED else ("compress.encode.rtn", codec) for codec in (wish.trunk, wish.ends))
    plan = encode_trunk(plan, found, inner=inner, outer=outer)
    rare = given.rare() if given is not None and "inputs" in card.needs else {}
    if rare:
        some = ", ".join(f"layer {k.layer} expert {k.expert} ({n})" for k, n in list(rare.items())[:8])
        text = f"{len(rare)} experts saw fewer than {RARE} of the kept tokens and are fitted to their layer's inputs for the most part: {some}"
        plan = replace(plan, stated=(*plan.stated, text + (", ..." if len(rare) > 8 else "")))
    return BitsPlan(plan, plain_matrices(found, plan), tuple(key for key, n in rare.items() if n == 0))


def _chosen(plan: CompressionPlan, layout: Layout, chosen: Precision, method: str, options: Mapping[str, Any]) -> CompressionPlan:
    """Every expert in the codec that it was given elsewhere."""
    if any(len(s.sources) > 1 or s.neurons for la in plan.layers for s in la.slots):
        raise InputError("the plan to start from merges or slims experts, and the bits were chosen for whole ones")
    rows = [[chosen.width(ExpertKey(la.ordinal, slot.sources[0])) for slot in la.slots] for la in plan.layers]
    made = encode_experts(plan, layout, method, rows, options)
    return replace(made, stated=(*made.stated, f"{chosen.method} chose, of the original rounded to nearest: {chosen.summary()}"))


def _known(name: str, kind: str, options: Mapping[str, Any]) -> Card:
    """The method's card. Raises InputError for an option that it does not have."""
    card = card_of(load(name, kind))
    check_options(card, options, beside=("codec",))
    return card


def _smoothed(plan: CompressionPlan, checkpoint: Checkpoint, layout: Layout, wish: BitsWish) -> CompressionPlan:
    """With what comes before rounding: scales of the layers' inputs, and routers on a grid."""
    if wish.smooth:
        card = _known(wish.smooth, "smooth", wish.smooth_options)
        if wish.bits is not None:
            raise InputError("bits are chosen by errors without smoothing", expected="one codec with --smooth, or no --smooth")
        if any(s.encodings for la in plan.layers for s in la.slots):
            raise InputError("the plan to start from encodes its experts already", fix="smooth in the first plan that encodes")
        touched(checkpoint, layout)  # raises where it cannot be
        plan = encode_experts(plan, layout, card.name, STORED, wish.smooth_options)
        plan = replace(plan, options={**plan.options, "smooth": card.name})
    if wish.router:
        card = _known(wish.router, "encode_router", wish.router_options)
        names = [n for la in plan.layers for n in router_tensors(checkpoint, layout, la.ordinal) if n.endswith("weight")]
        encodings = (*plan.encodings, Encoding(card.name, STORED, dict(wish.router_options)))
        plan = replace(
            plan,
            encodings=encodings,
            tensors={**plan.tensors, **dict.fromkeys(names, (len(plan.encodings),))},
            options={**plan.options, "router": card.name},
        )
    return plan


def _mixed(
    plan: CompressionPlan,
    layout: Layout,
    wish: BitsWish,
    method: str,
    codecs: tuple[str, ...],
    evidence: BitsEvidence,
    protected: tuple[ExpertKey, ...],
) -> CompressionPlan:
    """Bits within the budget; the protected experts have the widest codec first, and the others share what is left."""
    choose = load(wish.budget, "bits")
    kept_LE, safe_LE = np.zeros((2, *evidence.there_LE.shape), bool)
    for la in plan.layers:
        kept_LE[la.ordinal, [slot.sources[0] for slot in la.slots]] = True
    for key in protected:
        safe_LE[key] = kept_LE[key]
    weights = sum(len(la.slots) * matrix_weights(layout.facts.layers[la.ordinal].spec) for la in plan.layers)
    reserved = int((safe_LE.sum(1) * evidence.bytes_LW[:, -1]).sum())
    others = replace(evidence, there_LE=kept_LE & ~safe_LE)
    widths_LE = np.array(choose(others, int((wish.bits or 0) * weights / 8) - reserved, **wish.budget_options))
    widths_LE[safe_LE] = len(codecs) - 1
    rows = [[codecs[widths_LE[la.ordinal, slot.sources[0]]] for slot in la.slots] for la in plan.layers]
    made = encode_experts(plan, layout, method, rows, wish.options)
    spent = 8 * replace(evidence, there_LE=kept_LE).spent(widths_LE) / weights
    counts = ", ".join(f"{sum(row.count(codec) for row in rows)} experts {codec}" for codec in codecs)
    stated = f"{card_of(choose).name} gives {counts}: {spent:.3f} bits per weight of {wish.bits} allowed"
    safe = tuple(ExpertKey(*map(int, at)) for at in np.argwhere(safe_LE))
    return replace(made, stated=(*made.stated, stated), protected=tuple(dict.fromkeys((*made.protected, *safe))))


def matrix_weights(spec: ExpertSpec) -> int:
    """Weights of one expert's matrices, without biases."""
    return (3 if spec.gated else 2) * spec.d_model * spec.d_expert
