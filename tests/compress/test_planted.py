"""Planted models whose right answer is known: idle experts, a domain's experts, duplicates in another order of neurons, a Super Expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.planner import Wish, plan_compression
from moestro.core.experts import ExpertKey
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import read_expert
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.models.writer import Edits, Made, edit_checkpoint
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from moestro.testing.planted import domain_model

CRITERIA = ("frequency", "gate_mass", "reap", "output_norm", "easy_ep", "premoe")
PROBES = ("counts", "gates", "norms", "contribution", "selection", "alikeness", "similarity", "samples", "maxima", "moments")


def profiled(model, sequences):
    documents = [Document("all", str(i), tokens=list(s)) for i, s in enumerate(sequences)]
    texts = cut(documents, None, length=48)
    recording = Recording(model, texts, make({name: {} for name in PROBES}))
    recording.run(model)
    return recording.profile()


def plan_of(method, checkpoint, profile, **wish):
    return plan_compression(method, checkpoint, describe(checkpoint), Wish(**wish), profile=profile)


def logits(model, sequences) -> torch.Tensor:
    return torch.stack([out.logits_TV for out in model.run([list(s) for s in sequences])])


def kept(plan, ordinal: int) -> set[int]:
    return {e for slot in plan.layers[ordinal].slots for e in slot.sources}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two layers of 3 domains with 3 experts each, and 3 idle experts."""
    torch.set_num_threads(1)
    made = domain_model(
        tmp_path_factory.mktemp("planted") / "model", experts_per_domain=3, idle=3, tokens_per_domain=6, d_expert=8, length=24
    )
    checkpoint = Checkpoint.open(made.path)
    model = open_model(checkpoint)
    return made, checkpoint, model, profiled(model, made.sequences)


@pytest.mark.parametrize("method", [*CRITERIA, "reconstruction"])
def test_idle_experts_are_found_and_cost_nothing(planted, method):
    made, checkpoint, model, profile = planted
    plan = plan_of(method, checkpoint, profile, keep=9)
    for ordinal in range(2):
        used = set(made.truth.experts_VLK[:, ordinal].reshape(-1).tolist())
        assert kept(plan, ordinal) == used
    torch.testing.assert_close(
        logits(compress_live(plan, model), made.sequences), logits(model, made.sequences), atol=1e-4, rtol=0
    )
    drawn = plan_of("random", checkpoint, profile, keep=9)
    assert (logits(compress_live(drawn, model), made.sequences) - logits(model, made.sequences)).abs().max() > 0.1


@pytest.mark.parametrize("method", CRITERIA)
def test_a_text_of_one_domain_keeps_its_experts(planted, method):
    made, checkpoint, model, _ = planted
    own = [s for s in made.sequences if made.truth.group_V[s[0]] == 1]
    plan = plan_of(method, checkpoint, profiled(model, own), keep=3)
    for ordinal in range(2):
        assert kept(plan, ordinal) == made.truth.domain_experts(1, ordinal)
    small = compress_live(plan, model)
    torch.testing.assert_close(logits(small, own), logits(model, own), atol=1e-4, rtol=0)
    other = [s for s in made.sequences if made.truth.group_V[s[0]] == 0]
    assert (logits(small, other) - logits(model, other)).abs().max() > 0.1


@pytest.fixture(scope="module")
def duplicated(planted, tmp_path_factory):
    """In each layer three experts of one domain are copies of three of another, their neurons in another order."""
    made, checkpoint, _, _ = planted
    rng, pairs, edits = np.random.default_rng(0), [], {}
    for ordinal in range(2):
        first, second = (sorted(made.truth.domain_experts(g, ordinal)) for g in (0, 1))
        pairs.append({frozenset(pair) for pair in zip(first, second, strict=True)})
        for a, b in zip(first, second, strict=True):
            order = rng.permutation(8)
            found = read_expert(checkpoint, describe(checkpoint), ExpertKey(ordinal, a))
            new = {"w1": found.gate_FD[order], "w3": found.up_FD[order], "w2": np.ascontiguousarray(found.down_DF[:, order])}  # type: ignore[index]
            for matrix, array in new.items():
                name = f"model.layers.{ordinal}.block_sparse_moe.experts.{b}.{matrix}.weight"
                edits[name] = Made("F32", array.shape, lambda array=array: array)
    copied = edit_checkpoint(checkpoint, tmp_path_factory.mktemp("duplicated") / "model", Edits(replace=edits))
    model = open_model(copied)
    return made, copied, model, profiled(model, made.sequences), pairs


