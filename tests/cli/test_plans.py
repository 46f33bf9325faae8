"""inspect, plan residency and replay on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.cli.replay import parse_budgets
from moestro.core.errors import InputError
from moestro.core.plan import read_plan
from moestro.core.trace import Trace


@pytest.fixture(scope="session")
def fingerprint(tiny):
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    return describe(Checkpoint.open(tiny)).facts.fingerprint


@pytest.fixture
def trace(tmp_path, fingerprint):
    """120 decoded tokens on the tiny model's 3 layers of 4 experts, each expert staying with probability 0.7."""
    rng = np.random.default_rng(0)
    tokens = 120
    ids = np.zeros((3, tokens, 2), np.int16)
    for layer in range(3):
        now = rng.permutation(4)[:2]
        for t in range(tokens):
            if rng.random() > 0.7:
                now = rng.permutation(4)[:2]
            ids[layer, t] = now
    steps = np.arange(tokens, dtype=np.int32)
    zeros = np.zeros(tokens, np.int32)
    weights = np.full(ids.shape, 0.5, np.float16)
    made = Trace(zeros, zeros, steps, steps, (steps < 1).astype(np.uint8), ids, weights, (4, 4, 4), fingerprint)
    made.save(tmp_path / "a.trace")
    return tmp_path / "a.trace"


def test_inspect(moestro, tiny, fingerprint):
    data = moestro("inspect", tiny, "--json").json
    assert data["family"] == "mixtral" and data["fingerprint"] == fingerprint and len(data["layers"]) == 3
    sizes = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert sizes * 0.9 < data["total_bytes"] <= sizes, "all but the headers"
    layer = data["layers"][0]
    assert data["active_expert_bytes_per_token"] == 3 * layer["top_k"] * layer["expert_bytes"]
    assert layer["expert_bytes"] == 4 * 3 * layer["spec"]["d_model"] * layer["spec"]["d_expert"]
    assert "softmax over all experts" in layer["router_in_words"] and "renormalised" in layer["router_in_words"]
    rows = data["budgets"]
    assert all(row["works"] and row["slots"] >= layer["top_k"] for row in rows)
    assert rows[-1]["resident_share"] == 1 and rows[-1]["forecast"]["hit_rate"] == 1
    assert [row["slots"] for row in rows] == sorted(row["slots"] for row in rows)


def test_inspect_for_people(moestro, tiny):
    done = moestro("inspect", tiny, "--no-probe", "--budgets", "1MiB,64GiB")
    assert done.code == 0 and "0-2" in done.out and "not measured" in done.out
    small, large = done.out.splitlines()[-2:]
    assert "too small" in small and "works" in small and "100 %" in large


@pytest.mark.parametrize("budgets", ["much", "0", "1GiB,"])
def test_inspect_refuses_budgets(moestro, tiny, budgets):
    assert moestro("inspect", tiny, "--budgets", budgets).code == 2


def test_plan_residency(moestro, tiny, fingerprint, tmp_path):
    path = tmp_path / "plan.json"
    done = moestro("plan", "residency", tiny, "--memory", "8GiB", "-o", path, "--ctx-size", 64, "--json")
    plan = read_plan(path)
    assert done.code == 0 and plan.subjects[0].fingerprint == fingerprint and str(path) in done.err
    assert done.json["slots"] == [12] and done.json["context"] == 64 and done.json["memory"]["budget"] == 8 * 2**30
    assert "12 (global)" in moestro("plan", "residency", tiny, "--memory", "8GiB", "--quiet").out


def test_plan_residency_takes_policies_by_name(moestro, tiny):
    done = moestro(
        "plan", "residency", tiny, "-m", "8GiB", "--eviction", "lfu", "--predictor", "previous", "--scope", "layer", "--json"
    )
    assert done.json["eviction"] == "engine.evict.lfu" and done.json["predictor"] == "engine.predict.previous"
    assert done.json["scope"] == "layer" and done.json["slots"] == [4, 4, 4]
    for wrong in ("nonsense", "belady", "lru:nonsense=1", "lru:nonsense"):
        refused = moestro("plan", "residency", tiny, "-m", "8GiB", "--eviction", wrong)
        assert refused.code == 2 and refused.out == "", wrong


def test_plan_residency_chooses_by_a_trace(moestro, tiny, trace):
    done = moestro("plan", "residency", tiny, "-m", "8GiB", "--trace", trace, "--json")
    assert done.code == 0 and list(done.json["inputs"]) == ["trace"]


def test_replay(moestro, tiny, trace):
    data = moestro("replay", trace, tiny, "--budgets", "25%,50%,100%", "--json").json
    assert [b["slots"] for b in data["budgets"]] == [3, 6, 12] and data["experts"] == 12
    rates = {(r["routing"], r["eviction"], r["slots"][0]): r["decode"]["hit_rate"] for r in data["reports"]}
    for (routing, name, slots), rate in rates.items():
        bound = rates[routing, "engine.evict.belady", slots]
        assert rate <= bound + 1e-9, (routing, name, slots)
    assert rates["trace", "engine.evict.lru", 6] > rates["uniform", "engine.evict.lru", 6], "the trace has locality"
    assert all(r["decode"]["missed_bytes_per_token"] >= 0 for r in data["reports"])
    text = moestro("replay", trace, "--budgets", "25%,50%", "--policies", "lru,lfu").out
    assert "3 slots (25 %)" in text and "lru" in text and "belady" in text and "uniform" in text and "arc" not in text


def test_replay_draws(moestro, trace, tmp_path):
    done = moestro("replay", trace, "--budgets", "25%,50%,75%", "--png", tmp_path / "deep" / "hits.png", "--quiet")
    assert done.code == 0 and done.err == ""
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "deep" / "hits.png")
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50, "lines of several colours"
    (tmp_path / "file").write_text("")
    assert moestro("replay", trace, "--png", tmp_path / "file" / "hits.png").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--budgets", "2%"),
        ("--budgets", "1GiB"),
        ("--budgets", "150%"),
        ("--budgets", ""),
        ("--policies", "nonsense"),
        ("--scope", "wide"),
    ],
)
def test_replay_refuses(moestro, trace, arguments):
    done = moestro("replay", trace, *arguments)
    assert done.code == 2 and done.out == "" and done.err.startswith("moestro: ")


def test_budgets():
    assert parse_budgets("25%, 0.5,1") == [0.25, 0.5, 1]
    assert parse_budgets("2GiB,500MB") == [2 * 2**30, 5e8]
    with pytest.raises(InputError):
        parse_budgets("2")
