"""What the compression benchmark tries: every method of the catalogue that makes a plan, at its levels.

A method that is added to the catalogue takes part by its kind; only options that are levels (how many zeros, which rank) are named here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moestro.compress.bits import BitsWish, plan_bits
from moestro.compress.encode.inputs import Inputs
from moestro.compress.planner import KINDS, Wish, plan_compression
from moestro.core.errors import MoestroError
from moestro.core.method import catalogue, load
from moestro.core.plans.compression import CompressionPlan
from moestro.models.checkpoint import Checkpoint
from moestro.models.layout import Layout
from moestro.profile.profile import Profile

RATIOS = (0.125, 0.25, 0.5)
# Where experts are copies, the others compute the same whichever goes: the largest share shows that nothing else was harmed.
COPIES = "embedded"
# For each number of bits the formats to try: all of those at 4, the first that a method can make of the others.
WIDTHS = {
    "8": ("int8:64",),
    "4": ("uint4:64", "int4:64"),
    "3": ("int3:64", "nested:64/3"),
    "2.5": ("int2:32",),
    "2": ("int2:64", "nested:64/2"),
}
OTHERWISE = ("nested:64",)  # of a method that makes none of them
# Levels of methods that have no share of their own, and variants worth a line: options beside the usual ones.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "compress.sparsify.moe_pruner": ({"ratio": 0.125}, {"ratio": 0.25}, {"ratio": 0.5}, {"pattern": "2:4"}),
    "compress.sparsify.low_rank": ({"rank": 128, "kept": 0.5}, {"rank": 64, "kept": 0.25}, {"rank": 32, "kept": 0.1}),
    "compress.share.latent": ({}, {"rank": 128}, {"rank": 256}),
    "compress.encode.rtn": ({}, {"search": True}),
    "compress.encode.gptq": ({}, {"ordered": True}),
    "compress.skip.fewer": ({"average": 1.5}, {"average": 1.0}),
    "compress.skip.odp": ({"share": 0.25}, {"share": 0.5}),
    "compress.skip.ratio": ({"threshold": 0.25}, {"threshold": 0.5}),
}
BEFORE = {
    "smooth": "smooth",
    "encode_router": "router",
}  # kinds that `plan bits` takes beside an encoder, and their places in its wish
MIXED = ("int2:64", "int3:64", "int4:64")  # what budgets of bits choose from
MEANS = (2.5, 3.25)  # bits of a weight with its scales: those of int2:32 and of int3:64
GUARDED = ("uint4:64", "int8:64"), 4.75  # four bits, and eight for the layers that suffer most
EVERY_FUSE = "compress.group.hierarchical"  # the grouping that every way to fuse is tried with; the others have the usual one
UNIFORM, ALIGNMENT = "compress.budget.uniform", "compress.fuse.alignment"
REPOINTED = {  # how routers that keep their width lead to merged experts, with a word for what is unusual
    "": {"budget": UNIFORM, "align": True},
    ", threshold": {"budget": "compress.budget.threshold", "align": True},
    ", unaligned": {"budget": UNIFORM, "align": False},
}
REMOVING = ("criterion", "search", "group")
OTHER = (*(kind for kind in KINDS if kind not in REMOVING), "bits", "several")
# Some of several steps; encoders at 4 and 3 bits after the least and the most usual shares.
AFTER = (
    ("compress.criteria.reap", 0.25, "uint4:64"),
    ("compress.criteria.reap", 0.25, "int3:64"),
    ("compress.criteria.reap", 0.5, "uint4:64"),
    ("compress.group.hierarchical", 0.25, "uint4:64"),
    ("compress.neurons.contribution", 0.25, "uint4:64"),
)
LAST, ROUNDED, USUAL_BUDGET = "compress.encode.gptq", "compress.encode.rtn", "compress.budget.mc_moe"


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a planner. wish: fields of `Wish`, or of `BitsWish` when `bits` is set.

    apart: each matrix is fitted by itself, without what encoding the others changes before it.
    """

    method: str
    wish: Mapping[str, Any] = field(default_factory=dict)
    bits: bool = False
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One plan. name: what varies with the level is left out of it, so that cells of one name are a curve. calibrated: it depends on text.

    kind: of its first step's method; 'bits' for mixed precision and 'several' for more than one step.
    """

    name: str
    level: str
    kind: str
    steps: tuple[Step, ...]
    calibrated: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method of the catalogue that has a part in it, or is left out of it on purpose."""
        named = [step.method for step in self.steps]
        for step in self.steps:
            named += [f"compress.fuse.{step.wish['fuse']}"] if "fuse" in step.wish else []
            named += [ALIGNMENT] if "align" in step.wish else []
            named += [step.wish[key] for key in ("budget", "smooth", *(["router"] if step.bits else [])) if key in step.wish]
        return tuple(dict.fromkeys(named))

    @property
    def key(self) -> str:
        """A digest of what is done."""
        said = [[step.method, dict(step.wish), step.bits, *(["apart"] if step.apart else [])] for step in self.steps]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def short(name: str) -> str:
    return name.rpartition(".")[2]