@pytest.mark.parametrize("method", ["hierarchical", "output_similarity"])
def test_duplicates_are_merged_without_loss(duplicated, tmp_path, method):
    made, checkpoint, model, profile, pairs = duplicated
    if method == "output_similarity":  # leaders are the most used: give both of a pair no chance to lead
        for ordinal, found in enumerate(pairs):
            for pair in found:
                a, b = sorted(pair)
                profile.arrays["counts_LE"][ordinal, a] = 1000 + a
                profile.arrays["counts_LE"][ordinal, b] = 1
            idle = set(range(12)) - set(made.truth.experts_VLK[:, ordinal].reshape(-1).tolist())
            for e in idle:
                profile.arrays["counts_LE"][ordinal, e] = 500
    plan = plan_of(method, checkpoint, profile, keep=9, router="repoint")
    for change, wanted in zip(plan.layers, pairs, strict=True):
        assert {frozenset(s.sources) for s in change.slots if len(s.sources) > 1} == wanted
        assert change.loss == pytest.approx(0, abs=1e-4)
        assert any(any(a) for s in change.slots for a in s.alignments), "the order of neurons was found"
    written = compress(plan, checkpoint, describe(checkpoint), tmp_path / "out").checkpoint
    before, after = logits(model, made.sequences), logits(open_model(written), made.sequences)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    crooked = plan_of(method, checkpoint, profile, keep=9, router="repoint", align=False, fuse="average")
    assert (logits(compress_live(crooked, model), made.sequences) - before).abs().max() > 0.1, "alignment is what makes it free"
    pruned = plan_of("reap", checkpoint, profile, keep=6)
    assert (logits(compress_live(pruned, model), made.sequences) - before).abs().max() > 0.1, "merging beats pruning to fewer"


def test_a_super_expert_is_kept_whatever_the_method_says(planted, tmp_path):
    made, checkpoint, _, _ = planted
    key = ExpertKey(0, int(made.truth.experts_VLK[0, 0, 0]))
    name = f"model.layers.0.block_sparse_moe.experts.{key.expert}.w2.weight"
    array = 200 * checkpoint.read(name)
    changed = edit_checkpoint(checkpoint, tmp_path / "model", Edits(replace={name: Made("F32", array.shape, lambda: array)}))
    profile = profiled(open_model(changed), made.sequences)
    worst = [seed for seed in range(20) if key.expert not in kept(plan_of("random", changed, profile, keep=4, protect=False, options={"seed": seed}), 0)]  # fmt: skip
    assert worst, "lots would drop it"
    for seed in worst[:3]:
        plan = plan_of("random", changed, profile, keep=4, options={"seed": seed})
        assert plan.protected == (key,) and key.expert in kept(plan, 0)
    merged = plan_of("hierarchical", changed, profile, keep=4)
    assert [s.sources for s in merged.layers[0].slots if key.expert in s.sources] == [(key.expert,)]
    zeros = plan_of("moe_pruner", changed, profile)
    assert [e for e, slot in enumerate(zeros.layers[0].slots) if not slot.encodings] == [key.expert] and zeros.protected == (key,)
    for method, wish in (("contribution", {"ratio": 0.5}), ("latent", {"options": {"group": 6}})):
        assert f"changed like all others: layer 0 expert {key.expert}" in " ".join(
            plan_of(method, changed, profile, **wish).stated
        )
