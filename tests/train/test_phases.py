"""Phases inside runs: logged, and the same when a run is cut around them."""

from __future__ import annotations

import pytest

from moestro.core.errors import InputError
from moestro.train.log import read
from moestro.train.objective import make

PHASES = {
    "freeze_routing": ({"router": "stable_moe"}, {}),
    "diversify": ({"router": "evomoe"}, {"mask": 0.3}),
}


@pytest.mark.parametrize("name", PHASES)
def test_a_cut_run_has_the_same_losses_and_stages(name, make_config, make_loop, tmp_path):
    model, options = PHASES[name]
    config = make_config(steps=4, model=model)

    def loop(folder):
        return make_loop(config, tmp_path / folder, phases=[make(part(name, options), "training schedule")])

    loop("whole").run()
    entries = [e for e in read(tmp_path / "whole") if "loss" in e]
    assert [e["stage"] for e in entries] == [1.0, 1.0, 2.0, 2.0]
    for stop in (1, 2, 3):
        first = loop(f"cut{stop}")
        first.run(stop=lambda now=first, at=stop: now.step == at)
        second = loop(f"cut{stop}")
        assert second.resume() and second.step == stop
        second.run()
        cut = [e for e in read(tmp_path / f"cut{stop}") if "loss" in e]
        assert [(e["loss"], e["stage"]) for e in cut] == [(e["loss"], e["stage"]) for e in entries]


def part(name, options):
    from moestro.layers.config import Part

    return Part(name, {"at": 0.5, **options})


@pytest.mark.parametrize("name", PHASES)
def test_models_without_what_a_phase_needs(name, make_config, make_loop):
    loop = make_loop(make_config(), phases=[make(part(name, {}), "training schedule")])
    with pytest.raises(InputError):
        loop.run()
    with pytest.raises(InputError, match="at 2"):
        make(part(name, {"at": 2.0}), "training schedule")
