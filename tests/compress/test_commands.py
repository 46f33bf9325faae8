"""The verbs plan, show, diff, apply and eval on compression plans, from a profile to a model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moestro.compress.record import read_plan_of
from moestro.core.plan import read_plan
from moestro.profile.profile import Profile
from moestro.testing.tiny import save_tiny
from tests.cli.conftest import moestro  # noqa: F401

TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump! "
    * 6
)
PROBES = ("norms", "maxima", "similarity", "alikeness", "contribution", "moments", "samples", "selection")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny OLMoE, its profile with every probe, and a text that was not profiled."""
    from moestro.cli.main import main

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    save_tiny("olmoe", folder / "model", intermediate_size=32)
    (folder / "book.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT[::-1][:400])
    asked = [word for name in PROBES for word in ("--probe", name)]
    code = main(
        ["profile", str(folder / "model"), str(folder / "book.txt"), "-o", str(folder / "p"), "--length", "48", "-q", *asked]
    )
    assert code == 0
    return folder


def planned(moestro, work, name, *more, output="plan.json"):  # noqa: F811
    done = moestro("plan", name, work / "model", "--profile", work / "p", "-o", work / output, *more)
    assert done.code == 0, done.err
    return read_plan(work / output)


def test_from_a_profile_to_a_model_card(moestro, work):  # noqa: F811
    plan = planned(moestro, work, "reap", "--ratio", "0.25")
    assert [len(la.slots) for la in plan.layers] == [6, 6, 6] and plan.options == {"ratio": 0.25}
    assert plan.inputs["profile"] and all(0 < la.loss < 0.5 for la in plan.layers)
    shown = moestro("show", work / "plan.json")
    assert "3 MoE layers of 6 experts" in shown.out and "75.0 %" in shown.out
    done = moestro("apply", work / "plan.json", "-o", work / "smaller", "--json")
    assert done.code == 0 and done.json["experts"] == 6 and done.json["bytes_after"] < done.json["bytes_before"]
    ran = moestro("run", work / "smaller", "--raw", "The quick", "-n", "2")
    assert f"SHRUNK: made from {work / 'model'} by compress.criteria.reap: 6 of 8 experts in a layer\nEXACT to" in ran.err, (
        ran.err
    )
    judged = moestro("eval", work / "smaller", "--against", work / "model", "--data", work / "other.txt", "--length", "48",
                     "--plan", work / "plan.json", "--json")  # fmt: skip
    assert judged.code == 0, judged.err
    found = judged.json
    assert found["kl"] > 0 and 0.4 < found["agreement"] < 1 and len(found["agreement_by_layer"]) == 3
    assert read_plan(work / "plan.json") == read_plan_of(work / "smaller")
    card = (work / "smaller" / "README.md").read_text()
    assert "other.txt" in card and f"{found['perplexity']:.4f}" in card
    same = moestro("eval", work / "smaller", "--against", work / "model", "--data", work / "book.txt", "--length", "48")
    assert "the text that the plan was made from" in same.err and len(read_plan_of(work / "smaller").judged) == 2  # type: ignore[attr-defined]


def test_a_plan_that_changes_nothing_is_judged_so(moestro, work):  # noqa: F811
    planned(moestro, work, "compress.criteria.frequency", "--keep", "8", output="all.json")
    assert moestro("apply", work / "all.json", "-o", work / "all", "-q").code == 0
    found = moestro(
        "eval", work / "all", "--against", work / "model", "--data", work / "other.txt", "--length", "48", "--json"
    ).json
    assert found["kl"] < 1e-9 and found["agreement"] == 1 and found["perplexity"] == pytest.approx(found["reference"])


@pytest.mark.parametrize(
    "method", ["gate_mass", "easy_ep", "premoe", "random:seed=3", "reconstruction", "m_smoe", "hierarchical", "uncurl"]
)
def test_every_way_to_fewer_experts(moestro, work, method):  # noqa: F811
    plan = planned(moestro, work, method, "--keep", "5", output=f"{method[:6]}.json")
    assert [len(la.slots) for la in plan.layers] == [5, 5, 5]
    merged = sorted(e for la in plan.layers for s in la.slots for e in s.sources)
    assert merged == sorted(list(range(8)) * 3) or all(len(s.sources) == 1 for la in plan.layers for s in la.slots)


def test_plans_combine_and_differ(moestro, work):  # noqa: F811
    first = planned(moestro, work, "reap", "--keep", "6", output="first.json")
    second = planned(moestro, work, "hierarchical", "--keep", "5", "--after", work / "first.json", output="second.json")
    third = planned(moestro, work, "contribution", "--ratio", "0.5", "--after", work / "second.json", output="third.json")
    last = planned(moestro, work, "moe_pruner:pattern=2:4", "--after", work / "third.json", output="last.json")
    kept = {e for s in first.layers[0].slots for e in s.sources}
    assert {e for s in second.layers[0].slots for e in s.sources} == kept and len(second.layers[0].slots) == 5
    assert all(len(s.neurons) == 16 for la in third.layers for s in la.slots)
    assert last.encodings[0].options == {"pattern": "2:4"} and last.method.count(">") == 3
    done = moestro("diff", work / "first.json", work / "second.json", "--json")
    assert done.code == 1 and any(row["field"] == "method" for row in done.json["differences"])
    assert moestro("apply", work / "last.json", "-o", work / "last", "-q").code == 0
    from moestro.models.open import open_model

    up_FD = open_model(work / "last").layers[1].experts.weights(2).up_FD
    assert up_FD.shape == (16, 32) and ((up_FD.reshape(16, 8, 4) != 0).sum(-1) == 2).all()
    for name in ("reap", "m_smoe"):
        done = moestro("plan", name, work / "model", "--profile", work / "p", "--keep", "4", "--after", work / "third.json")
        assert done.code == 2 and "remove experts first" in done.err


def test_experts_are_pruned_and_coded_in_one_plan(moestro, work):  # noqa: F811
    planned(moestro, work, "reap", "--keep", "6", output="six.json")
    more = ("--after", work / "six.json", "--codec", "int8:32", "--trunk-codec", "int8:32")
    plan = planned(moestro, work, "rtn", *more, output="coded.json")
    assert {e.codec for e in plan.encodings} == {"int8:32"} and plan.tensors and plan.sizes[1] < 0.3 * plan.sizes[0]
    assert moestro("apply", work / "coded.json", "-o", work / "coded", "-q").code == 0
    done = moestro("eval", work / "coded", "--against", work / "model", "--data", work / "other.txt", "--length", "48", "--json")
    assert done.code == 0 and done.json["agreement"] > 0.5, done.err
    done = moestro("plan", "rtn", work / "model")
    assert done.code == 2 and "--codec int4:64" in done.err
    done = moestro("plan", "rtn", work / "model", "--codec", "int8:32")
    assert done.code == 1 and "matrices stay as they are stored" in done.err and "--allow-plain" in done.err
    assert moestro("plan", "rtn", work / "model", "--codec", "int8:32", "--allow-plain").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reap", "--keep", "3"], "a token uses 4"),
        (["reap", "--ratio", "25"], "--ratio 0.25"),
        (["reap", "--ratio", "0.01"], "removes none of 8"),
        (["moe_pruner:ratio=50"], "from 0 to below 1"),
        (["low_rank:rank=x"], "a value of type int"),
        (["latent:group=3"], "a divisor"),
        (["rtn", "--codec", "f16"], "no tiles"),
        (["rtn", "--codec", "int4:32", "--trunk-codec", "int9:2"], "unknown codec"),
        (["hqq", "--codec", "int4:32"], "no offset"),
        (["reap"], "--keep or --ratio"),
        (["reap", "--keep", "4", "--ratio", "0.5"], "twice"),
        (["reap", "--ratio", "1.5"], "0 to below 1"),
        (["reap", "--keep", "9"], "1 to 8"),
        (["reap:x=1", "--keep", "4"], "no option 'x'"),
        (["reep", "--keep", "4"], "did you mean reap"),
        (["lru", "--keep", "4"], "no compression method"),
        (["reap", "--keep", "6", "--budget", "threshold"], None),
        (["m_smoe", "--keep", "5", "--router", "none"], "repoint"),
        (["moe_pruner", "--keep", "4"], "removes no experts"),
        (["moe_pruner:pattern=2:3"], None),
        (["contribution", "--keep", "99"], "1 to 32"),
    ],
)
def test_wishes_that_cannot_be(moestro, work, arguments, said):  # noqa: F811
    done = moestro("plan", arguments[0], work / "model", "--profile", work / "p", *arguments[1:])
    assert "Traceback" not in done.err
    assert said is None or (done.code == 2 and said in done.err), done.err


