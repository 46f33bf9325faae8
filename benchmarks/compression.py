"""What does a smaller model lose? Quality against size for every compression method, on a model trained here and on a real one.

    moestro train mixed --steps 500 -o RUN --export auto
    python benchmarks/compression.py --trained RUN --data TEXT.txt     stops and goes on: each finished cell is kept
    python benchmarks/compression.py --reduced                         under a minute: two methods on a planted model
    python benchmarks/compression.py --list                            what takes part

A cell is a model, a plan (see `compression_grid.py`) and a calibration text. The plan is carried out in memory, which gives the same weights
as the file would have, and the result reads text that neither training nor calibration saw, beside the original.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import limits
import numpy as np
import shapes
from compression_grid import OTHER, REMOVING, Cell, cells_of, grid, planned, short

from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.slots import arrays_of
from moestro.core.errors import MoestroError
from moestro.core.experts import ExpertWeights
from moestro.core.layer import Runner, RunnerOutput
from moestro.core.method import card_of, catalogue
from moestro.core.plan import Subject as Source
from moestro.core.plans.compression import STORED, CompressionPlan, LayerChange, Row, Slot
from moestro.evaluate.comparison import compare
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.layout import Layout
from moestro.models.open import Model, open_model
from moestro.profile.data import Texts, cut
from moestro.profile.probe import make, needed_by
from moestro.profile.profile import Profile
from moestro.profile.run import Recording
from moestro.profile.sources import Document

QUESTION = "compression"
SEEDS = (0, 1, 2)
LENGTH = 256
PLAIN_BITS = (
    16  # what a weight that is not encoded counts: models are published in 16 bits, and rounding to bfloat16 changes little
)
PROBES = {"similarity": {"tokens": 8}}
SHOWN = ("mixed", "duplicates", "smollm2")


@dataclass(frozen=True, slots=True)
class Bench:
    """One model with its texts. calibration: of each seed. seeds: those that its calibrated cells are tried with.

    kept: tokens of calibration that the probe `inputs` keeps for methods that fit weights to them; None for its usual number.
    """

    name: str
    path: Path
    kinds: tuple[str, ...]
    held_out: list[list[int]]
    calibration: Callable[[int], list[list[int]]]
    seeds: tuple[int, ...]
    kept: int | None = None

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.name, self.kinds, describe(Checkpoint.open(self.path)).facts.layers[0].spec.d_expert)


class Remembered:
    """A runner that answers what it answered before."""

    def __init__(self, runner: Runner, sequences: Sequence[list[int]]) -> None:
        self.facts = runner.facts
        self._said = {tuple(s): out for s, out in zip(sequences, runner.run(list(sequences)), strict=True)}

    def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        assert not inputs, "only logits and routing are kept"
        for tokens in tokens_BT:
            yield self._said[tuple(tokens)]


class Sparing(Encoder):
    """An encoder that does not do twice what comes out the same: the embedded model's experts are copies."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._done: dict[str, Any] = {}

    def _step(self, ordinal: int, slot: Slot, weights: ExpertWeights, number: int) -> Any:
        fitted = "inputs" in card_of(self._methods[number]).needs and self._kinds[number] == "encode"
        if self._kinds[number] != "encode":
            return super()._step(ordinal, slot, weights, number)
        rows = [self._inputs(ordinal, slot).own_n] if fitted else []
        told = hashlib.blake2b(f"{ordinal} {number}".encode())
        for array in (*rows, *arrays_of(weights).values()):
            told.update(np.ascontiguousarray(array).data)
        if (key := told.hexdigest()) not in self._done:
            self._done = {key: super()._step(ordinal, slot, weights, number)}  # copies come one after another
        return self._done[key]


