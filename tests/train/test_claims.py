"""What papers say of training with their method, where it shows within seconds on real text: load, active experts, collapse. No losses are compared."""

from __future__ import annotations

import pytest
import torch

from moestro.layers.decoder import build
from moestro.layers.reduce import counts
from moestro.train.config import changed
from moestro.train.data.installed import text
from moestro.train.data.stream import Stream
from moestro.train.data.tokens import Tokens, prepare
from moestro.train.loop import Loop
from moestro.train.objective import make

MODEL = {"d_model": 32, "layers": 2, "heads": 2, "num_experts": 8, "top_k": 2, "d_expert": 16, "init_std": 0.1}
STEPS = 60


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Tokens:
    documents = [(domain, text(domain, 60_000)) for domain in ("documentation", "code", "names")]
    return prepare(documents, "bytes", tmp_path_factory.mktemp("real") / "tokens")


@pytest.fixture
def trained(real, tmp_path):
    """trained(router, ...) -> (the log's entries, the routings of held-out text)."""

    def run(router, **model):
        config = changed(
            {
                "model": MODEL | {"router": router} | model,
                "data": {"length": 32},
                "batch": 8,
                "steps": STEPS,
                "optimiser": {"rate": 0.01},
            }
        )
        stream = Stream(real, length=32, holdout=0.1, weights={}, seed=0)
        loop = Loop(config, build(config.model), stream, tmp_path, objective=make(config.objective, "objective"))
        log = [loop.train_step() for _ in range(STEPS)]
        places = [place for rows in stream.held_out_places(16) for place in rows]
        with torch.no_grad():
            return log, loop.module.eval()(stream.gather(places).tokens_BT).routings

    return run


def late(entries, name: str) -> float:
    """The mean over the last 20 steps."""
    return sum(entry[name] for entry in entries[-20:]) / 20


def loads(routing) -> torch.Tensor:
    return counts(routing.experts_TK, routing.logits_TE.shape[1])


def test_switch(trained):
    """The balance loss evens the loads, and a capacity of 1.25 then drops fewer tokens."""
    (free, _), (even, _) = (trained({"name": "switch", "balance": b}, top_k=1) for b in (0.0, 0.1))
    assert late(even, "maxvio") < 0.6 * late(free, "maxvio") and late(even, "dropped") < 0.5 * late(free, "dropped")


def test_noisy_topk(trained):
    """From a gate of zeros it collapses without its losses, and with them it does not."""
    (free, _), (even, _) = (trained({"name": "noisy_topk", "importance": w, "load": w}) for w in (0.0, 0.1))
    assert late(free, "maxvio") > 1 and late(even, "maxvio") < 0.4


def test_loss_free(trained):
    """A bias on the choice evens the loads without any loss."""
    taps = [{"name": "loss_free", "rate": 0.01}]
    (free, _), (even, _) = (trained({"name": "topk", "balance": 0.0}, taps=t) for t in ([], taps))
    assert late(even, "maxvio") < 0.5 * late(free, "maxvio")


def test_top_p(trained):
    """Fewer experts per token as training goes on; without the entropy loss more of them."""
    (sharp, _), (flat, _) = (trained({"name": "top_p", "entropy": beta}, top_k=1) for beta in (0.01, 0.0))
    assert late(sharp, "active") < 0.93 * late(flat, "active") and late(sharp, "active") < sharp[0]["active"]


def test_adamoe(trained):
    """Null experts take their share of the slots, and tokens differ in how many true ones they have."""
    log, routings = trained({"name": "adamoe", "balance": 0.1}, top_k=4, special=[{"name": "zero", "count": 8}])
    true_T = ((routings[1].experts_TK >= 0) & (routings[1].experts_TK < 8)).sum(1).float()
    assert late(log, "active") == pytest.approx(4 * 8 / (8 + 8), rel=0.1) and float(true_T.var()) > 0.1


def test_moe_plus_plus(trained):
    """The smaller tau, the fewer feed-forward experts per token."""
    special = ["zero", "copy", {"name": "constant", "count": 2}]
    dear, cheap = (
        late(trained({"name": "moe_plus_plus", "tau": tau, "balance": 0.1}, special=special)[0], "active") for tau in (0.75, 0.1)
    )
    assert cheap < 0.6 * dear < 1.2


def test_hmoe(trained):
    """Charged by size, small experts are used more than large ones, and a token meets fewer parameters."""
    widths = torch.tensor([9.0, 11, 13, 15, 17, 19, 21, 23])
    found = []
    for penalty in (0.0, 0.1):
        experts = {"name": "widths", "widths": widths.int().tolist()}
        _, routings = trained({"name": "hmoe", "penalty": penalty}, experts=experts)
        load_E = torch.stack([loads(routing) for routing in routings]).sum(0)
        correlation = torch.corrcoef(torch.stack((widths, load_E)))[0, 1]
        found.append((float(correlation), float((load_E * widths).sum() / load_E.sum())))
    (free, wide), (charged, narrow) = found
    assert charged < -0.6 < -0.2 < free and narrow < 0.93 * wide
