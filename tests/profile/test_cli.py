"""moestro profile and moestro show PROFILE."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moestro.profile.profile import Profile
from tests.cli.conftest import moestro  # noqa: F401


@pytest.fixture
def texts(case, tmp_path):
    """Words of the planted tokenizer in a file per domain."""
    for domain in "abc":
        words = [f"{domain}{i % 16}" for i in range(60)]
        (tmp_path / f"{domain}.txt").write_text(" ".join(words))
    return [str(tmp_path / f"{domain}.txt") for domain in "abc"]


def test_profile_and_show(case, texts, tmp_path, moestro):  # noqa: F811
    out = tmp_path / "x.profile"
    done = moestro("profile", case.planted.path, *texts, "-o", out, "--length", 20, "--runner", "transformers")
    assert done.code == 1 and "4 of 28 experts never chosen" in done.err and "180 tokens" in done.out
    done = moestro("profile", case.planted.path, *texts, "-o", out, "--length", 20, "--allow-unseen", "--json")
    assert done.code == 0 and done.json["tokens"] == 180 and len(done.json["coverage"]["never"][0]) == 2
    assert not (tmp_path / "x.profile.partial").exists()
    shown = moestro("show", out)
    assert shown.code == 0 and "12/14" in shown.out and "b" in shown.out
    assert moestro("show", out, "--json").json["counts"] == Profile.open(out).arrays["counts_LE"].tolist()
    told = moestro("show", out, "--measure", "balance", "--measure", "srp:window=4,draws=10", "--json").json
    assert set(told) == {"profile.measures.balance", "profile.measures.srp"}
    table = moestro("show", out, "--measure", "routers", "--measure", "label_usage:label=a,layer=0,draws=10")
    assert table.code == 0 and "entropy" in table.out and "drawn_low" in table.out


def test_the_engine_profiles_the_same(case, texts, tmp_path, moestro):  # noqa: F811
    common = ["--length", 20, "--allow-unseen", "--quiet", "--probe", "norms"]
    for name in ("engine", "transformers"):
        assert moestro("profile", case.planted.path, *texts, "-o", tmp_path / name, "--runner", name, *common).code == 0
    one, other = (Profile.open(tmp_path / name) for name in ("engine", "transformers"))
    assert np.allclose(one.arrays["entropy_L"], other.arrays["entropy_L"], rtol=1e-4)
    assert np.array_equal(one.arrays["counts_LE"], other.arrays["counts_LE"])
    assert np.allclose(one.arrays["norm_LE"], other.arrays["norm_LE"], rtol=1e-4)


def test_what_a_method_needs_is_run(case, texts, tmp_path, moestro):  # noqa: F811
    out = tmp_path / "x.profile"
    args = ["profile", case.planted.path, *texts, "-o", out, "--allow-unseen", "-q"]
    assert moestro(*args, "--for", "super_experts", "--for", "profile.measures.srp").code == 0
    assert set(Profile.open(out).probes) == {"profile.probes.counts", "profile.probes.maxima"}
    assert moestro("show", out, "--measure", "super_experts").code == 0


def test_a_stopped_profile_is_resumed(case, texts, tmp_path, moestro, monkeypatch):  # noqa: F811
    out = tmp_path / "x.profile"
    args = ["profile", case.planted.path, *texts, "-o", out, "--length", 10, "--allow-unseen", "-q", "--runner", "transformers"]
    assert moestro(*args).code == 0
    whole = Profile.open(out)
    out.unlink()
    from moestro.models.open import Model

    run, left = Model.run, iter(range(4))

    def stops(self, tokens, *, inputs=False):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run(self, tokens, inputs=inputs)

    monkeypatch.setattr(Model, "run", stops)
    assert moestro(*args).code == 130 and not out.exists()
    monkeypatch.undo()
    again = moestro(*args)
    assert again.code == 2 and "--resume" in again.err
    other = moestro(*args, "--resume", "--probe", "norms")
    assert other.code == 2 and "other probes" in other.err
    assert moestro(*args, "--resume").code == 0
    assert all(np.array_equal(a, whole.arrays[n]) for n, a in Profile.open(out).arrays.items())


KILLED = """
import sys
import time

import moestro.profile.run as run
from moestro.cli.main import main

run.SECONDS = 0  # save after each sequence
seen, run.Recording._seen = run.Recording._seen, lambda *args: (time.sleep(0.05), seen(*args))[1]
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_profile_goes_on_from_what_was_saved(case, texts, tmp_path, moestro):  # noqa: F811
    out = tmp_path / "x.profile"
    args = ["profile", case.planted.path, *texts, "--length", 10, "--allow-unseen", "-q", "--runner", "engine"]
    assert moestro(*args, "-o", tmp_path / "whole.profile").code == 0
    running = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, args), "-o", str(out)])
    partial = tmp_path / "x.profile.partial"
    while not partial.exists():
        assert running.poll() is None, "it ended before it had saved anything"
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL and not out.exists()
    assert moestro(*args, "-o", out, "--resume").code == 0 and not partial.exists()
    whole = Profile.open(tmp_path / "whole.profile")
    assert all(np.array_equal(array, whole.arrays[name]) for name, array in Profile.open(out).arrays.items())


def test_sinks_are_asked_of_transformers(case, texts, tmp_path, moestro):  # noqa: F811
    out = tmp_path / "x.profile"
    args = ["profile", case.planted.path, *texts, "-o", out, "--length", 20, "--allow-unseen", "-q", "--probe", "sinks"]
    assert moestro(*args, "--runner", "transformers").code == 0
    rows = moestro("show", out, "--measure", "sinks", "--json").json["profile.measures.sinks"]["rows"]
    assert all(0 < strength < 1 and 0 < even < 1 for _, strength, even, _ in rows)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--label", "column:x"], "plain text and has no column"),
        (["--probe", "nothing"], "not a method of kind 'probe'"),
        (["--for", "engine.evict.lru"], "reads no statistics"),
        (["--runner", "gpu"], "--runner is 'gpu'"),
        (["--runner", "engine", "--probe", "sinks"], "sinks needs attention"),
        (["--part", "answer"], "no answer"),
        (["--runner", "transformers", "--memory", "1GiB"], "one of them"),
    ],
)
def test_bad_arguments(case, texts, tmp_path, moestro, extra, message):  # noqa: F811
    done = moestro("profile", case.planted.path, *texts, "-o", tmp_path / "x.profile", "-q", *extra)
    assert done.code == 2 and message in done.err and not (tmp_path / "x.profile").exists()


def test_bad_questions(case, texts, tmp_path, moestro):  # noqa: F811
    out = tmp_path / "x.profile"
    assert moestro("profile", case.planted.path, *texts, "-o", out, "-q", "--allow-unseen", "--trace-tokens", 0).code == 0
    for measure, message in {
        "srp": "has no trace",
        "contrast:label=a,against=x": "no label 'x'",
        "balance:depth=3": "no option 'depth'",
        "npmi:label=a,most=x": "most is 'x'",
        "super_experts": "--probe maxima",
        "nothing": "not a method of kind 'measure'",
    }.items():
        done = moestro("show", out, "--measure", measure)
        assert done.code == 2 and message in done.err, measure
    out.write_bytes(out.read_bytes()[:-3])
    assert "not a readable profile" in moestro("show", out).err
    (tmp_path / "plan.json").write_text(json.dumps({}))
    assert "is no profile" in moestro("show", tmp_path / "plan.json", "--measure", "balance").err
