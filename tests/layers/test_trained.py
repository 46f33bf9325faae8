"""Saving and loading trained models: equal outputs, shared weights once, and clear refusals."""

from __future__ import annotations

import json

import pytest
import torch

from moestro.core.errors import CheckpointError, InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.models.checkpoint import Checkpoint
from moestro.models.trained import load_trained, save_trained
from moestro.testing.tiny import save_tiny

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, d_expert=16, d_shared=8, tied=True, router="deepseek_v3")


@pytest.fixture
def model():
    made = build(CONFIG).eval()
    with torch.no_grad():
        for buffer in made.buffers():
            buffer.normal_()
    return made


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6)).logits_BTV


def test_round_trip(model, tmp_path):
    saved = save_trained(model, tmp_path / "m")
    loaded = load_trained(tmp_path / "m")
    assert loaded.config == CONFIG and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert "head.weight" not in saved.tensors, "a tied weight is stored once"


def test_half_precision(model, tmp_path):
    save_trained(model, tmp_path / "m", dtype="bfloat16")
    loaded = load_trained(tmp_path / "m")
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float()), name
    for a, b in zip(loaded.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)


def edit(folder, change):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data["moestro"])
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m.update(format=99), CheckpointError, "format 99"),
        (lambda m: m["config"].update(d_expert=24), CheckpointError, "shape"),
        (lambda m: m["config"].update(layers=3), CheckpointError, "lacks|weighs"),
        (lambda m: m["config"].update(router="switch"), CheckpointError, "weighs experts by"),
        (lambda m: m["config"].update(top_k=99), InputError, "top_k 99"),
        (lambda m: m["config"].update(tied=False), CheckpointError, "shares other weights"),
        (lambda m: m["config"].update(colour=3), InputError, "no setting 'colour'"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(model, tmp_path, change, error, words):
    save_trained(model, tmp_path / "m")
    edit(tmp_path / "m", change)
    with pytest.raises(error, match=words):
        load_trained(tmp_path / "m")


def test_nan_is_refused(model, tmp_path):
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    save_trained(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_trained(tmp_path / "m")


def test_a_hugging_face_folder_is_refused(tmp_path):
    save_tiny("mixtral", tmp_path / "hf")
    with pytest.raises(CheckpointError, match="not written by moestro"):
        load_trained(Checkpoint.open(tmp_path / "hf"))