class Opened:
    """A model in memory, its answers to the held-out text, and its profiles, which are kept in files."""

    def __init__(self, bench: Bench, work: Path) -> None:
        self.bench, self.work = bench, work
        self.checkpoint = Checkpoint.open(bench.path)
        self.layout: Layout = describe(self.checkpoint)
        self.model: Model = open_model(self.checkpoint, "float32")
        self._original: Remembered | None = None
        self._profile: tuple[int, Profile] | None = None

    @property
    def original(self) -> Remembered:
        if self._original is None:
            self._original = Remembered(self.model, self.bench.held_out)
        return self._original

    def profile(self, seed: int) -> Profile:
        if self._profile is None or self._profile[0] != seed:
            texts = as_texts(self.bench.calibration(seed))
            names = {m for cell in self.bench.cells for m in cell.methods} | {"profile.probes.maxima"}
            probes = probes_for(names, self.bench.kept)
            told = f"{self.layout.facts.fingerprint} {texts.digest} {json.dumps(probes, sort_keys=True)}"
            file = self.work / "profiles" / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.profile"
            if not file.exists():
                recording = Recording(self.model, texts, make(probes), trace_tokens=0)
                recording.run(self.model)
                file.parent.mkdir(parents=True, exist_ok=True)
                recording.profile().save(file)
            self._profile = seed, Profile.open(file)
        return self._profile[1]

    def measure(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Plan, carry out, judge."""
        profile, began = self.profile(seed), time.process_time()
        plan = planned(cell, self.checkpoint, self.layout, profile, seed, self.work / "evidence")
        planning = time.process_time()
        changed = compress_live(plan, self.model, encoder=Sparing(plan, self.layout.facts, profile))
        applied = time.process_time()
        origins = [[la.slots[row.slot].sources for row in la.routed] for la in plan.layers]
        found = compare(changed, self.original, self.bench.held_out, origins)
        del changed
        gc.collect()  # the changed model's modules refer to each other; a second one need not fit beside it
        return {
            "perplexity": found.quality.perplexity,
            "ratio": found.quality.perplexity / found.reference.perplexity,
            "kl": found.quality.kl,
            "kl_error": found.kl_error,
            "agreement": found.agreement,
            "skipped": found.skipped,
            "bits": bits(plan, self.layout),
            "expert_bytes": plan.sizes[1],
            "bytes": plan.sizes[1] + self.layout.facts.trunk_bytes,
            "stated": list(plan.stated),
            "plan_seconds": round(planning - began, 1),
            "apply_seconds": round(applied - planning, 1),
            "eval_seconds": round(time.process_time() - applied, 1),
        }


def bits(plan: CompressionPlan, layout: Layout) -> float:
    """Of all experts of the result, for each expert weight of the original; plain numbers count PLAIN_BITS, whatever the file has."""
    before, after = plan.sizes
    weights = sum(la.num_experts * (3 if la.spec.gated else 2) * la.spec.d_model * la.spec.d_expert for la in layout.facts.layers)
    coded = any(e.codec != STORED for e in plan.encodings)
    return 8 * after / weights if coded else PLAIN_BITS * after / before


def probes_for(methods: set[str], kept: int | None) -> dict[str, dict[str, Any]]:
    """The probes that methods read, with their options."""
    rows = {row["name"]: row for row in catalogue()}
    names = ["counts"]
    for name in sorted(methods & set(rows)):
        if rows[name]["kind"] == "probe":
            names.append(short(name))
        elif rows[name]["needs"] and rows[name]["kind"] != "align":
            names += needed_by([name])
    names = dict.fromkeys(short(n.partition(":")[0]) for n in names)
    options = PROBES | ({} if kept is None else {"inputs": {"most": kept}})
    return {name: options.get(name, {}) for name in names}


def as_texts(sequences: Sequence[list[int]]) -> Texts:
    return cut(
        [Document("all", f"sequence {i}", tokens=s) for i, s in enumerate(sequences)], None, length=max(map(len, sequences))
    )


def of_training(run: Path, held_out: int, calibration: int) -> tuple[list[list[int]], Callable[[int], list[list[int]]]]:
    """Of a training run's text: `held_out` sequences that it never saw, the domains in equal parts, and others of what it was trained on."""
    from moestro.train.config import TrainConfig
    from moestro.train.data.stream import Stream
    from moestro.train.data.tokens import open_tokens

    config = TrainConfig.from_json(shapes.read_json(run / "train.json"))
    tokens = open_tokens(run / "tokens")
    data = config.data

    def stream(seed: int) -> Stream:
        return Stream(tokens, length=data.length, holdout=data.holdout, weights=data.weights, seed=seed)

    places = stream(0).held_out_places(held_out // len(tokens.domains))
    rows = stream(0).gather([place for of in places for place in of]).tokens_BT.tolist()
    return rows, lambda seed: stream(1000 + seed).batch(0, calibration).tokens_BT.tolist()


def of_text(
    ids: Sequence[int], held_out: int, calibration: int, length: int
) -> tuple[list[list[int]], Callable[[int], list[list[int]]]]:
    """Of one text's tokens: `held_out` sequences evenly spread over the last quarter, and for each seed others drawn from the first three."""
    whole = [list(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    first, last = whole[: 3 * len(whole) // 4], whole[3 * len(whole) // 4 :]
    if len(first) < calibration or len(last) < held_out:
        raise SystemExit(f"the text has {len(whole)} sequences of {length}; at least {4 * held_out} are needed")
    spread = [last[i * len(last) // held_out] for i in range(held_out)]

    def drawn(seed: int) -> list[list[int]]:
        return [first[i] for i in np.random.default_rng(seed).choice(len(first), calibration, replace=False)]

    return spread, drawn


def written(path: Path, make_plan: Callable[[Checkpoint, Layout], CompressionPlan], source: Path) -> Path:
    """The checkpoint that a plan makes of `source`, written once."""
    if not (path / "config.json").exists():
        checkpoint = Checkpoint.open(source)
        layout = describe(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        compress(make_plan(checkpoint, layout), checkpoint, layout, path, overwrite=True)
    return path


def halved(checkpoint: Checkpoint, layout: Layout) -> CompressionPlan:
    """Every expert of the upper half replaced by one of the lower half, its neurons in another order; routers as they are."""
    rng = np.random.default_rng(0)
    layers = []
    for la in layout.facts.layers:
        half = la.num_experts // 2
        kept = [Slot((e,)) for e in range(half)]
        copies = [Slot((e,), alignments=(tuple(rng.permutation(la.spec.d_expert).tolist()),)) for e in range(half)]
        rows = tuple(Row(e, (e,)) for e in range(la.num_experts))
        layers.append(LayerChange(la.ordinal, (*kept, *copies), rows))
    size = layout.facts.expert_bytes
    subjects = (Source(checkpoint.source, layout.facts.fingerprint),)
    return CompressionPlan(subjects=subjects, method="planted duplicates", layers=tuple(layers), sizes=(size, size))


def single(checkpoint: Checkpoint, layout: Layout) -> CompressionPlan:
    """As many experts as a token uses, and no more; the embedded model's are copies, so this computes the same."""
    top_k = layout.facts.layers[0].top_k
    layers = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in range(top_k))) for la in layout.facts.layers)
    size, subjects = layout.facts.expert_bytes, (Source(checkpoint.source, layout.facts.fingerprint),)
    return CompressionPlan(subjects=subjects, method="two of the copies", layers=layers, sizes=(size, size))


def benches(args: argparse.Namespace) -> list[Bench]:
    """The models that are asked for. Raises SystemExit for a trained model that is not there."""
    if args.reduced:
        return [tiny(args.work)]
    found = []
    chosen = args.models or ("mixed", "duplicates", "smollm2", "embedded")
    if {"mixed", "duplicates"} & set(chosen):
        if args.trained is None or not (args.trained / "train.json").exists():
            raise SystemExit("--trained names no run; make it with: moestro train mixed --steps 500 -o RUN --export auto")
        exported = args.trained / "auto"
        held_out, calibration = of_training(args.trained, 16, 32)
        if "mixed" in chosen:
            found.append(Bench("mixed", exported, (*REMOVING, *OTHER), held_out, calibration, SEEDS))
        if "duplicates" in chosen:
            folder = written(args.work / f"{args.trained.name}-duplicates", halved, exported)
            found.append(Bench("duplicates", folder, REMOVING, held_out, calibration, SEEDS))
    if {"smollm2", "embedded"} & set(chosen):
        from moestro.build.upcycle.default import ensure_default_model

        path = ensure_default_model()
        ids = tokenised(path, args.data)
        if "smollm2" in chosen:
            folder = written(args.work / f"{path.name}-two", single, path)
            # Its last matrices have 1,536 inputs: GPTQ on 2,048 tokens leaves a third more output error of them than on 8,192.
            held_out, calibration = of_text(ids, 16, 64, LENGTH)
            found.append(Bench("smollm2", folder, OTHER, held_out, calibration, SEEDS, kept=64 * LENGTH))
        if "embedded" in chosen:
            held_out, calibration = of_text(ids, 4, 16, LENGTH)
            found.append(Bench("embedded", path, REMOVING, held_out, calibration, SEEDS[:1]))
    return found


def tokenised(model: Path, data: Path | None) -> list[int]:
    from moestro.models.tokenizer import Tokenizer
    from moestro.train.data.text import read

    texts = [text for _, text in read("installed:documentation")] if data is None else [data.read_text(encoding="utf-8")]
    return Tokenizer.open(model).encode("\n".join(texts)[:2_000_000], add_special=False)


def tiny(work: Path) -> Bench:
    """A planted model of a few thousand parameters, whose domains have experts of their own and some are idle."""
    from moestro.testing.planted import domain_model

    made = domain_model(work / "planted", experts_per_domain=3, idle=3, tokens_per_domain=6, d_expert=32)
    read = [made.truth.continuation(token, 24) for token in range(18)]  # what it predicts; six tokens of each domain begin
    return Bench("planted", made.path, REMOVING, read[::2], lambda seed: read[1::2], SEEDS[:1])


class Record:
    """The results file: a cell stays while its plan's steps, model and texts are the same. fresh: unless it is chosen."""

    question = QUESTION

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path, self.fresh, self.commit = path, fresh, cells.versions()["commit"]
        before = shapes.read_json(path) if path.exists() else {}
        self.report: dict[str, Any] = {
            "question": self.question,
            "machine": limits.machine(path.parent),
            "models": before.get("models", {}),
            "cells": before.get("cells", {}),
        }

    def describe(self, opened: Opened) -> str:
        """Say what model and text these are; a digest of it."""
        bench, facts = opened.bench, opened.layout.facts
        la = facts.layers[0]
        said = {
            "fingerprint": facts.fingerprint,
            "layers": len(facts.layers),
            "experts": la.num_experts,
            "top_k": la.top_k,
            "d_model": la.spec.d_model,
            "d_expert": la.spec.d_expert,
            "expert_bytes": facts.expert_bytes,
            "trunk_bytes": facts.trunk_bytes,
            "held_out": {"tokens": sum(map(len, bench.held_out)), "digest": as_texts(bench.held_out).digest},
            "calibration": {
                str(seed): {"tokens": sum(map(len, bench.calibration(seed))), "digest": as_texts(bench.calibration(seed)).digest}
                for seed in bench.seeds
            },
        }
        self.report["models"][bench.name] = said
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, opened: Opened, digest: str, cell: Any, seed: int) -> None:
        """The cell, unless it is there. A plan that cannot be made is a result too."""
        name, key = f"{opened.bench.name} / {cell.name} / {cell.level} / {seed}", f"{digest} {cell.key}"
        if self.report["cells"].get(name, {}).get("key") == key and not self.fresh:
            return
        try:
            found = opened.measure(cell, seed)
        except MoestroError as error:
            found = {"error": str(error)}
        told = {"model": opened.bench.name, "name": cell.name, "level": cell.level, "kind": cell.kind, "seed": seed}
        told |= {"methods": cell.methods, "calibrated": cell.calibrated, "key": key, "commit": self.commit}
        self.report["cells"][name] = told | found
        self.write()
        cells.say(f"{name:60} {found['error'] if 'error' in found else self.line(found)}")

    def line(self, found: dict[str, Any]) -> str:
        """A cell in short."""
        return "ratio {ratio:.4f}  KL {kl:.4f}  {bits:.2f} bits  ({plan_seconds} + {apply_seconds} + {eval_seconds} s)".format(
            **found
        )

    def write(self, **more: Any) -> None:
        self.report |= {"date": datetime.date.today().isoformat(), **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shapes.write_json(self.path, self.report)


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each model, name and level: means over seeds with their range, and whether no row is both smaller and better."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in found.values():
        groups.setdefault((cell["model"], cell["name"], cell["level"]), []).append(cell)
    rows = []
    for (model, name, level), some in groups.items():
        row: dict[str, Any] = {
            "model": model,
            "name": name,
            "level": level,
            "kind": some[0]["kind"],
            "methods": some[0]["methods"],
        }
        if broken := [c["error"] for c in some if "error" in c]:
            rows.append(row | {"error": broken[0]})
            continue
        ratios = [c["ratio"] for c in some]
        row |= {"seeds": sorted(c["seed"] for c in some), "ratio": math.exp(statistics.fmean(map(math.log, ratios)))}
        row |= {"low": min(ratios), "high": max(ratios)}
        row |= {key: statistics.fmean(c[key] for c in some) for key in ("bits", "kl", "agreement", "bytes", "expert_bytes")}
        rows.append(row)
    for row in rows:
        if "ratio" in row:
            others = [r for r in rows if r is not row and r["model"] == row["model"] and "ratio" in r]
            row["front"] = not any(
                r["bits"] <= row["bits"] and r["ratio"] <= row["ratio"] and (r["bits"], r["ratio"]) != (row["bits"], row["ratio"])
                for r in others
            )
    return sorted(rows, key=lambda r: (r["model"], r["kind"], r["name"], -r.get("bits", 0)))


def by_method(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For the pages of the methods: where the curves are, and a table for each method that a plan is made with.

    A method that only takes part in others' plans, such as a way to fuse, has its rows at two levels.
    """
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        if "error" in row or row["model"] not in SHOWN:
            continue
        main = row["methods"][1 if row["kind"] == "bits" else 0]
        for method in row["methods"]:
            if method == main or (row["kind"] == "group" and row["level"] in ("-25 %", "-50 %")):
                some = f" ({row['low']:.4f} to {row['high']:.4f})" if len(row["seeds"]) > 1 else ""
                told = [row["model"], row["name"], row["level"], f"{row['bits']:.2f}", f"{row['ratio']:.4f}{some}"]
                tables.setdefault(method, []).append(told)
    head = ["model", "plan", "level", "bits per expert weight", "perplexity, original = 1 (range of seeds)"]
    return {"page": "compression.md", "head": head, "tables": tables}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, metavar="TEXT", help="for the real model; default: documentation that Python carries")
    p.add_argument("--trained", type=Path, metavar="RUN", help="folder of `moestro train mixed --export auto`")
    p.add_argument("--models", nargs="+", choices=("mixed", "duplicates", "smollm2", "embedded"))
    p.add_argument("--only", nargs="+", metavar="NAME", help="cells whose name begins so")
    p.add_argument("--levels", nargs="+", metavar="LEVEL", help="cells of these levels, such as uint4:64")
    p.add_argument("--seeds", nargs="+", type=int, help=f"default {' '.join(map(str, SEEDS))}")
    p.add_argument("--reduced", action="store_true", help="two methods, one seed, a planted model")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so long; the same command goes on")
    p.add_argument("--work", type=Path, default=cells.default_work() / "compression", help="folder for profiles and checkpoints")
    p.add_argument("--fresh", action="store_true", help="measure the chosen cells again")
    p.add_argument("--out", type=Path, help="results file; by default in benchmarks/results/, reduced in the work folder")
    p.add_argument("--list", action="store_true", help="only say what takes part")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args, began = arguments(argv), time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    only = tuple(args.only or (("reap", "hierarchical + frequency") if args.reduced else ("",)))
    if args.list:
        for cell in grid((*REMOVING, *OTHER), 384):
            if cell.name.startswith(only):
                print(f"{cell.kind:10} {cell.name:40} {cell.level:16} {', '.join(cell.methods)}")
        return 0
    import torch

    torch.set_num_threads(1)
    record = Record(args.out or path_of(args), fresh=args.fresh)
    known = benches(args)
    for seed in SEEDS:  # seed by seed: what was stopped has every method
        for bench in known:
            if seed not in bench.seeds or seed not in (args.seeds or SEEDS):
                continue
            wanted = [c for c in bench.cells if c.name.startswith(only) and (c.calibrated or seed == SEEDS[0])]
            wanted = [c for c in wanted if c.level in (args.levels or (c.level,))]
            if not wanted:
                continue
            opened = Opened(bench, args.work)
            digest = record.describe(opened)
            for cell in wanted:
                if time.monotonic() - began > 60 * args.minutes:
                    cells.say("stopped, as --minutes says; the same command goes on")
                    return 0
                record.measure(opened, digest, cell, seed)
    record.write(versions=cells.versions())
    rows = summary(record.report["cells"])
    record.write(summary=rows, methods=by_method(rows))
    cells.say(str(record.path))
    return 0


def path_of(args: argparse.Namespace, question: str = QUESTION) -> Path:
    if args.reduced:
        return args.work / f"{question}-reduced.json"
    info = limits.machine(args.work)
    hardware = "-".join("".join(c if c.isalnum() else " " for c in f"{info['cpu']} {info['cores']}c".lower()).split())
    return cells.HERE / "results" / f"{question}_{hardware}_{datetime.date.today().isoformat()}.json"


if __name__ == "__main__":
    sys.exit(main())
