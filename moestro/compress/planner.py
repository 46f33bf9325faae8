"""Makes CompressionPlans: a method of any kind, its options and a profile in; slots, router rows, sizes and what to know out.

A plan may start from another one (`base`): the method then sees that plan's experts, and both become one plan.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moestro.compress.bits import encode_experts, encode_trunk, expert_bytes
from moestro.compress.choosing import choose, least
from moestro.compress.dropping import lost_tensors
from moestro.compress.guard import guarded, spared
from moestro.compress.merging import Merging, merged_layer
from moestro.compress.sampling import LayerSample
from moestro.compress.skipping import with_taps
from moestro.compress.slimming import slimmed
from moestro.compress.stats import LayerStats, layer_stats
from moestro.compress.trunk import trunk_matrices
from moestro.core.errors import InputError, PlanError
from moestro.core.experts import ExpertKey
from moestro.core.method import card_of, catalogue, check_options, load
from moestro.core.plan import Subject
from moestro.core.plans.compression import STORED, CompressionPlan, LayerChange, Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import parse_codec
from moestro.models.layout import Layout
from moestro.profile.coverage import coverage
from moestro.profile.profile import Profile

KINDS = ("criterion", "search", "group", "neurons", "sparsify", "share", "encode", "skip")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for beside the method. keep: experts per layer (with kind 'neurons': neurons per expert); ratio: the share to remove.

    One of them is needed by kinds that remove something. budget, fuse, align, router: see the planners of the kinds. codec: of kind
    'encode'; trunk_codec: of everything else, rounded to nearest. protect: keep Super Experts. options: the method's own.
    """

    keep: int | None = None
    ratio: float | None = None
    budget: str = "uniform"
    fuse: str = "frequency"
    align: bool = True
    router: str = "dominant"
    codec: str = STORED
    trunk_codec: str | None = None
    protect: bool = True
    dropped: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def kept(self, of: int, multiple: int = 1) -> int:
        """How many of `of` stay; a ratio is rounded up to the next multiple. Raises InputError."""
        if (self.keep is None) == (self.ratio is None):
            raise InputError(
                "how much to keep is given " + ("twice" if self.keep is not None else "nowhere"), expected="--keep or --ratio"
            )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            share = self.ratio / 100
            fix = f"for {self.ratio:g} %, give --ratio {share:g}" if 0 < share < 1 else ""
            raise InputError(f"the ratio is {self.ratio}", expected="the share to remove, from 0 to below 1", fix=fix)
        keep = self.keep if self.keep is not None else math.ceil(of * (1 - (self.ratio or 0)) / multiple - 1e-9) * multiple
        if not 1 <= keep <= of:
            raise InputError(f"{keep} of {of} are to be kept", expected=f"1 to {of}")
        if self.ratio and keep == of:
            fix = f"give --keep, a multiple of {multiple} below {of}" if of > multiple else ""
            raise InputError(f"a ratio of {self.ratio:g} removes none of {of}", expected=f"{multiple / of:g} or more", fix=fix)
        return keep


def plan_compression(
    method: str,
    checkpoint: Checkpoint,
    layout: Layout,
    wish: Wish,
    *,
    profile: Profile | None = None,
    profile_path: str = "",
    base: CompressionPlan | None = None,
    progress: Progress | None = None,
) -> CompressionPlan:
    """Plan with a method of the catalogue.

    Raises InputError for a wish that the method cannot fulfil, ProfileError for a profile of another model or one that lacks a statistic
    or layer, PlanError when the result is none that the family can hold.
    """
    fn = find(method)
    card, facts = card_of(fn), layout.facts
    check_options(card, wish.options, beside=("codec", "protected"))
    if base is not None:
        base.check(facts)
    needs_profile = card.kind not in ("encode", "share") and (card.kind != "skip" or bool(card.needs))
    if (needs_profile or "inputs" in card.needs) and profile is None:
        raise InputError(
            f"{card.name} reads statistics",
            expected="a profile of this model",
            fix=f"moestro profile MODEL DATA -o PROFILE --for {card.name}",
        )
    stats = layer_stats(profile, facts.fingerprint, len(facts.layers)) if profile is not None else []
    start = base.layers if base is not None else tuple(_whole(la.ordinal, la.num_experts) for la in facts.layers)
    plan = CompressionPlan(
        subjects=(Subject(checkpoint.source, facts.fingerprint),),
        method=card.name if base is None else f"{base.method} > {card.name}",
        options=_asked(wish) if base is None else {**base.options, card.name: _asked(wish)},
        inputs={**(base.inputs if base else {}), **({"profile": profile.data} if profile is not None else {})},
        layers=start,
        encodings=base.encodings if base else (),
        tensors=base.tensors if base else {},
        dropped=tuple(dict.fromkeys((*(base.dropped if base else ()), *wish.dropped))),
        protected=base.protected if base else (),
        stated=base.stated if base else (),
        profile=profile_path or (base.profile if base else ""),
        loss_unit=base.loss_unit if base else "",
    )
    lost_tensors(plan.dropped, layout)
    if card.kind == "skip":
        _removes_nothing(card.name, wish)
        plan = with_taps(fn, plan, stats, facts.layers, dict(wish.options))
    elif card.kind in ("sparsify", "share", "encode"):
        whole = plan
        plan = _encoding(plan, card.name, card.kind, wish, checkpoint, layout)
        if profile is not None and wish.protect and "output_most_LE" in profile.arrays:
            plan = spared(plan, whole, guarded(profile)[0], sparing=card.kind == "sparsify")
    else:
        assert profile is not None
        plan = _reshaping(plan, fn, stats, checkpoint, layout, wish, profile, progress)
    plan = replace(
        plan,
        stated=(*plan.stated, *(_unseen(profile, plan) if profile is not None else ())),
        sizes=(facts.expert_bytes, expert_bytes(plan, layout)),
    )
    plan.check(facts)
    return plan