def share(ratio: float) -> str:
    return f"-{100 * ratio:g} %"


def grid(kinds: Iterable[str], d_expert: int) -> list[Cell]:
    """All cells of these kinds, for experts of this width."""
    wanted, rows = set(kinds), catalogue()
    found: list[Cell] = []
    fuses = [row["name"] for row in rows if row["kind"] == "fuse"]
    for row in rows:
        name, kind = row["name"], row["kind"]
        if kind not in wanted or kind not in KINDS:
            continue
        if kind == "group":
            for fuse in fuses if name == EVERY_FUSE else [f"compress.fuse.{Wish().fuse}"]:
                for ratio in RATIOS:
                    wish = {"ratio": ratio, "fuse": short(fuse)}
                    found.append(Cell(f"{short(name)} + {short(fuse)}", share(ratio), kind, (Step(name, wish),)))
                    if short(fuse) == Wish().fuse:  # every row of the router stays and leads to the expert that its own went into
                        variants = REPOINTED if name == EVERY_FUSE else {"": {}}
                        for title, more in variants.items():
                            step = Step(name, wish | {"router": "repoint"} | more)
                            found.append(Cell(f"{short(name)} + {short(fuse)}, repoint{title}", share(ratio), kind, (step,)))
        elif kind in REMOVING or kind == "neurons":
            for ratio in RATIOS:
                wish = {"ratio": ratio} if kind in REMOVING else {"keep": round(d_expert * (1 - ratio))}
                found.append(Cell(short(name), share(ratio), kind, (Step(name, wish),)))
        elif kind == "encode":
            found += encodings(name, "inputs" in row["needs"])
        else:
            for options in OPTIONS.get(name, ({},)):
                found.append(Cell(short(name), said(options) or "as usual", kind, (Step(name, {"options": options}),)))
    if "bits" in wanted:
        found += mixtures(row["name"] for row in rows if row["kind"] == "bits")
        for row in rows:
            if part := BEFORE.get(row["kind"]):
                found += before(row["name"], part)
    if "several" in wanted:
        found += (c for c in combinations(d_expert) if c.steps[0].method.split(".")[1] == "neurons" or wanted & set(REMOVING))
    return found


def cells_of(model: str, kinds: Iterable[str], d_expert: int) -> list[Cell]:
    """The cells that a model of the benchmark takes part in."""
    return [cell for cell in grid(kinds, d_expert) if model != COPIES or cell.level == share(RATIOS[-1])]


def kept_neurons(ratio: float, d_expert: int) -> int:
    """Neurons that stay, a multiple of 64, so that groups of weights divide them."""
    return max(64, round(d_expert * (1 - ratio) / 64) * 64)


def encodings(name: str, calibrated: bool) -> Iterator[Cell]:
    made = [codec for codecs in WIDTHS.values() for codec in formats(name, codecs)] or formats(name, OTHERWISE)
    for options in OPTIONS.get(name, ({},)):
        title = short(name) + (f", {said(options)}" if options else "")
        for codec in made:
            step = Step(name, {"codec": codec, "options": options})
            yield Cell(title, codec, "encode", (step,), calibrated)
            if name == LAST and not options:
                yield Cell(f"{title}, apart", codec, "encode", (replace(step, apart=True),), calibrated)


def formats(name: str, codecs: Iterable[str]) -> list[str]:
    """The formats that an encoder makes: all of four bits, of others the first."""
    codecs = tuple(codecs)
    rng = np.random.default_rng(0)
    w_RC, inputs = rng.standard_normal((8, 128)).astype(np.float32), Inputs.of(rng.standard_normal((256, 128)).astype(np.float32))
    made = []
    for codec in codecs:
        try:
            load(name, "encode")(w_RC, inputs, codec=codec)
        except MoestroError:
            continue
        made.append(codec)
    return made if codecs == WIDTHS["4"] else made[:1]


