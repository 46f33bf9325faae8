"""A few steps of every method over prepared text, in however many processes torchrun has started: `python -m tests.train.trained TOKENS RESULT`."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path

import torch

from moestro.core.errors import MoestroError
from moestro.layers.decoder import build
from moestro.train.checkpoint import tensors_of
from moestro.train.config import changed
from moestro.train.data.stream import Stream
from moestro.train.data.tokens import Tokens, open_tokens
from moestro.train.loop import Loop
from moestro.train.objective import make
from moestro.train.parallel import Group, joined
from tests.train.methods import DIGITS, MODEL, ROWS, settings

STEPS = 2
NAMES = [name for name in ROWS if settings(name).get("data") is not DIGITS]


def losses(name: str, tokens: Tokens, folder: Path, group: Group, micro_batch: int = 0) -> list[float]:
    """The loss of each step, and NaN after them when the processes' weights or buffers have come apart."""
    asked = settings(name)
    config = changed({**asked, "model": MODEL | asked["model"], "data": {"length": 16}, "micro_batch": micro_batch})
    stream = Stream(tokens, length=16, holdout=0.1, weights={}, seed=0)
    phases = [make(part, "training schedule") for part in config.phases]
    objective = make(config.objective, "objective")
    loop = Loop(config, build(config.model), stream, folder, objective=objective, phases=phases, group=group)
    found = [loop.train_step()["loss"] for _ in range(STEPS)]
    try:
        group.check_equal(tensors_of(loop.modules).values(), STEPS)
    except MoestroError:  # in every process
        found.append(math.nan)
    return found


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    tokens, result = map(Path, sys.argv[1:])
    with joined() as group:
        found = {name: losses(name, open_tokens(tokens), result.parent, group) for name in NAMES}
        if group.first:
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