def find(name: str) -> Any:
    """The compression method of this name, or of this last part of a name. Raises InputError."""
    rows = [row for row in catalogue() if row["kind"] in KINDS]
    kinds = [row["kind"] for row in rows if name in (row["name"], row["name"].rpartition(".")[2])]
    if len(kinds) == 1:
        return load(name, kinds[0])
    short = [row["name"].rpartition(".")[2] for row in rows]
    near = difflib.get_close_matches(name.lower(), short, n=2)
    raise InputError(
        f"{name!r} is {'several compression methods' if kinds else 'no compression method'}",
        expected="one of " + ", ".join(sorted(short)),
        fix=f"did you mean {' or '.join(near)}?" if near and not kinds else "give the whole name, as `moestro methods` lists it",
    )


def _encoding(plan: CompressionPlan, name: str, kind: str, wish: Wish, checkpoint: Checkpoint, layout: Layout) -> CompressionPlan:
    """One more encoding for every slot, and of kind 'encode' for the trunk if it is wished."""
    _removes_nothing(name, wish)
    if kind in ("sparsify", "share"):
        if wish.codec != STORED or wish.trunk_codec is not None:
            raise InputError(f"{name} has no number format", expected="a codec with a method of kind encode only")
        return encode_experts(plan, layout, name, STORED, wish.options)
    if wish.codec == STORED:
        raise InputError(f"{name} is given no number format", expected="one such as int4:64", fix="give --codec int4:64")
    parse_codec(wish.codec)
    plan = encode_experts(plan, layout, name, wish.codec, wish.options)
    trunk = None if wish.trunk_codec is None else ("compress.encode.rtn", wish.trunk_codec)
    return encode_trunk(plan, trunk_matrices(checkpoint, layout), inner=trunk, outer=trunk)


def _removes_nothing(name: str, wish: Wish) -> None:
    if wish.keep is not None or wish.ratio is not None:
        raise InputError(
            f"{name} removes no experts, and --keep or --ratio is given",
            fix="give the method's own options, as in NAME:OPTION=VALUE",
        )