def mixtures(budgets: Iterable[str]) -> Iterator[Cell]:
    """Every budget of bits over fitted rounding, which is quick to try in every width, the usual one, as it is and freest, over GPTQ as well, and at more bits."""
    rounded = {"options": {"search": True}}
    for budget in budgets:
        scopes: tuple[dict[str, Any], ...] = ({}, {"scope": "model"}) if _has(budget, "scope") else ({},)
        if budget == USUAL_BUDGET:  # the error of the output says by itself how often an expert is used, and how heavily
            scopes = (*scopes, {"alpha": 0.0, "beta": 0.0}, {"alpha": 0.0, "beta": 0.0, "scope": "model"})
        for options in scopes:
            fitted = budget == USUAL_BUDGET and options in ({}, scopes[-1])
            for method, wish in ((ROUNDED, rounded), *(((LAST, {}),) if fitted else ())):
                title = f"{short(budget)} of {short(method)}" + (f", {said(options)}" if options else "")
                for bits in MEANS if budget == USUAL_BUDGET else MEANS[:1]:
                    wish = wish | {"codecs": MIXED, "bits": bits, "budget": budget, "budget_options": options}
                    yield Cell(title, f"{bits:g} bits", "bits", (Step(method, wish, bits=True),))
    codecs, bits = GUARDED
    wish = {"options": {"ordered": True}, "codecs": codecs, "bits": bits}
    wish |= {"budget": USUAL_BUDGET, "budget_options": {"scope": "model"}}
    yield Cell(f"{short(USUAL_BUDGET)} of {short(LAST)}, scope model", f"{bits:g} bits", "bits", (Step(LAST, wish, bits=True),))


def before(name: str, part: str) -> Iterator[Cell]:
    """What comes before an encoder, and the encoder at 4 and 3 bits."""
    for codec in ("int4:64", "int3:64"):
        yield Cell(
            f"{short(name)}, then {short(LAST)}", codec, "bits", (Step(LAST, {"codecs": (codec,), part: name}, bits=True),)
        )


def _options(name: str) -> list[dict[str, Any]]:
    return next(row["options"] for row in catalogue() if row["name"] == name)


def _has(name: str, option: str) -> bool:
    return option in {o["name"] for o in _options(name)}


def combinations(d_expert: int) -> Iterator[Cell]:
    for first, ratio, codec in AFTER:
        wish: dict[str, Any] = {"ratio": ratio}
        if ".neurons." in first:
            wish = {"keep": kept_neurons(ratio, d_expert)}
            ratio = round(1 - wish["keep"] / d_expert, 3)
        steps = (Step(first, wish), Step(LAST, {"codec": codec}))
        yield Cell(f"{short(first)}, then {short(LAST)}", f"{share(ratio)}, {codec}", "several", steps)


def said(options: Mapping[str, Any]) -> str:
    return ", ".join(k if v is True else f"{k} {v}" for k, v in options.items())


def planned(
    cell: Cell, checkpoint: Checkpoint, layout: Layout, profile: Profile, seed: int, kept: Path | None = None
) -> CompressionPlan:
    """The cell's plan. seed: of methods that draw. kept: folder for what plans of mixed bits share. Raises MoestroError."""
    plan: CompressionPlan | None = None
    for step in cell.steps:
        wish = dict(step.wish)
        if step.bits:
            asked = BitsWish(step.method, **wish)
            told = json.dumps([layout.facts.fingerprint, profile.data, asked.method, dict(asked.options), asked.codecs])
            evidence = kept / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.evidence" if kept and asked.bits else None
            plan = plan_bits(checkpoint, layout, asked, profile=profile, base=plan, evidence=evidence).plan
            continue
        if any(o["name"] == "seed" for o in _options(step.method)):
            wish["options"] = {**wish.get("options", {}), "seed": seed}
        plan = plan_compression(step.method, checkpoint, layout, Wish(**wish), profile=profile, base=plan)
        if step.apart:
            plan = replace(plan, encodings=tuple(replace(e, chained=False) for e in plan.encodings))
    assert plan is not None
    return plan
