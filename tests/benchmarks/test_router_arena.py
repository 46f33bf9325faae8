"""The router arena whole, at a tiny size, and what its figures mean."""

import importlib.resources
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import arena_page  # noqa: E402
import arena_summary  # noqa: E402
import router_arena  # noqa: E402
import speed_page  # noqa: E402
from arena_contenders import BASELINE, LEFT_OUT, Shape, contenders  # noqa: E402

from moestro.layers.decoder import build  # noqa: E402
from moestro.layers.stages import mask_of  # noqa: E402
from moestro.train.data.tokens import prepare  # noqa: E402

TINY = ["--set", "d_model=16", "d_expert=12", "steps=10", "length=32", "batch=4", "held_out=3", "layers=2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A work folder whose text is there already: four short domains that are told apart easily."""
    folder = tmp_path_factory.mktemp("work")
    letters = {"documentation": "abcdefgh", "code": "ijklmnop", "names": "QRSTUVWX", "licences": "0123456789"}
    rng = np.random.default_rng(0)
    prepare(((name, "".join(rng.choice(list(some), 4000))) for name, some in letters.items()), "bytes", folder / "tokens")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arena(work: Path, *options: str) -> dict:
    out = work / "arena.json"
    assert router_arena.main(["--work", str(work), "--out", str(out), "--rounds", "2", *TINY, *options]) == 0
    return json.loads(out.read_text())


def test_every_method_that_can_takes_part():
    catalogue = json.loads(importlib.resources.files("moestro").joinpath("catalogue.json").read_text("utf-8"))
    rows = catalogue if isinstance(catalogue, list) else catalogue["methods"]
    wanted = {
        r["name"] for r in rows if r["name"].startswith("layers.") and r["kind"] in ("router", "loss", "block", "architecture")
    }
    plain = {"layers.blocks.routed", "layers.architectures.decoder"}  # what all others vary
    there = {name for c in contenders(Shape()) for name in c.methods}
    assert wanted - plain - set(LEFT_OUT) <= there and not set(LEFT_OUT) & there
    assert there <= {r["name"] for r in rows}


def test_sizes_are_equal_where_nothing_is_said(work):
    data, tokens = router_arena.prepared(work / "tokens")
    shape, sizes = Shape(), {}
    for c in contenders(shape):
        config = c.config(shape, replace(data, length=shape.length), tokens.vocabulary, 0)
        sizes[c.name] = sum(p.numel() for p in build(config.model).parameters())
    far = {name for name, size in sizes.items() if abs(size / sizes[BASELINE] - 1) > arena_summary.NEAR}
    assert far == {"dense, equal active", "prototypes", "HoME", "Hecto", "language experts"}


def test_an_arena_stops_and_goes_on(work, capsys):
    some = ["--only", "hash", "Chain-of-Experts", "dense, equal active", "top-p"]
    first = arena(work, *some, "--seeds", "0", "--parts", "train")
    assert len(first["cells"]) == 5 and first["summary"]["noise"]["margin"] is None
    report = arena(work, *some, "--seeds", "0", "1")
    assert all(report["cells"][name] == cell for name, cell in first["cells"].items())
    rows = {r["name"]: r for r in report["summary"]["rows"]}
    base = rows[BASELINE]
    assert base["difference"]["mean"] == 0 and base["active"] == 2 and base["equal_size"] and base["sizes"] == [1, 1]
    assert base["difference"]["interval"] is None and rows["hash"]["difference"]["interval"][0] < 0.2
    assert rows["hash"]["churn"] == 0 and rows["hash"]["active"] == 1
    assert rows["hash"]["information"] > 0.05  # each letter belongs to one domain, each expert has four letters
    assert rows["top-p"]["multiply_adds"] > base["multiply_adds"] and not rows["top-p"]["equal_size"]
    assert "active" not in rows["dense, equal active"] and rows["dense, equal active"]["parameters"] < base["parameters"]
    assert {len(r["seeds"]) for r in rows.values()} == {2} and report["summary"]["noise"]["margin"] > 0
    assert all(r["times_baseline"]["median"] > 0 for r in rows.values())
    assert "dispatch_share" in base and "dispatch_share" not in rows["dense, equal active"]
    assert BASELINE in capsys.readouterr().out
    shown(report, work)
    changed = arena(work, "--only", "hash", "--seeds", "0", "--parts", "train", "--set", *TINY[1:], "steps=12")
    assert len(changed["cells"]) == 2  # another shape is another arena


def shown(report: dict, folder: Path) -> None:
    """The page and the pictures of a report."""
    for make in arena_page.FIGURES.values():
        text = make(report)
        assert text.endswith("\n") and text != arena_page.MISSING
    assert all(f"{row['loss']:.3f}" in arena_page.table(report) for row in report["summary"]["rows"])
    assert "cannot be told" in arena_page.verdict(report) or "by more than that margin" in arena_page.verdict(report)
    made = arena_page.pictures(report, folder / "images")
    assert len(made) == 4 and all(path.stat().st_size > 5000 for path in made)


def test_the_pages_blocks_can_all_be_filled(tmp_path):
    page = arena_page.PAGE.read_text("utf-8")
    assert {found[2] for found in speed_page.BLOCK.finditer(page)} == set(arena_page.FIGURES)
    empty = arena_page.filled(page, tmp_path)
    assert empty.count(arena_page.MISSING) == len(arena_page.FIGURES)


def test_every_contender_trains_and_is_read(work):
    report = arena(work, "--seeds", "0", "--parts", "train", "--set", *TINY[1:], "steps=5", "d_model=32")
    assert len(report["cells"]) == len(contenders(Shape()))
    for name, cell in report["cells"].items():
        assert "error" not in cell, f"{name}: {cell['error']}"
        assert np.isfinite(cell["loss"]) and cell["multiply_adds"] > 0, name
        assert "dense" in name or (0 <= cell["churn"] <= 1 and cell["maxvio"] >= 0 and -1 < cell["information"] <= 1), name


def test_training_that_breaks_is_a_result(work, monkeypatch):
    report = arena(work, "--only", "hash", "--seeds", "0", "--parts", "train", "--fresh", "--set", *TINY[1:], "rate=1e30")
    rows = {r["name"]: r for r in report["summary"]["rows"]}
    assert "error" in rows[BASELINE] and "broke" in arena_summary.table(report["summary"])


def test_churn_counts_sets_not_their_order():
    a = torch.tensor([[0, 1], [2, 3], [1, 0]])
    b = torch.tensor([[1, 0], [2, 1], [1, -1]])
    assert router_arena.churn([mask_of(a, 4)], [mask_of(b, 4)]) == pytest.approx(2 / 3)


def test_information_is_one_for_experts_of_a_domain_and_none_by_chance():
    domain_S = np.repeat(np.arange(4), 25)
    own = torch.nn.functional.one_hot(torch.from_numpy(domain_S).repeat_interleave(8), 4).bool()
    found, null = router_arena.domain_information([own], domain_S, 0)
    assert found + null == pytest.approx(1) and null < 0.1
    drawn = torch.nn.functional.one_hot(torch.randint(4, (800,), generator=torch.Generator().manual_seed(0)), 4).bool()
    found, null = router_arena.domain_information([drawn], domain_S, 0)
    assert abs(found) < 0.01 < found + null + 0.01


def test_the_margin_is_tukeys():
    rng = np.random.default_rng(0)
    truth, order = np.linspace(0, 1, 40), rng.normal(size=3)
    found = arena_summary.spread((truth[:, None] + order + 0.05 * rng.normal(size=(40, 3))).tolist())
    assert found["sd"] == pytest.approx(0.05, rel=0.25)  # neither the contenders nor the seeds count as noise
    assert 5 < found["margin"] / (found["sd"] / 3**0.5) < 7  # the studentised range of 40 means
    assert arena_summary.spread([[1.0], [2.0]])["margin"] is None


def test_a_difference_is_paired_by_seed_and_its_interval_is_that_of_all():
    base = {s: {"loss": loss} for s, loss in enumerate((2.0, 3.0, 4.0))}
    mine = {s: {"loss": loss} for s, loss in enumerate((1.9, 2.9, 3.9))}
    noise = {"sd": 0.05, "free": 78}
    found = arena_summary.difference(mine, base, noise)
    assert found["mean"] == pytest.approx(-0.1) and found["each"] == pytest.approx([-0.1] * 3)
    assert found["interval"] == pytest.approx(
        [-0.1 - 1.991 * 0.05 * (2 / 3) ** 0.5, -0.1 + 1.991 * 0.05 * (2 / 3) ** 0.5], abs=1e-4
    )
    assert arena_summary.difference(base, base, noise)["interval"] is None
    assert arena_summary.difference(mine, base, {"sd": None})["interval"] is None


def test_a_seed_that_is_not_finished_does_not_count():
    contenders = {name: {} for name in "abcdefghijk"}
    cells = {f"{name} / {seed}": {"loss": 1.0} for name in contenders for seed in (0, 1)}
    cells |= {"a / 2": {"loss": 5.0}, "k / time": {"ms": 1.0}, "gone / 0": {"loss": 9.0}}
    found = arena_summary._by_name(cells, contenders)
    assert {name: sorted(seeds) for name, seeds in found.items()} == {name: [0, 1] for name in contenders}
