"""From checkpoint to checkpoint: stock transformers loads the result, and it computes what the live model edited by the same plan computes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.compress import executor
from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.record import read_plan_of
from moestro.core.errors import CoverageError, InputError, PlanError, StorageError, UnsupportedModel
from moestro.core.plans.compression import LayerChange, Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.models.writer import CheckpointWriter
from moestro.testing.tiny import FAMILIES, layouts
from tests.compress.conftest import merging, pruning, some_experts

IDS = torch.randint(4, 128, (2, 16), generator=torch.Generator().manual_seed(0))


def stock(folder) -> torch.Tensor:
    """What transformers computes in float32, every weight taken from the file and nothing left over."""
    module, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    with torch.no_grad():
        return module.eval()(input_ids=IDS).logits.float()


def ours(model) -> torch.Tensor:
    return torch.stack([out.logits_TV.float() for out in model.run(IDS.tolist())])


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_by_every_family_as_by_hand(saved, family, tmp_path):
    one = saved(family)
    plan = pruning(one)
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    facts = describe(made.checkpoint).facts
    kept = some_experts(one)
    assert {la.num_experts for la in facts.layers} == {len(kept)} and facts.layers[0].top_k == one.layout.facts.layers[0].top_k
    live = compress_live(plan, open_model(one.checkpoint))
    got = stock(tmp_path / "out")
    torch.testing.assert_close(ours(live), got, atol=2e-5, rtol=0)
    assert (got - stock(one.folder)).abs().max() > 1e-3, "pruning changes something"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]


@pytest.mark.parametrize(("family", "layout"), [(f, la) for f in ("qwen3_moe", "granitemoe", "gpt_oss") for la in layouts(f)])
def test_every_layout_on_disk(saved, family, layout, tmp_path):
    one = saved(family, layout)
    plan = pruning(one)
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    before, after = set(one.checkpoint.tensors), set(made.checkpoint.tensors)
    assert after <= before, "the names stay what they were"
    model = open_model(made.checkpoint)
    torch.testing.assert_close(ours(model), ours(compress_live(plan, open_model(one.checkpoint))), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"])
@pytest.mark.parametrize("how", ["merge", "slim", "repoint"])
def test_computed_slots_have_the_bits_of_the_live_model(saved, family, how, dtype, tmp_path):
    one = saved(family, dtype=dtype)
    spec = one.layout.facts.layers[0].spec
    plan = merging(one, slim=spec.d_expert // 2 if how == "slim" else 0, repoint=how == "repoint")
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    live, read = compress_live(plan, open_model(one.checkpoint)), open_model(made.checkpoint)
    for a, b in zip(live.layers, read.layers, strict=True):
        assert a.facts.num_experts == b.facts.num_experts and a.facts.spec == b.facts.spec
        for (name, x), (other, y) in zip(a._seam.block.named_parameters(), b._seam.block.named_parameters(), strict=True):
            assert name == other and x.dtype == y.dtype and torch.equal(x, y), name
    assert torch.equal(ours(live), ours(read))
    torch.testing.assert_close(ours(open_model(made.checkpoint, "float32")), stock(tmp_path / "out"), atol=2e-5, rtol=0)


def test_repointed_rows_of_one_expert_change_nothing_when_it_is_the_same(saved, tmp_path):
    """Every router row leads to its own expert: the identity, bit for bit."""
    one = saved("mixtral")
    plan = pruning(one)
    every = range(one.layout.facts.layers[0].num_experts)
    same = replace(plan, layers=tuple(replace(la, slots=tuple(Slot((e,)) for e in every)) for la in plan.layers))
    made = compress(same, one.checkpoint, one.layout, tmp_path / "out")
    assert made.bytes_after == made.bytes_before
    for name in one.checkpoint.tensors:
        assert np.array_equal(made.checkpoint.read(name), one.checkpoint.read(name))
    assert made.checkpoint.config == one.checkpoint.config


def test_neurons_of_different_numbers_are_filled_with_zeros(saved, tmp_path):
    one = saved("mixtral")
    layers = tuple(
        LayerChange(la.ordinal, tuple(Slot((e,), neurons=tuple(range(e + 3))) for e in range(4)))
        for la in one.layout.facts.layers
    )
    made = compress(replace(pruning(one), layers=layers), one.checkpoint, one.layout, tmp_path / "out")
    model = open_model(made.checkpoint)
    assert model.facts.layers[0].spec.d_expert == 6
    weights = model.layers[0].experts.weights(1)
    assert not weights.up_FD[4:].any() and weights.up_FD[:4].any() and not weights.down_DF[:, 4:].any()
    old = open_model(one.checkpoint).layers[0].experts.weights(1)
    assert torch.equal(weights.up_FD[:4], old.up_FD[:4]) and torch.equal(weights.down_DF[:, :4], old.down_DF[:, :4])


@pytest.mark.parametrize(
    ("family", "said"), [("jamba", "dense layers"), ("llama4_text", "dense layers"), ("hunyuan_v1_moe", "shared experts")]
)
def test_families_that_cannot_say_a_width(saved, family, said, tmp_path):
    one = saved(family)
    plan = pruning(one)
    slim = tuple(replace(la, slots=tuple(replace(s, neurons=(0, 1, 2, 3)) for s in la.slots)) for la in plan.layers)
    with pytest.raises(UnsupportedModel, match=said):
        compress(replace(plan, layers=slim), one.checkpoint, one.layout, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shared_experts_keep_their_width(saved, tmp_path):
    """deepseek_v3: 2 shared experts of 16 become 4 of 8."""
    one = saved("deepseek_v3")
    made = compress(merging(one, slim=8), one.checkpoint, one.layout, tmp_path / "out")
    assert made.checkpoint.config["n_shared_experts"] == 4 and made.checkpoint.config["moe_intermediate_size"] == 8
    with pytest.raises(UnsupportedModel, match="whole number"):
        compress(merging(one, slim=7), one.checkpoint, one.layout, tmp_path / "other")


def test_what_is_lost_has_to_be_named(saved, tmp_path):
    one = saved("deepseek_v3")
    more = tmp_path / "more"
    with CheckpointWriter(more, one.checkpoint.config) as writer:
        for name in one.checkpoint.tensors:
            writer.copy(name, one.checkpoint)
        writer.add("model.layers.3.mlp.gate.weight", np.ones((8, 32), np.float32))
        checkpoint = writer.finish(copy_files_from=one.checkpoint)
    layout = describe(checkpoint)
    plan = replace(pruning(one), subjects=(replace(pruning(one).subjects[0], fingerprint=checkpoint.fingerprint),))
    with pytest.raises(CoverageError, match=r"--drop 'model\.layers\.3\.\*'") as caught:
        compress(plan, checkpoint, layout, tmp_path / "out")
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()
    made = compress(replace(plan, dropped=("model.layers.3.*",)), checkpoint, layout, tmp_path / "out")
    assert made.dropped == ("model.layers.3.mlp.gate.weight",)


def test_an_interrupted_run_goes_on_at_the_layer(saved, tmp_path, monkeypatch):
    one = saved("olmoe")
    plan = merging(one)
    whole = compress(plan, one.checkpoint, one.layout, tmp_path / "whole").checkpoint
    # Shards of a layer each, as they are in models of real size.
    monkeypatch.setattr(executor, "_SMALLEST_SHARD", 1)
    made, real = [], executor.Job.make

    def stop(self, ordinal, slot, parts):
        if ordinal == 2:
            raise KeyboardInterrupt
        made.append(ordinal)
        return real(self, ordinal, slot, parts)

    monkeypatch.setattr(executor.Job, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    assert not (tmp_path / "out").exists() and made == [0, 1]
    made.clear()
    monkeypatch.setattr(executor.Job, "make", lambda *a: made.append(a[1]) or real(*a))
    again = compress(plan, one.checkpoint, one.layout, tmp_path / "out").checkpoint
    assert 0 not in made and 2 in made
    for name in whole.tensors:
        assert np.array_equal(whole.read(name), again.read(name)), name


def test_bad_targets(saved, tmp_path, monkeypatch):
    one = saved("mixtral")
    plan = pruning(one)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(StorageError, match="exists already"):
        compress(plan, one.checkpoint, one.layout, tmp_path / "full")
    with pytest.raises(InputError, match="being read"):
        compress(plan, one.checkpoint, one.layout, one.folder)
    with pytest.raises(PlanError, match="was made for"):
        compress(plan, saved("olmoe").checkpoint, saved("olmoe").layout, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(StorageError, match="MB free"):
        compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_mxfp4_experts_can_be_removed_but_not_merged(saved, tmp_path):
    one = saved("gpt_oss", "mxfp4")
    with pytest.raises(PlanError, match="removed but not changed"):
        compress(replace(merging(one)), one.checkpoint, one.layout, tmp_path / "out")


def test_the_record(saved, tmp_path):
    one = saved("mixtral")
    plan = pruning(one, stated=("one expert was never seen",))
    compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    assert read_plan_of(tmp_path / "out") == plan
    record = json.loads((tmp_path / "out" / "moestro.json").read_text())
    assert record["experts"] == {"before": 4, "after": 2} and record["source"]["fingerprint"] == one.checkpoint.fingerprint
    card = (tmp_path / "out" / "README.md").read_text()
    assert "never seen" in card and "has not been measured" in card and card.startswith("---\n")
    assert Checkpoint.open(tmp_path / "out").tensors
