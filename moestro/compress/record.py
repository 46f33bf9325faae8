"""What a compressed model carries with it: moestro.json (the plan, where it came from, what it was found to cost) and a model card."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moestro
from moestro.core.errors import CheckpointError, StorageError
from moestro.core.layer import ModelFacts
from moestro.core.plans.compression import CompressionPlan, TaskScore, written
from moestro.models.checkpoint import Checkpoint

MANIFEST, CARD = "moestro.json", "README.md"


def write_record(plan: CompressionPlan, source: Checkpoint, facts: ModelFacts, folder: Path) -> None:
    """Write both files. Raises StorageError."""
    record = {
        "moestro": moestro.__version__,
        "source": {"model": source.source, "fingerprint": source.fingerprint},
        "experts": {"before": facts.layers[0].num_experts, "after": plan.experts},
        "plan": plan.to_json(),
    }
    save(folder, record)


def read_plan_of(folder: Path) -> CompressionPlan:
    """The plan by which a folder was made, with what was measured. Raises CheckpointError when it was not made by one."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return CompressionPlan.from_json(record["plan"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no {MANIFEST} of a compression",
            expected="a model made by `moestro apply`",
            fix="name its plan with --plan",
        ) from error


def update_record(plan: CompressionPlan, folder: Path) -> None:
    """Put the plan's new measurements into the files of a folder made by it. Raises StorageError."""
    record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    save(folder, record | {"plan": plan.to_json()})


def save(folder: Path, record: dict[str, Any]) -> None:
    for name, text in ((MANIFEST, json.dumps(record, indent=1) + "\n"), (CARD, card(record))):
        temporary = folder / (name + ".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, folder / name)
        except OSError as error:
            raise StorageError(
                f"{folder / name} cannot be written: {error.strerror}", fix="check the folder's permissions"
            ) from error


def card(record: dict[str, Any]) -> str:
    """The model card in Markdown, its metadata as the Hub reads them."""
    plan, source = CompressionPlan.from_json(record["plan"]), record["source"]["model"]
    head = ["---", "library_name: transformers", "tags:", "- moestro", "- mixture-of-experts", "- compressed"]
    if source.count("/") == 1 and not Path(source).exists():
        head.insert(1, f"base_model: {source.partition('@')[0]}")
    lines = [
        *head,
        "---",
        f"# {Path(source).name}, compressed",
        "",
        f"Made by moestro {record['moestro']} from `{source}` with `{plan.method}`.",
    ]
    lines += ["", *(f"- {line}" for line in plan.summary().splitlines() if not line.startswith("measured on"))]
    if texts := [j for j in plan.judged if j.loss is not None]:
        lines += [
            "",
            "| text | tokens | perplexity | original | change | KL to original | routing agreement |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {j.data} | {j.tokens} | {j.perplexity:.4f} | {j.reference:.4f} | {100 * j.loss:+.2f} % | {j.kl:.4f} ± {j.kl_error:.4f} | {100 * j.agreement:.1f} % |"  # type: ignore[operator]
            for j in texts
        ]
    if scores := [score for j in plan.judged for score in j.tasks]:
        lines += [
            "",
            "| task | examples | metric | documents | score | original | right to wrong | wrong to right | sign test p |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(score) for score in scores),
        ]
    if not plan.judged:
        lines += ["", f"What it costs has not been measured: `moestro eval FOLDER --against {source} --data TEXT`."]
    return "\n".join([*lines, "", f"Options: `{json.dumps(plan.options)}`. The whole plan is in {MANIFEST}.", ""])


def _row(score: TaskScore) -> str:
    documents = f"the first {score.documents}" if score.limited else f"{score.documents}"
    pair = ("", "", "") if score.chance is None else (score.lost, score.gained, f"{score.chance:.2g}")
    values = (written(score.value, score.error), written(score.reference, score.reference_error))
    cells = (score.task, score.fewshot, score.metric, documents, *values, *pair)
    return f"| {' | '.join(map(str, cells))} |"


def judged_row(plan: CompressionPlan) -> dict[str, Any]:
    """The newest measurement as plain data."""
    return asdict(plan.judged[-1])
