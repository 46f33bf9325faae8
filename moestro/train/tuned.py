"""A method of kind 'tuning': what it is given, what it leaves, and the run that joins it with a pretrained model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.method import card_of, check_options, load
from moestro.core.plans.compression import TapUse
from moestro.models.taps import ARRAYS
from moestro.train.config import TrainConfig
from moestro.train.data.stream import Batch, Stream
from moestro.train.data.text import read
from moestro.train.data.tokens import open_tokens, prepare
from moestro.train.loop import Loop, Report
from moestro.train.objective import Objective, Phase
from moestro.train.parallel import Group
from moestro.train.pretrained import Pretrained, changed_names, save


@dataclass(frozen=True, slots=True)
class Left:
    """What a tuning leaves beside trained weights. taps: for each MoE layer; arrays: what they read; kept: experts that stay, or None."""

    taps: tuple[tuple[TapUse, ...], ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """objective and phases: as the loop takes them. finish: folds what was trained into the model and says what else is left.

    rate: of learning, where nobody says another; the default is for training every weight that was trained before.
    """

    objective: Objective
    phases: tuple[Phase, ...] = ()
    finish: Callable[[], Left] = Left
    rate: float = 1e-4


def make(name: str, student: Pretrained, teacher: Pretrained | None, options: Mapping[str, Any]) -> Tuning:
    """The tuning of this name. teacher: the original, frozen. Raises InputError for unknown options and for a missing teacher."""
    fn = load(name, "tuning")
    card = card_of(fn)
    check_options(card, options)
    if "teacher" in card.needs and teacher is None:
        raise InputError(f"{card.name} learns from the original", expected="the original model", fix="name it with --against")
    return fn(student, teacher, **options)


def loop_of(
    config: TrainConfig, student: Pretrained, tuning: Tuning, folder: Path, group: Group, report: Report | None = None
) -> Loop:
    """The run in `folder`, after its newest checkpoint if it has one; its text is prepared where it is not. Raises as `session.start`."""
    if not (folder / "tokens").exists():
        if not config.data.sources:
            raise InputError("no text is given", expected="files, folders or installed[:DOMAIN]", fix="--data WHERE")
        documents = (row for spec in config.data.sources for row in read(spec, field=config.data.text_field))
        folder.mkdir(parents=True, exist_ok=True)
        prepare(documents, config.data.tokenizer, folder / "tokens")
    try:
        return _loop(config, student, tuning, folder, group, report)
    except InputError:
        if not (folder / "checkpoints").exists():  # another text may be given next time
            shutil.rmtree(folder)
        raise


def _loop(config: TrainConfig, student: Pretrained, tuning: Tuning, folder: Path, group: Group, report: Report | None) -> Loop:
    data, facts = config.data, student.model.facts
    tokens = open_tokens(folder / "tokens")
    if data.mask_documents or config.model.vocabulary > facts.vocabulary:
        raise InputError(
            "documents cannot be masked in a pretrained model" if data.mask_documents else "the tokenizer is of another model",
            expected="the model's own tokenizer, sequences read whole",
        )
    stream = Stream(tokens, length=data.length, holdout=data.holdout, weights=data.weights, seed=config.seed)
    loop = Loop(config, student, stream, folder, objective=tuning.objective, phases=tuning.phases, group=group, report=report)
    loop.resume()
    return loop


def finish(loop: Loop, student: Pretrained, tuning: Tuning, out: Path) -> Left:
    """Write the tuned model as the folder `out`, with the arrays of its taps. Raises StorageError."""
    names = changed_names(student)
    left = tuning.finish()
    made = save(student, names, out)
    if left.arrays:
        from safetensors.numpy import save_file

        (made.path / ARRAYS).parent.mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(a) for name, a in left.arrays.items()}, made.path / ARRAYS)
    return left


def distance(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of KL(teacher || student) at a temperature, times its square, in nats and float32."""
    log_q = functional.log_softmax(student_BTV.float() / temperature, -1)
    log_p = functional.log_softmax(teacher_BTV.float() / temperature, -1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean() * temperature**2


def taught(teacher: Pretrained, batch: Batch) -> Tensor:
    """The teacher's logits_BTV."""
    with torch.no_grad():
        return teacher.logits(batch.tokens_BT)
