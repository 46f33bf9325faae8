"""plan bits, apply and export from the command line, from a profile to a model that runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moestro.core.experts import ExpertKey
from moestro.core.plan import read_plan
from moestro.core.plans.compression import CompressionPlan
from moestro.core.plans.residency import Precision, ResidencyPlan
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.testing.tiny import save_tiny
from tests.cli.conftest import moestro  # noqa: F401

TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump! "
    * 4
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    from moestro.cli.main import main

    folder = tmp_path_factory.mktemp("work")
    save_tiny("olmoe", folder / "model", hidden_size=64, intermediate_size=64, norm_topk_prob=False, num_key_value_heads=4)
    (folder / "book.txt").write_text(TEXT)
    code = main(["profile", str(folder / "model"), str(folder / "book.txt"), "-o", str(folder / "p"), "--length", "48", "-q",
                 "--probe", "inputs"])  # fmt: skip
    assert code == 0
    return folder


def test_from_a_profile_to_a_model_that_runs(moestro, work):  # noqa: F811
    plan = ("plan", "bits", work / "model", "--profile", work / "p", "-o", work / "plan.json")
    done = moestro(
        *plan, "--method", "gptq:damp=0.02", "--codec", "int4:32", "--trunk", "int8:32", "--ends", "int8:32", "--allow-unseen"
    )
    assert done.code == 0, done.err
    assert "compress.encode.gptq (int4:32) on 24 experts" in done.out
    read = read_plan(work / "plan.json")
    assert read.options["damp"] == 0.02 and read.inputs["profile"]
    done = moestro("apply", work / "plan.json", "-o", work / "small")
    assert done.code == 0 and "in tiles" in done.out, done.err
    done = moestro("run", work / "small", "The quick", "--memory", "2GiB", "-n", "3", "--ignore-eos")
    assert done.code == 0 and "SHRUNK: weights are kept as int4:32 (encode.gptq)" in done.err, done.err
    assert f"EXACT to the packed model: every number is that of {work / 'small'}" in done.err
    done = moestro("export", work / "small", "-o", work / "small.gguf", "--to", "gguf", "--pre", "gpt-2", "--json")
    assert done.code == 0 and done.json["bytes"] == (work / "small.gguf").stat().st_size
    done = moestro("export", work / "small", "-o", work / "ct", "--to", "compressed-tensors")
    assert done.code == 2 and "quantised embeddings" in done.err


def test_bits_by_what_experts_matter(moestro, work):  # noqa: F811
    widths = "int2:64,int3:64,int4:64"
    plan = ("plan", "bits", work / "model", "--profile", work / "p", "--codec", widths, "--allow-unseen")
    kept = ("--evidence", work / "evidence")
    done = moestro(*plan, *kept, "--bits", "3", "--budget", "mc_moe:scope=model", "--allow-plain", "-o", work / "mixed.json")
    assert done.code == 0 and "compress.budget.mc_moe gives" in done.out, done.err
    written = (work / "evidence").stat()
    done = moestro(*plan, *kept, "--bits", "2.5", "--budget", "frequency", "--allow-plain")
    assert done.code == 0 and (work / "evidence").stat().st_mtime_ns == written.st_mtime_ns, "other bits, nothing measured again"
    done = moestro(*plan, *kept, "--bits", "3", "--method", "hqq")
    assert done.code == 2 and "evidence with method 'compress.encode.rtn'" in done.err
    other = shutil.copytree(work / "model", work / "retrained")
    (file,) = other.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    first = describe(Checkpoint.open(other)).parts(ExpertKey(0, 0))[0]
    raw[first.offset] ^= 1
    file.write_bytes(raw)
    done = moestro(*plan[:2], other, *plan[3:], *kept, "--bits", "3")
    assert done.code == 2 and "evidence with weights" in done.err, "same shapes, same text, other weights"
    done = moestro(*plan[:-3], *kept)
    assert done.code == 2 and "--evidence without --bits" in done.err
    done = moestro(*plan, "--evidence", work / "p", "--bits", "3")
    assert done.code == 2 and "holds no evidence" in done.err
    assert moestro("apply", work / "mixed.json", "-o", work / "mixed", "-q").code == 0
    dtypes = {ref.dtype for ref in Checkpoint.open(work / "mixed").tensors.values()}
    assert {"int2:64", "int4:64"} <= dtypes
    weights = sum(r.shape[0] * r.shape[1] for r in Checkpoint.open(work / "mixed").tensors.values() if ":" in r.dtype)
    held = sum(r.nbytes for r in Checkpoint.open(work / "mixed").tensors.values() if ":" in r.dtype)
    assert 2.5 < 8 * held / weights <= 3


def test_nothing_is_left_silently(moestro, work):  # noqa: F811
    plan = ("plan", "bits", work / "model", "--profile", work / "p", "-o", work / "left.json", "--allow-unseen")
    done = moestro(*plan, "--codec", "int4:32")
    assert done.code == 1 and "14 matrices stay as they are stored" in done.err and (work / "left.json").exists()
    for wrong, said in (
        (("--codec", "int4:32,int8:32"), "average bits"),
        (("--codec", "int4:32", "--bits", "3"), "average bits"),
        (("--codec", "int4:128"), "multiples of 128"),
        (("--codec", "int5:32"), "unknown codec"),
        (("--codec", "int2:32,int4:32", "--bits", "1"), "too few"),
        (("--method", "gptq:dump=1"), "no option 'dump'"),
        (("--method", "gptq:ordered=no", "--codec", "int4:32"), "type bool"),
        (("--codec", "int2:32,int4:32", "--bits", "3", "--budget", "mc_moe:alpha=x"), "type float"),
        (("--codec", "stored"), "no tiles"),
        (("--codec", "int4:32", "--trunk", "f16"), "no tiles"),
    ):
        done = moestro(*plan, "--allow-plain", *wrong)
        assert done.code == 2 and said in done.err, (wrong, done.err)
    bare = moestro("plan", "bits", work / "model", "--method", "gptq")
    assert bare.code == 2 and "--probe inputs" in bare.err
    low = moestro("export", work / "model", "-o", work / "x", "--to", "planes")
    assert low.code == 2 and "--codec nested:64" in low.err
    odd = moestro("export", work / "model", "-o", work / "x", "--to", "onnx")
    assert odd.code == 2 and "compressed-tensors or gguf" in odd.err


def test_widths_that_were_chosen_elsewhere(moestro, work):  # noqa: F811
    assert moestro("plan", "residency", work / "model", "-m", "1GiB", "-o", work / "r.json", "-q").code == 0
    plan, found = read_plan(work / "r.json"), describe(Checkpoint.open(work / "model")).facts.layers
    asked = ("plan", "bits", work / "model", "--widths", work / "r.json", "-o", work / "w.json", "--allow-plain")
    bare = moestro(*asked)
    assert bare.code == 2 and "gives experts no widths" in bare.err and "--precision edgemoe" in bare.err
    rows = tuple(tuple(int(e == 3) for e in range(la.num_experts)) for la in found)
    assert isinstance(plan, ResidencyPlan)
    replace(plan, precision=Precision("engine.precision.edgemoe", ("int2:32", "int8:32"), rows)).save(work / "r.json")
    done = moestro(*asked)
    assert done.code == 0 and "edgemoe chose" in done.out, done.err
    made = read_plan(work / "w.json")
    assert isinstance(made, CompressionPlan)
    for la in made.layers:
        assert [made.encodings[s.encodings[-1]].codec for s in la.slots] == [
            "int8:32" if e == 3 else "int2:32" for e in range(len(la.slots))
        ]
    for more in (("--bits", 3), ("--codec", "int4:32")):
        assert moestro(*asked, *more).code == 2
