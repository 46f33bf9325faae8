"""The compression benchmark whole, at a tiny size, and what its figures mean."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compression as bench  # noqa: E402
import compression_grid  # noqa: E402
import compression_page  # noqa: E402
import recovery_page  # noqa: E402
import speed_page  # noqa: E402

from moestro.compress.planner import KINDS  # noqa: E402
from moestro.core import catalogue as pages  # noqa: E402
from moestro.core.experts import ExpertKey  # noqa: E402
from moestro.core.method import catalogue  # noqa: E402
from moestro.models.checkpoint import Checkpoint  # noqa: E402
from moestro.models.families import describe  # noqa: E402
from moestro.profile.profile import Profile  # noqa: E402


@pytest.fixture(scope="module")
def reduced(tmp_path_factory) -> dict:
    """A reduced run of which one cell was there before and one is of an older plan."""
    before, work = torch.get_num_threads(), tmp_path_factory.mktemp("work")
    out = work / "out.json"
    assert bench.main(["--reduced", "--work", str(work), "--out", str(out), "--only", "random"]) == 0
    report = json.loads(out.read_text())
    kept, stale = "planted / random / -12.5 % / 0", "planted / random / -25 % / 0"
    report["cells"][kept]["mark"], report["cells"][stale] = True, report["cells"][stale] | {"key": "older", "mark": True}
    out.write_text(json.dumps(report))
    for only in ("random", "reap", "hierarchical + frequency"):
        assert bench.main(["--reduced", "--work", str(work), "--out", str(out), "--only", only]) == 0
    torch.set_num_threads(before)
    report = json.loads(out.read_text())
    assert report["cells"][kept].get("mark") and "mark" not in report["cells"][stale]
    return report


def test_every_method_that_makes_plans_takes_part():
    cells = compression_grid.grid((*bench.REMOVING, *bench.OTHER), 384)
    there = {m for cell in cells for m in cell.methods}
    assert {r["name"] for r in catalogue() if r["kind"] in (*KINDS, *compression_grid.BEFORE, "fuse", "bits")} <= there
    assert {c.kind for c in cells} == {*KINDS, "bits", "several"}
    names = [(c.name, c.level) for c in cells]
    assert len(names) == len(set(names)) and len({c.key for c in cells}) == len(cells)


def test_idle_experts_cost_nothing_and_the_curve_says_so(reduced):
    rows = {(r["name"], r["level"]): r for r in reduced["summary"]}
    assert len(rows) == 18
    quarter = rows["reap", "-25 %"]  # 3 of 12 experts are idle
    assert quarter["agreement"] == 1 and quarter["ratio"] == pytest.approx(1, abs=1e-6) and quarter["bits"] == 12
    assert rows["random", "-25 %"]["agreement"] < 0.95
    tables = reduced["methods"]["tables"]
    assert tables == {}  # the planted model is no subject of the page


def test_the_page_and_its_pictures_can_be_made(reduced, tmp_path):
    page = compression_page.PAGE.read_text("utf-8")
    figures = set(compression_page.FIGURES) | set(recovery_page.FIGURES)
    assert {found[2] for found in speed_page.BLOCK.finditer(page)} == figures
    assert compression_page.filled(page, tmp_path).count(compression_page.MISSING) == len(figures)
    report = json.loads(json.dumps(reduced).replace('"planted"', '"mixed"'))
    assert "| reap | -50 % | 8.00 |" in compression_page.FIGURES["mixed"](report).replace("**", "")
    assert compression_page.front(report).count("| the model trained here |") == sum(r["front"] for r in report["summary"])
    (picture,) = compression_page.pictures(report, tmp_path)
    assert 5000 < picture.stat().st_size < 300_000


def test_a_claim_is_judged_seed_by_seed():
    def cell(name: str, seed: int, ratio: float) -> dict:
        said = {"model": "mixed", "name": name, "level": "int4:64", "kind": "encode", "seed": seed, "methods": ["x.y"]}
        return said | dict.fromkeys(("ratio", "bits", "kl", "agreement", "bytes", "expert_bytes"), ratio)

    cells = {str(i): cell(*row) for i, row in enumerate((("gptq", 0, 1.1), ("gptq", 1, 1.4), ("rtn", 0, 1.2)))}
    report = {"cells": cells, "summary": bench.summary(cells)}
    claim = compression_page.pair(report, "better", "mixed", ("gptq", "int4:64"), ("rtn", "int4:64"))
    assert claim is not None and claim[-2:] == ["1 of 2 seeds"] * 2
    gptq = next(r for r in report["summary"] if r["name"] == "gptq")
    assert (gptq["low"], gptq["high"], gptq["seeds"]) == (1.1, 1.4, [0, 1]) and gptq["ratio"] == pytest.approx((1.1 * 1.4) ** 0.5)
    assert compression_page.pair(report, "better", "mixed", ("gptq", "int4:64"), ("hqq", "int4:64")) is None
    told = bench.by_method(report["summary"])["tables"]["x.y"]
    assert len(told) == 2 and told[0][1] == "gptq"


def test_the_front_is_what_no_other_plan_beats():
    def cell(name: str, bits: float, ratio: float, model: str = "mixed") -> dict:
        said = {"model": model, "name": name, "level": "", "kind": "encode", "seed": 0, "methods": ["x"], "bits": bits}
        return said | dict.fromkeys(("ratio", "kl", "agreement", "bytes", "expert_bytes"), ratio)

    some = [
        cell("small", 2, 2.0),
        cell("large", 8, 1.0),
        cell("worse", 2, 3.0),
        cell("between", 4, 2.5),
        cell("other", 9, 9, "b"),
    ]
    some.append({"model": "mixed", "name": "broken", "level": "", "kind": "encode", "seed": 0, "methods": ["x"], "error": "why"})
    rows = bench.summary({str(i): c for i, c in enumerate(some)})
    assert {r["name"] for r in rows if r.get("front")} == {"small", "large", "other"}
    assert "- broken, : why" in compression_page.table("mixed")({"summary": rows})


def test_measurements_reach_the_pages_of_methods(tmp_path):
    report = {"question": "q", "methods": {"page": "q.md", "head": ["a", "b"], "tables": {"x.y": [["1", "2"]]}}}
    (tmp_path / "q_machine_2026-01-02.json").write_text(json.dumps(report))
    (tmp_path / "q_machine_2026-01-01.json").write_text(json.dumps(report | {"methods": {}}))
    lines = pages.measured(tmp_path)["x.y"]
    assert "| 1 | 2 |" in lines and any("](../q.md)" in line for line in lines)


def test_planted_duplicates_are_duplicates(tmp_path):
    from moestro.compress.live import compress_live
    from moestro.models.open import open_model

    made = bench.tiny(tmp_path)
    model = open_model(Checkpoint.open(made.path), "float32")
    plan = bench.halved(model.checkpoint, describe(model.checkpoint))
    changed = compress_live(plan, model)
    x_TD = torch.randn(5, model.facts.layers[0].spec.d_model)
    first, copy = (changed.layers[0].experts.output(x_TD, e) for e in (1, 7))
    torch.testing.assert_close(first, copy)
    assert not torch.allclose(first, model.layers[0].experts.output(x_TD, 7))
    assert plan.experts == 12


def test_copies_are_encoded_once(tmp_path):
    """Of one layer, one after another, with the same tokens; and come out as without sparing."""
    from moestro.compress.bits import blank, encode_experts
    from moestro.compress.encode.inputs import ExpertInputs, Inputs
    from moestro.compress.encoding import Encoder
    from moestro.core.plans.compression import Slot
    from moestro.models.experts import read_expert

    made = bench.tiny(tmp_path)
    checkpoint = Checkpoint.open(made.path)
    layout = describe(checkpoint)
    plan = encode_experts(blank(checkpoint, layout, "x"), layout, "compress.encode.gptq", "int8:32")
    spec = layout.facts.layers[0].spec
    x_TD = np.random.default_rng(0).standard_normal((64, spec.d_model)).astype(np.float32)
    own = {0: np.arange(64), 1: np.arange(64), 2: np.arange(0, 64, 2)}

    def given(ordinal, slot):
        return ExpertInputs(x_TD, own[slot.sources[0]], spec, Inputs.of(x_TD).moment_CC)

    sparing, plain = (cls(plan, layout.facts, None, given) for cls in (bench.Sparing, Encoder))
    weights = read_expert(checkpoint, layout, ExpertKey(0, 0))
    first, copy, otherwise = (sparing._step(0, Slot((e,), encodings=(0,)), weights, 0) for e in (0, 1, 2))
    assert first is copy and first is not otherwise
    whole = plain._step(0, Slot((2,), encodings=(0,)), weights, 0)
    for role, tiles in whole.items():
        assert np.array_equal(tiles.dequantise(), otherwise[role].dequantise())


def test_fitted_apart_is_a_plan_of_its_own(tmp_path):
    from moestro.testing.tiny import save_tiny

    save_tiny("mixtral", tmp_path / "m", hidden_size=64, intermediate_size=64)
    checkpoint = Checkpoint.open(tmp_path / "m")
    layout = describe(checkpoint)
    cells = {c.name: c for c in compression_grid.grid(("encode",), 64) if c.name.startswith("gptq") and c.level == "int3:64"}
    assert set(cells) == {"gptq", "gptq, apart", "gptq, ordered"} and cells["gptq"].key != cells["gptq, apart"].key
    layers = tuple({"num_experts": la.num_experts} for la in layout.facts.layers)
    profile = Profile({}, layout.facts.fingerprint, "mixtral", layers, ("all",), (1,), None, "", (), {})
    for name, cell in cells.items():
        plan = compression_grid.planned(cell, checkpoint, layout, profile, 0)
        assert [e.chained for e in plan.encodings] == [name != "gptq, apart"]