def test_profiles_that_do_not_fit(moestro, work, tmp_path):  # noqa: F811
    done = moestro("plan", "reap", work / "model", "--keep", "4")
    assert done.code == 2 and "--for compress.criteria.reap" in done.err
    save_tiny("mixtral", tmp_path / "other")
    done = moestro("plan", "reap", tmp_path / "other", "--profile", work / "p", "--keep", "2")
    assert done.code == 2 and "a profile of this model" in done.err
    assert moestro("profile", work / "model", work / "book.txt", "-o", tmp_path / "few", "--length", "48", "-q").code == 0
    done = moestro("plan", "reap", work / "model", "--profile", tmp_path / "few", "--keep", "5")
    assert done.code == 2 and "--probe norms" in done.err
    done = moestro("plan", "frequency", work / "model", "--profile", tmp_path / "few", "--keep", "5", "--json")
    assert done.code == 0 and any("Super Experts were not looked for" in line for line in json.loads(done.out)["stated"])


def test_unseen_experts_are_told(moestro, work, tmp_path):  # noqa: F811
    (tmp_path / "short.txt").write_text("aaaa")
    profile = ["profile", work / "model", tmp_path / "short.txt", "-o", tmp_path / "short", "-q", "--allow-unseen"]
    assert moestro(*profile).code == 0
    silent = moestro(*profile[:-1])
    assert silent.code == 1 and "experts never chosen" in silent.err, "an exit code of 1 is explained, even to the quiet"
    arguments = [
        "plan",
        "frequency",
        work / "model",
        "--profile",
        tmp_path / "short",
        "--keep",
        "6",
        "-o",
        tmp_path / "plan.json",
    ]
    done = moestro(*arguments)
    assert done.code == 1 and "were never chosen" in done.out and (tmp_path / "plan.json").exists()
    assert moestro(*arguments, "--allow-unseen").code == 0


