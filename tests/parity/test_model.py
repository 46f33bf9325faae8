"""Whole-model parity, for every family and layout on disk: the trunk with experts decoded from byte ranges equals transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from moestro.core.experts import ExpertKey
from moestro.core.routing import Routing
from moestro.models.experts import read_expert, run_experts
from moestro.models.live import build_trunk
from moestro.models.open import open_model
from moestro.testing.tiny import FAMILIES, layouts

EVERY = [(family, layout) for family in FAMILIES for layout in layouts(family)]


def from_disk(one: Any) -> Any:
    """An experts function in float32 torch that reads each expert's parts from the file."""

    @cache
    def weights(ordinal: int, e: int) -> Any:
        found = read_expert(one.checkpoint, one.layout, ExpertKey(ordinal, e))
        return type(found)(
            *(None if a is None else torch.from_numpy(a) for a in (getattr(found, f) for f in found.__dataclass_fields__))
        )

    def run(ordinal: int, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        facts = one.layout.facts.layers[ordinal]
        routing = Routing(index_TK, weights_TK.float())
        return run_experts(x_TD.float(), routing, lambda e: weights(ordinal, e), facts.spec, facts.num_experts).to(x_TD.dtype)

    return run


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, 128, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("family", "layout"), EVERY)
@torch.no_grad()
def test_logits_with_padding_and_cache(saved, family, layout):
    one = saved(family, layout)
    trunk = build_trunk(one.checkpoint, one.layout, "float32", from_disk(one))
    ids_BT = tokens(2, 12)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0  # left padding
    wanted = one.reference(input_ids=ids_BT, attention_mask=mask_BT).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(
        trunk(input_ids=ids_BT, attention_mask=mask_BT).logits[mask_BT > 0], wanted[mask_BT > 0], atol=1e-4, rtol=0
    )

    ours, theirs = (m(input_ids=ids_BT[:, :9], use_cache=True) for m in (trunk, one.reference))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)
    for t in range(9, 12):
        ours, theirs = (
            m(input_ids=ids_BT[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            for m, out in ((trunk, ours), (one.reference, theirs))
        )
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "layout"), EVERY)
@torch.no_grad()
def test_open_model_and_save_and_reload(saved, family, layout, tmp_path):
    one = saved(family, layout)
    model = open_model(one.folder, "float32")
    ids = tokens(1, 10)
    wanted = one.reference(input_ids=ids).logits[0]
    (out,) = model.run(ids.tolist(), inputs=True)
    torch.testing.assert_close(out.logits_TV, wanted, atol=1e-4, rtol=0)
    assert [record.ordinal for record in out.records] == [layer.facts.ordinal for layer in model.layers]
    for record, layer in zip(out.records, model.layers):
        again = layer.route(record.x_TD)
        assert torch.equal(again.experts_TK, record.routing.experts_TK)
        torch.testing.assert_close(layer.experts.run(record.x_TD, again), record.y_TD)

    model.module.save_pretrained(tmp_path / "again")
    reloaded = open_model(tmp_path / "again", "float32")
    (out,) = reloaded.run(ids.tolist())
    torch.testing.assert_close(out.logits_TV, wanted, atol=1e-4, rtol=0)
    old, new = model.facts, reloaded.facts
    assert (new.family, new.vocabulary, new.d_model, new.decoder_layers) == (
        old.family,
        old.vocabulary,
        old.d_model,
        old.decoder_layers,
    )
    assert (new.kv_values_per_token, new.extra, new.tied_embeddings) == (old.kv_values_per_token, old.extra, old.tied_embeddings)
    for a, b in zip(old.layers, new.layers, strict=True):
        assert (a.index, a.num_experts, a.top_k, a.spec, a.router, a.shared) == (
            b.index,
            b.num_experts,
            b.top_k,
            b.spec,
            b.router,
            b.shared,
        )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_keeps_the_dtypes_that_transformers_keeps(saved, family):
    from transformers import AutoModelForCausalLM

    one = saved(family, None, "bfloat16")
    trunk = build_trunk(one.checkpoint, one.layout, "auto", from_disk(one))
    theirs = AutoModelForCausalLM.from_pretrained(one.folder, experts_implementation="eager")
    wanted = dict(theirs.state_dict())
    ours = {name: t for name, t in trunk.state_dict().items() if t.device.type != "meta"}
    assert {name.split(".")[-2] for name in set(wanted) - set(ours)} == {"experts"}
    for name, tensor in ours.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    ids = tokens(1, 10)
    difference = (trunk(input_ids=ids).logits - theirs(input_ids=ids).logits).float().abs()
    assert difference.mean() < 0.05, difference.mean()