def _reshaping(
    plan: CompressionPlan,
    fn: Any,
    stats: list[LayerStats],
    checkpoint: Checkpoint,
    layout: Layout,
    wish: Wish,
    profile: Profile,
    progress: Progress | None,
) -> CompressionPlan:
    kind, facts, options = card_of(fn).kind, layout.facts.layers, dict(wish.options)
    if any(la.taps for la in plan.layers):
        raise PlanError("the plan to start from skips experts at run time already", fix="remove, merge and slim first")
    if any(slot.encodings for la in plan.layers for slot in la.slots):
        raise PlanError("the plan to start from encodes its experts already", fix="remove and merge first, encode last")
    if kind == "neurons":
        lost_tensors(plan.dropped, layout, reshaped=any(wish.kept(f.spec.d_expert) < f.spec.d_expert for f in facts))
        made = [
            slimmed(fn, s, la, checkpoint, layout, wish.kept(f.spec.d_expert), options)
            for s, la, f in zip(stats, plan.layers, facts, strict=True)
        ]
        plan = replace(plan, layers=tuple(made), loss_unit="share of the scores of neurons")
        found = guarded(profile)[0] if wish.protect else ()
        return spared(plan, plan, found, sparing=False)
    if any(len(slot.sources) > 1 or slot.neurons for la in plan.layers for slot in la.slots):
        raise PlanError(
            "the plan to start from merges or slims experts already", fix="remove experts first, then merge, then slim"
        )
    protected, said = guarded(profile) if wish.protect else ((), "Super Experts were not protected: --no-protect")
    plan = replace(plan, protected=protected, stated=(*plan.stated, said) if said else plan.stated)
    ids = [tuple(slot.sources[0] for slot in la.slots) for la in plan.layers]
    stats = [replace(s, experts=e) for s, e in zip(stats, ids, strict=True)]
    groups = max(f.router.groups for f in facts)
    keep, few = wish.kept(min(map(len, ids)), groups), [least(f) for f in facts]
    repoint = kind == "group" and wish.router == "repoint"
    if keep < max(few) and not repoint:
        worst = facts[int(np.argmax(few))]
        why = f" of {worst.router.groups_kept} open groups out of {worst.router.groups}" if worst.router.groups > 1 else ""
        raise InputError(
            f"{keep} experts of each layer are to be kept, and a token uses {worst.top_k}{why}",
            expected=f"{max(few)} or more",
            fix=f"--keep {max(few)}"
            if max(few) < min(map(len, ids))
            else "the experts of this model can be merged with --router repoint",
        )
    lost_tensors(plan.dropped, layout, reshaped=keep < facts[0].num_experts and not repoint)
    if kind == "search":
        made = []
        for i, f in enumerate(facts):
            sample = LayerSample.read(profile, checkpoint, layout, f.ordinal, ids[i])
            kept, loss = fn(sample, keep, protected=_local(protected, f.ordinal, ids[i]), **options)
            made.append(LayerChange(f.ordinal, tuple(Slot((ids[i][e],)) for e in kept), loss=loss))
            if progress:
                progress(i + 1, len(facts))
        return replace(plan, layers=tuple(made), loss_unit="share of the layer's output energy")
    if kind == "criterion":
        scores = [np.asarray(fn(s, **options), np.float64) for s in stats]
        counts = load(wish.budget, "budget")(scores, keep * len(scores), few)
        made = []
        for f, k, score_E, mine in zip(facts, counts, scores, ids, strict=True):
            kept = choose(score_E, k, f, _local(protected, f.ordinal, mine))
            total = float(score_E.sum())
            loss = 1 - float(score_E[kept].sum()) / total if total > 0 and (score_E >= 0).all() else None
            made.append(LayerChange(f.ordinal, tuple(Slot((mine[e],)) for e in kept), loss=loss))
        return replace(plan, layers=tuple(made), loss_unit="share of the scores removed")
    usage = [s.counts() for s in stats]
    counts = load(wish.budget, "budget")(usage, keep * len(usage), [1] * len(usage) if repoint else few)
    how = Merging(fn, options, load(wish.fuse, "fuse"), wish.align, wish.router)
    made = []
    for i, (s, f, k) in enumerate(zip(stats, facts, counts, strict=True)):
        made.append(merged_layer(how, s, f, k, checkpoint, layout, _local(protected, f.ordinal, ids[i])))
        if progress:
            progress(i + 1, len(facts))
    if repoint:
        text = "routers stay as wide as they were: the file holds a merged expert once for each id that leads to it"
        plan = replace(plan, stated=(*plan.stated, text))
    return replace(plan, layers=tuple(made), loss_unit="share of the tokens' choices merged away, times unlikeness")


def _whole(ordinal: int, experts: int) -> LayerChange:
    return LayerChange(ordinal, tuple(Slot((e,)) for e in range(experts)))


def _local(protected: tuple[ExpertKey, ...], ordinal: int, ids: tuple[int, ...]) -> frozenset[int]:
    """Protected experts of a layer, as places among `ids`."""
    return frozenset(ids.index(k.expert) for k in protected if k.layer == ordinal and k.expert in ids)


def _unseen(profile: Profile, plan: CompressionPlan) -> list[str]:
    """A line for each kind of expert that is kept and of which the profile knows too little."""
    if "counts_LE" not in profile.arrays:
        return ["the profile does not say which experts were seen: it was made without the probe counts"]
    never = coverage(profile).never
    kept = [sum(e in set(never[la.ordinal]) for s in la.slots for e in s.sources) for la in plan.layers]
    text = f"{sum(map(len, never))} experts were never chosen in the profile; the plan keeps or merges {sum(kept)} of them"
    return [text] if sum(map(len, never)) and text not in plan.stated else []


def unseen_experts(profile: Profile) -> int:
    """How many experts the profile never saw chosen."""
    return coverage(profile).unseen if "counts_LE" in profile.arrays else 0


def _asked(wish: Wish) -> dict[str, Any]:
    """The wish as plain data, without what is as usual."""
    usual = Wish()
    said = {
        n: getattr(wish, n) for n in ("keep", "ratio", "budget", "fuse", "align", "router", "codec", "trunk_codec", "protect")
    }
    return {n: v for n, v in said.items() if v != getattr(usual, n)} | dict(wish.options)
