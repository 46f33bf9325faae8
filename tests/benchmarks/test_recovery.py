"""What training gives back, whole, at a tiny size, and what its figures mean."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import recovery as bench  # noqa: E402
import recovery_page  # noqa: E402

from moestro.core.method import catalogue  # noqa: E402

SOME = ("reap", "moe_pruner", "plain", "otp", "top-1")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory) -> dict:
    """A reduced run that was stopped, and of which one cell is of an older plan."""
    before, work = torch.get_num_threads(), tmp_path_factory.mktemp("work")
    out = work / "out.json"
    asked = ["--reduced", "--work", str(work), "--out", str(out)]
    assert bench.main([*asked, "--texts", "mixed", "--only", "odp"]) == 0
    report = json.loads(out.read_text())
    report["cells"]["mixed / odp / share 0.5 / 0"]["mark"] = True
    stale = {"key": "older", "model": "mixed", "name": "otp", "level": "price 0.1", "kind": "skip", "methods": [], "seed": 0}
    report["cells"]["mixed / otp / price 0.1 / 0"] = stale | {"error": "none"}
    out.write_text(json.dumps(report))
    assert bench.main([*asked, "--texts", "mixed", "domains", "--only", "odp", "retrieval", *SOME]) == 0
    torch.set_num_threads(before)
    report = json.loads(out.read_text())
    assert report["cells"]["mixed / odp / share 0.5 / 0"].get("mark"), "what was measured is kept"
    return report


def rows(report: dict) -> dict:
    return {(r["name"], r["level"]): r for r in report["summary"] if "error" not in r}


def test_every_method_that_trains_or_retrieves_takes_part():
    tried = [cell for text in bench.SHOWN for cell in bench.trials(text, 16, 10)]
    assert {r["name"] for r in catalogue() if r["kind"] in ("tuning", "retrieval", "learned tap")} == {
        m for cell in tried for m in cell.methods
    }
    for text in bench.SHOWN:
        some = bench.trials(text, 16, 10)
        assert len({c.key for c in some}) == len({(c.name, c.level) for c in some}) == len(some)
    plain = next(c for c in tried if c.name == bench.EVERYTHING)
    assert plain.tuning == "tsep:keep=16" and plain.methods == (), "with all experts kept it is a training like any other"


def test_trained_models_are_judged_beside_what_they_were_made_of(reduced):
    found = rows(reduced)
    start, better = found["reap", "-50 %"], found["reap + low_rank of experts", "-50 %"]
    assert 1 < better["ratio"] < start["ratio"] and better["kl"] < start["kl"] and better["bytes"] == start["bytes"]
    assert better["given_back"] == pytest.approx(1 - math.log(better["ratio"]) / math.log(start["ratio"]))
    assert better["tokens"] == 4 * bench.BATCH * 32 and better["rate"] == 1e-3 and "tokens" not in start
    assert start["bytes"] < found["reap", "-25 %"]["bytes"] < found["odp", "share 0.5"]["bytes"]
    plain, single = found["plain training", ""], found["top-1, trained", "1 of 2"]
    assert plain["agreement"] > 0.98 and plain["against_plain"] == 1
    assert single["skipped"] == 0.5 and single["against_plain"] == pytest.approx(single["ratio"] / plain["ratio"])
    assert single["ratio"] < found["top-1", "1 of 2"]["ratio"]
    assert ("otp", "price 0.1") in found, "a cell of an older plan is measured again"


def test_zeros_stay_zeros(reduced):
    for level in ("half zeros", "2:4"):
        before, after = (rows(reduced)[name, level] for name in ("moe_pruner", "moe_pruner + expert_wise"))
        assert before["zeros"] == after["zeros"] == pytest.approx(0.5, abs=0.01) and after["zeros_lost"] == 0
        assert after["ratio"] != before["ratio"]


def test_a_domain_is_found_by_its_beginning(reduced):
    for name in ("retrieval", "retrieval, softmax"):
        some, few = (rows(reduced)[name, level] for level in ("keep 6", "keep 4"))
        for row in (some, few):
            assert row["own"] < row["worst"] and row["own"] <= row["ratio"] < row["worst"] and row["accuracy"]["64"] == 1
        assert some["own"] < few["own"] and some["bytes"] > few["bytes"]


def test_the_page_says_what_was_found(reduced, tmp_path):
    told = {name: make(reduced) for name, make in recovery_page.FIGURES.items()}
    row = rows(reduced)["reap + router_norms", "-25 %"]
    assert f"| reap + router_norms | -25 % | {row['bytes'] / 1e6:.1f} |" in told["recovery_removed"]
    assert "| top-1, trained | 1 of 2 | 50.0 % |" in told["recovery_skipped"] and f"4 steps of {bench.BATCH}" in told["recovery"]
    assert told["recovery_retrieved"].count("**all**") == 4
    assert "train.tuning.otp" in reduced["methods"]["tables"]
    picture = recovery_page.picture(reduced, tmp_path)
    assert picture is not None and picture.stat().st_size > 5000
    assert recovery_page.picture({"summary": []}, tmp_path) is None
    assert all(
        make({"summary": [], "cells": {}}) == recovery_page.MISSING for name, make in recovery_page.FIGURES.items() if "_" in name
    )