def test_bad_ways_to_apply(moestro, work, tmp_path, monkeypatch):  # noqa: F811
    planned(moestro, work, "reap", "--keep", "6", output="six.json")
    assert moestro("apply", work / "six.json", "-o", tmp_path / "o", "--codec", "int4:32").code == 2
    assert moestro("apply", work / "six.json", "-o", work / "model").code == 2
    save_tiny("olmoe", tmp_path / "changed", seed=1, vocab_size=96)
    done = moestro("apply", work / "six.json", "-o", tmp_path / "o", "--model", tmp_path / "changed")
    assert done.code == 2 and "was made for" in done.err and not (tmp_path / "o").exists()
    done = moestro("plan", "reap", work / "model", "--profile", work / "p", "--keep", "6", "-o", work / "book.txt" / "plan.json")
    assert done.code == 2 and "another --output" in done.err
    assert moestro("apply", work / "six.json", "-o", tmp_path / "six", "-q").code == 0
    monkeypatch.setattr("os.access", lambda *a, **k: False)
    monkeypatch.setattr("moestro.evaluate.comparison.compare", lambda *a: pytest.fail("found out after the work"))
    done = moestro("eval", tmp_path / "six", "--against", work / "model", "--data", work / "other.txt")
    assert done.code == 2 and "written into its folder" in done.err
    done = moestro("eval", work / "model", "--against", work / "model", "--data", work / "other.txt")
    assert done.code == 2 and "no moestro.json" in done.err


def test_a_profile_that_lacks_a_layer(moestro, work):  # noqa: F811
    made = Profile.open(work / "p")
    short = {name: array[:-1] if name in ("counts_LE", "input_samples_LND") else array for name, array in made.arrays.items()}
    replace(made, arrays=short, trace=None).save(work / "short")
    replace(made, arrays=short | {"counts_LE": made.arrays["counts_LE"] * [[1], [0], [1]]}, trace=None).save(work / "gap")
    for method in ("reap", "moe_pruner", "reconstruction"):
        for name, said in (("short", "ends before MoE layer 2"), ("gap", "saw no token in MoE layer 1")):
            keep = () if method == "moe_pruner" else ("--keep", 6)
            done = moestro("plan", method, work / "model", "--profile", work / name, *keep, "-o", work / "never.json")
            assert done.code == 2 and said in done.err and not (work / "never.json").exists(), done.err


def test_a_profile_for_the_method_that_plan_takes(moestro, work):  # noqa: F811
    asked = ("profile", work / "model", work / "book.txt", "-o", work / "narrow", "--tokens", 90, "--length", 48, "-q")
    done = moestro(*asked, "--for", "contribution", "--allow-unseen")
    assert done.code == 0 and "gated_hidden_LEF" in Profile.open(work / "narrow").arrays, done.err
    assert "compress.sparsify.low_rank or" in moestro("methods", "low_rank").err
