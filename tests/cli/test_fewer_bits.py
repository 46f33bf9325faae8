"""Plans with few bits, packed and run from the command line."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny Mixtral whose rows divide into groups of 32."""
    from moestro.testing.tiny import save_tiny

    folder = tmp_path_factory.mktemp("models") / "wide"
    save_tiny("mixtral", folder, hidden_size=64, intermediate_size=64)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 2200, dtype=np.uint8)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(letters.tobytes())
    return path


def test_a_quantised_trunk_from_plan_to_run(moestro, wide, tmp_path):
    plan = tmp_path / "plan.json"
    made = moestro("plan", "residency", wide, "-m", "4GiB", "--codec", "int4:32", "--trunk-codec", "int8:32", "-o", plan)
    assert made.code == 0 and "native trunk as int8:32" in made.out
    done = moestro("apply", plan, "-o", tmp_path / "store")
    assert done.code == 0 and "packed as int4:32 and the trunk as int8:32" in done.out
    for arguments in (("--plan", plan), ("-m", "4GiB")):
        ran = moestro("run", wide, "hello", "--store", tmp_path / "store", "-n", "3", "--ignore-eos", *arguments)
        assert ran.code == 0
        assert (
            "SHRUNK: experts are kept as int4:32; activations are rounded" in ran.err and "EXACT to the packed model" in ran.err
        )
    loaded = moestro("run", wide, "hello", "-m", "4GiB", "--trunk-codec", "int8:32", "-n", "3", "--ignore-eos")
    assert "SHRUNK: the trunk's matrices are kept as int8:32" in loaded.err and "packed model" not in loaded.err


def test_a_bound_from_plan_to_run(moestro, wide, text, tmp_path):
    plan = tmp_path / "plan.json"
    asked = ("--quality", "kl:0.05", "--data", text, "--precision", "d2moe")
    made = moestro("plan", "residency", wide, "-m", "4GiB", *asked, "-o", plan)
    assert made.code == 0, made.err
    assert "bound kl:0.05" in made.out and "held out" in made.out and "within kl:0.05" in made.err
    assert moestro("apply", plan, "-o", tmp_path / "store").code == 0
    ran = moestro("run", wide, "hello", "--plan", plan, "--store", tmp_path / "store", "-n", "3", "--ignore-eos")
    assert ran.code == 0 and "bound kl:0.05" in ran.err and "held out" in ran.err
    fewer = moestro(
        "run", wide, "hello", "-m", "4GiB", "--store", tmp_path / "store", "--quality", "2", "-n", "3", "--ignore-eos"
    )
    assert fewer.code == 0 and "of their bits are used 2 by 12 experts" in fewer.err
    assert moestro("show", plan).out.count("held out") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quality", "ppl:1%"), "no text"),
        (("--data", "text.txt"), "no --quality"),
        (("--quality", "ppl:1%", "--data", "no-such-file"), "cannot be read"),
        (("--quality", "nonsense", "--data", "{text}"), "no bound on quality"),
        (("--quality", "ppl:1%", "--data", "{text}", "--codec", "int4:32"), "--codec"),
        (("--quality", "kl:0.0000001", "--data", "{text}", "--widths", "int2:32"), "the best has KL"),
        (("--trunk-codec", "nested:32"), "the trunk cannot be kept as nested:32"),
        (("--trunk-codec", "int8:128"), "multiples of 128"),
        (("--trunk-codec", "int8:32", "--trunk", "transformers"), "native trunk"),
    ],
)
def test_refused_with_what_to_do(moestro, wide, text, arguments, said):
    done = moestro("plan", "residency", wide, "-m", "4GiB", *(a.format(text=text) for a in arguments))
    assert done.code == 2 and said in done.err
    assert done.out == ""


def test_quality_of_a_run_needs_a_nested_store(moestro, wide, tmp_path):
    assert moestro("run", wide, "hello", "--quality", "3").code == 2
    plan = tmp_path / "plan.json"
    moestro("plan", "residency", wide, "-m", "4GiB", "--codec", "int4:32", "-o", plan)
    moestro("apply", plan, "-o", tmp_path / "store")
    done = moestro("run", wide, "hello", "-m", "4GiB", "--store", tmp_path / "store", "--quality", "3")
    assert done.code == 2 and "no planes to leave out" in done.err
