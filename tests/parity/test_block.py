"""Law of a layer, for every family: run(x, route(x)) equals the Hugging Face block."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from moestro.models.open import open_model
from moestro.testing.tiny import FAMILIES


def decoder_layers(module: Any) -> dict[int, Any]:
    """Decoder layers of a transformers module that hold experts, found by name."""
    names = [name for name, _ in module.named_modules() if name.endswith(".experts")]
    found = {int(at[1]): name[: at.end()] for name in names if (at := re.search(r"\blayers\.(\d+)", name))}
    return {index: module.get_submodule(name) for index, name in found.items()}


def block_output(decoder: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """What the Hugging Face decoder layer adds to its residual for x_TD, by its own modules."""
    names = [name for name, _ in decoder.named_modules() if name.endswith("experts") and "shared" not in name]
    out = decoder.get_submodule(names[0].rpartition(".")[0])(x_TD[None])
    out = (out[0] if isinstance(out, tuple) else out).reshape(x_TD.shape)
    return out + decoder.shared_mlp(x_TD) if hasattr(decoder, "shared_mlp") else out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_run_of_route_is_the_block(saved, family):
    one = saved(family)
    model = open_model(one.folder, "float32")
    decoders = decoder_layers(one.reference)
    assert [layer.facts.index for layer in model.layers] == sorted(decoders)
    for layer in model.layers:
        x_TD = torch.randn(9, layer.facts.spec.d_model, generator=torch.Generator().manual_seed(layer.facts.ordinal))
        wanted = block_output(decoders[layer.facts.index], x_TD)
        routing = layer.route(x_TD)
        assert routing.experts_TK.shape == (9, layer.facts.top_k)
        assert len({tuple(sorted(row)) for row in routing.experts_TK.tolist()}) > 1, "the tiny model routes every token alike"
        assert wanted.abs().mean() > 0.05
        torch.testing.assert_close(layer.run(x_TD, routing), wanted, atol=1e-5, rtol=0)
        assert (layer.shared is None) == (layer.facts.shared == 0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_probs_say_what_the_router_saw(saved, family):
    layer = open_model(saved(family).folder, "float32").layers[0]
    x_TD = torch.randn(5, layer.facts.spec.d_model, generator=torch.Generator().manual_seed(3))
    routing = layer.route(x_TD)
    weight = next(p for p in layer._seam.router.parameters() if p.ndim == 2)
    bias = getattr(layer._seam.router, "bias", None)
    torch.testing.assert_close(routing.logits_TE, torch.nn.functional.linear(x_TD, weight, bias), atol=1e-5, rtol=0)
    facts = layer.facts.router
    if facts.score in ("softmax", "sigmoid"):
        wanted = routing.logits_TE.softmax(-1) if facts.score == "softmax" else routing.logits_TE.sigmoid()
        torch.testing.assert_close(routing.probs_TE, wanted)
        taken = routing.probs_TE.gather(1, routing.experts_TK)
        if facts.renormalised:
            taken = taken / taken.sum(-1, keepdim=True)
        torch.testing.assert_close(routing.weights_TK, taken * facts.scale, atol=1e-5, rtol=0)
    else:
        assert routing.probs_TE is None
        taken = routing.logits_TE.gather(1, routing.experts_TK)
        after = {"softmax_after": lambda z: z.softmax(-1), "sigmoid_after": lambda z: z.sigmoid()}
        if facts.weights in after:
            torch.testing.assert_close(routing.weights_TK, after[facts.weights](taken), atol=1e-5, rtol=0)
