"""Attention sinks: even attention, a planted sink, and what the module says itself; who cannot tell refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moestro.core.errors import InputError
from moestro.engine.engine import Engine
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.measures.sinks import sinks
from moestro.profile.probe import make
from moestro.profile.run import Recording, available
from moestro.profile.sources import Document
from moestro.testing.tiny import save_tiny

LENGTH, FIRST = 12, 5


@pytest.fixture
def model(tmp_path):
    torch.set_num_threads(1)
    save_tiny("qwen2_moe", tmp_path)
    made = open_model(tmp_path)
    made.show_attention()
    return made


def recorded(model, shuffled=False):
    rng = np.random.default_rng(0)
    sequences = [[FIRST, *rng.integers(6, 90, LENGTH - 1).tolist()] for _ in range(4)]
    if shuffled:
        sequences = [[*s[1:], s[0]] for s in sequences]
    texts = cut([Document("a", "s", tokens=s) for s in sequences], None, length=LENGTH)
    recording = Recording(model, texts, make({"sinks": {}}), trace_tokens=0)
    recording.run(model)
    return recording.profile(), texts


def attention(model, layer):
    return model.module.model.layers[model.facts.layers[layer].index].self_attn


def test_queries_of_zero_attend_evenly(model):
    with torch.no_grad():
        for layer in range(len(model.layers)):
            for parameter in attention(model, layer).q_proj.parameters():
                parameter.zero_()
    found = sinks(recorded(model)[0])
    even = np.mean(1 / np.arange(2, LENGTH + 1))
    assert found.column("strength") == pytest.approx([even] * len(model.layers), abs=1e-6)
    assert found.column("even") == pytest.approx([even] * len(model.layers), abs=1e-9)
    assert found.column("sinks") == [0] * len(model.layers)


def test_a_planted_sink_is_found_and_gone_when_its_token_comes_last(model):
    """In layer 0 the key of one token answers every query, through the pair of numbers that turns slowest with position."""
    layer = attention(model, 0)
    width = layer.head_dim
    with torch.no_grad():
        embedding = model.module.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[FIRST] = 0
        embedding[FIRST, 0] = 1
        model.module.model.layers[0].input_layernorm.weight.fill_(1)
        for parameter in (*layer.q_proj.parameters(), *layer.k_proj.parameters()):
            parameter.zero_()
        slow = slice(width // 2 - 1, None, width)
        layer.q_proj.bias[slow] = 100
        layer.k_proj.weight[slow, 0] = 100
    found = sinks(recorded(model)[0])
    assert found.column("strength")[0] == pytest.approx(1, abs=1e-4) and found.column("sinks")[0] == 1
    moved = sinks(recorded(model, shuffled=True)[0])
    assert moved.column("strength")[0] < 2 * moved.column("even")[0] and moved.column("sinks")[0] == 0


def test_it_is_what_the_module_says(model):
    made, texts = recorded(model)
    wanted = np.zeros(len(model.layers))
    for sequence in texts.sequences:
        with torch.no_grad():
            said = model.module(torch.tensor(sequence.tokens_T[None]).long(), output_attentions=True, use_cache=False)
        wanted += [a[0, :, 1:, 0].double().mean(0).sum().item() for a in (said.attentions[f.index] for f in model.facts.layers)]
    assert made.arrays["sink_L"] == pytest.approx(wanted, rel=1e-6)
    assert made.arrays["sinks_LB"].sum(1).tolist() == [len(texts.sequences) * model.module.config.num_attention_heads] * len(
        wanted
    )


def test_who_cannot_tell_refuses(tmp_path):
    save_tiny("qwen2_moe", tmp_path)
    texts = cut([Document("a", "s", tokens=[5, 6, 7, 8])], None, length=4)
    with Engine.open(tmp_path, context=16) as engine:
        assert "attention" not in available(engine, texts)
        with pytest.raises(InputError, match="sinks needs attention"):
            Recording(engine, texts, make({"sinks": {}})).run(engine)
    quiet = open_model(tmp_path)
    with pytest.raises(InputError, match="sinks needs attention"):
        Recording(quiet, texts, make({"sinks": {}})).run(quiet)
