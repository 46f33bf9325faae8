"""Configurations: round trip, settings put over them, what cannot be, and the learning rate."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moestro.core.errors import InputError
from moestro.train.config import RateConfig, TrainConfig, changed, differences, read_config, recipes
from moestro.train.rate import factor


def test_round_trip(make_config):
    config = make_config(
        model={"router": {"name": "switch", "capacity": 2.0}},
        data={"sources": ["installed:code"], "weights": {"code": 2}},
        objective={"name": "next_token", "smoothing": 0.1},
        optimiser={"rate": 1, "betas": [0.9, 0.99]},
    )
    data = json.loads(json.dumps(config.to_json()))
    assert TrainConfig.from_json(data) == config
    assert (
        config.optimiser.rate == 1.0 and config.data.weights == {"code": 2.0} and config.objective.options == {"smoothing": 0.1}
    )


@pytest.mark.parametrize("name", recipes())
def test_recipes_can_be_read_and_say_all_they_mean(name):
    config = read_config(name)
    assert config.model.vocabulary >= 257 and config.data.sources and config.model.context >= config.data.length
    assert config.micro(1)[0] * config.micro(1)[1] == config.batch


def test_settings_are_put_over_a_file(tmp_path):
    (path := tmp_path / "c.json").write_text(json.dumps({"model": {"d_model": 32, "router": "topk"}, "steps": 7}))
    settings = ["optimiser.rate=0.01", "model.router.combine=raw", "data.tokenizer=bytes", "data.weights.a=2", "rate.shape=wsd"]
    config = read_config(str(path), settings, steps=9, data__sources=["x"])
    assert config.optimiser.rate == 0.01 and config.rate.shape == "wsd" and config.steps == 9 and config.data.sources == ("x",)
    assert changed({}, ["model.router.bias=true"]).model.router.to_json() == {"name": "topk", "bias": True}
    assert config.model.router.to_json() == {"name": "topk", "combine": "raw"} and config.data.weights == {"a": 2.0}
    assert config.model.vocabulary == 257 and config.model.context == 128


def test_what_a_resumed_run_may_change(make_config):
    assert differences(make_config(), make_config(steps=9, save_every=1, keep=5)) == []
    other = make_config(model={"top_k": 1}, optimiser={"rate": 0.5}, seed=1)
    assert differences(make_config(), other) == ["model.top_k", "optimiser.rate", "seed"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["bach=4"], "no setting bach[\\s\\S]*did you mean batch"),
        (["optimiser.lr=1"], r"no setting optimiser.lr[\s\S]*rate, betas"),
        (["model.d_mdel=4"], "no setting 'd_mdel'"),
        (["model.top_k=5", "model.num_experts=4"], "top_k 5 with num_experts 4"),
        (["batch=4.5"], "batch is 4.5"),
        (["batch=true"], "batch is True"),
        (["batch=0"], "batch is 0"),
        (["data=x"], "data is 'x'|has no settings inside"),
        (["data.sources=x"], "data.sources is 'x'"),
        (["data.holdout=1"], "data.holdout is 1.0"),
        (["data.length=64", "model.context=32"], "data.length 64[\\s\\S]*context, 32"),
        (["optimiser.betas=[0.9]"], "optimiser.betas"),
        (["rate.shape=square"], "rate.shape is 'square'"),
        (["rate.shape=wsd", "rate.decay=0.9", "rate.warmup=0.2"], "overlap"),
        (["precision=float16"], "precision is 'float16'"),
        (["steps.x=1"], "steps has no settings inside"),
        (["objective=1"], "does not name a method"),
        (["nothing"], "the setting 'nothing'"),
    ],
)
def test_what_cannot_be(settings, said):
    with pytest.raises(InputError, match=said):
        changed({"steps": 5}, settings)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[1]", "of type list"), (None, "there is no configuration [\\s\\S]*tiny")]
)
def test_files_that_are_no_configuration(tmp_path, text, said):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_config(str(path))


def test_a_batch_that_does_not_divide(make_config):
    assert make_config(batch=12, micro_batch=3).micro(2) == (3, 2) and make_config(batch=12).micro(3) == (4, 1)
    for settings, processes in (({"batch": 5}, 2), ({"batch": 12, "micro_batch": 5}, 1), ({"batch": 2}, 4)):
        with pytest.raises(InputError, match="a batch of"):
            make_config(**settings).micro(processes)


def test_rates():
    cosine = [factor(RateConfig("cosine", warmup=0.1, final=0.1), s, 100) for s in range(100)]
    assert cosine[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert (
        cosine[54] == pytest.approx(0.55) and cosine[-1] == pytest.approx(0.1) and sorted(cosine[9:], reverse=True) == cosine[9:]
    )
    wsd = [factor(RateConfig("wsd", warmup=0.1, decay=0.2, final=0.0), s, 100) for s in range(100)]
    assert wsd[10:80] == [1.0] * 70 and wsd[89] == pytest.approx(0.5) and wsd[-1] == pytest.approx(0.0)
    assert wsd[80] == pytest.approx(0.95)
    constant = [factor(RateConfig("constant", warmup=0.0), s, 10) for s in range(10)]
    assert constant == [1.0] * 10
    assert factor(RateConfig("wsd", 0.0, 0.0), 0, 1) > 0 and factor(RateConfig("cosine", 1.0), 9, 10) == 1.0
    assert all(factor(RateConfig(shape), 40, 20) >= 0.1 - 1e-9 for shape in ("cosine", "wsd"))  # beyond the end


def test_reading_a_configuration_imports_no_torch():
    code = "import sys; from moestro.train.config import read_config; read_config('tiny'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
