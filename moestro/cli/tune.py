"""`moestro train METHOD --model MODEL`: a pretrained model after a short training: recovered, pruned while it learns, or taught to skip."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.cli.arguments import method_choice
from moestro.cli.errors import INTERRUPTED, bad_argument
from moestro.cli.output import emit, say

if TYPE_CHECKING:
    from moestro.core.plans.compression import CompressionPlan
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.layout import Layout
    from moestro.train.tuned import Left

USUAL = {
    "steps": 200, "batch": 8, "save_every": 0, "keep": 1, "log_every": 20,
    "optimiser": {"betas": [0.9, 0.98], "decay": 0.0}, "rate": {"warmup": 0.03, "final": 0.0},
}  # fmt: skip


def tune(
    method: str, model: str, against: str | None, data: list[str] | None, output: Path, steps: int | None, settings: list[str],
    threads: int | None, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Train, write the model to `output` with the record of how it came about, and say what was found. Returns the exit code."""
    import torch

    from moestro.cli.run import check_target
    from moestro.cli.train import Progress, stopping
    from moestro.compress.record import write_record
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe
    from moestro.models.open import open_model
    from moestro.models.taps import read_taps
    from moestro.train import tuned
    from moestro.train.config import changed
    from moestro.train.parallel import Group
    from moestro.train.pretrained import Pretrained

    if threads is not None:
        torch.set_num_threads(threads)
    if output.exists() and any(output.iterdir()):
        bad_argument(f"{output} exists already", "a new folder")
    check_target(output.with_name(output.name + ".training") / "log.jsonl", "--output")
    name, options = method_choice(method)
    checkpoint = Checkpoint.open(model)
    if read_taps(checkpoint):
        bad_argument(f"{model} skips experts when it runs", "a model without taps", "train the model before it, and skip last")
    layout = describe(checkpoint)
    length = min(128, layout.facts.context)
    base = {**USUAL, "data": {"tokenizer": str(checkpoint.path), "length": length}, "model": {"context": layout.facts.context}}
    changed(
        deepcopy(base), settings, data__sources=data, steps=steps
    )  # what is wrong with the settings is said before models are read
    student = Pretrained(open_model(checkpoint, "float32"))
    teacher = None if against is None else Pretrained(open_model(against))
    tuning = tuned.make(name, student, teacher, options)
    usual = deepcopy(base) | {"optimiser": {**USUAL["optimiser"], "rate": tuning.rate}}
    config = changed(usual, settings, data__sources=data, steps=steps)
    work = output.with_name(output.name + ".training")
    report = Progress(quiet or as_json)
    with stopping() as stop:
        loop = tuned.loop_of(config, student, tuning, work, Group(), report)
        report.begin(loop)
        summary = loop.run(stop)
    if summary["stopped"]:
        say(f"stopped after step {summary['steps']} of {summary['of']}; the same command goes on")
        return INTERRUPTED
    before = loop_evaluation(work)
    whole = output.with_name(output.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    left = tuned.finish(loop, student, tuning, whole)
    plan = record_of(name, checkpoint, layout, left, f"{summary['steps']} steps on {', '.join(config.data.sources)}", options)
    if left.kept is None:
        write_record(plan, checkpoint, layout.facts, whole)
        whole.replace(output)
    else:
        pruned(plan, checkpoint, whole, left.kept, output)
    shutil.rmtree(work)
    found = {
        "output": str(output),
        "method": plan.method,
        "before": before,
        "after": summary["evaluation"],
        "steps": summary["steps"],
        "rate": config.optimiser.rate,
    }
    if as_json:
        emit(found)
    else:
        text = "".join(f", {label} {e['loss']:.4f}" for label, e in (("before", before), ("after", found["after"])) if e)
        print(f"{output}: {summary['steps']} steps" + (f"; held-out loss{text[1:]}" if text else ""))
    return 0


def loop_evaluation(work: Path) -> dict[str, Any]:
    """The evaluation before the first step; {} when nothing was held out."""
    import json

    rows = map(json.loads, (work / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return next((row["evaluation"] for row in rows if row["step"] == 0 and "evaluation" in row), {})


def record_of(
    name: str, checkpoint: Checkpoint, layout: Layout, left: Left, said: str, options: dict[str, Any]
) -> CompressionPlan:
    """The plan that the result's moestro.json holds: that of the model it was made from, or one that keeps every expert; and this step."""
    from dataclasses import replace

    from moestro.compress.record import MANIFEST, read_plan_of
    from moestro.core.method import card_of, load
    from moestro.core.plan import Subject
    from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot

    full, facts = card_of(load(name, "tuning")).name, layout.facts
    if (checkpoint.path / MANIFEST).exists():
        plan = read_plan_of(checkpoint.path)
        plan = replace(plan, method=f"{plan.method} > {full}", options={**plan.options, full: options}, judged=())
    else:
        whole = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in range(la.num_experts))) for la in facts.layers)
        plan = CompressionPlan(
            subjects=(Subject(checkpoint.source, facts.fingerprint),), method=full, options=options, layers=whole,
            sizes=(facts.expert_bytes, facts.expert_bytes),
        )  # fmt: skip
    if left.taps:
        plan = replace(plan, layers=tuple(replace(la, taps=taps) for la, taps in zip(plan.layers, left.taps, strict=True)))
    return replace(plan, stated=(*plan.stated, f"trained by {full}: {said}"))


def pruned(plan: CompressionPlan, checkpoint: Checkpoint, whole: Path, kept: tuple[tuple[int, ...], ...], output: Path) -> None:
    """Write only the kept experts of the trained model `whole`, with the plan cut to them."""
    from dataclasses import replace

    from moestro.compress.executor import compress
    from moestro.compress.record import write_record
    from moestro.core.plan import Subject
    from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    trained = Checkpoint.open(whole)
    layout = describe(trained)
    cut = tuple(LayerChange(i, tuple(Slot((e,)) for e in ids)) for i, ids in enumerate(kept))
    subject = (Subject(trained.source, layout.facts.fingerprint),)
    compress(CompressionPlan(subjects=subject, method=plan.method, layers=cut), trained, layout, output)
    layers = []
    for la, ids in zip(plan.layers, kept, strict=True):
        rows = [la.routed[e] for e in ids]
        slots = tuple(la.slots[row.slot] for row in rows)
        layers.append(replace(la, slots=slots, rows=tuple(replace(row, slot=i) for i, row in enumerate(rows)) if la.rows else ()))
    size = describe(Checkpoint.open(output)).facts.expert_bytes
    write_record(replace(plan, layers=tuple(layers), sizes=(plan.sizes[0], size)), checkpoint, layout.facts, output)
    shutil.rmtree(whole)
