"""One row in one native call, or in two per layer: the bits, the counts and the trace of the general way, whatever is in memory."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from moestro.engine.attention_cache import Room, SequenceCache
from moestro.engine.native import NativeTrunk
from moestro.engine.replay import replay
from moestro.kernels import native as code
from moestro.kernels.ffn import ExpertView
from moestro.kernels.linear import linear
from moestro.kernels.step import AttentionStep, LayerStep, RouterStep, Shelf, Stack
from moestro.models.native.weights import wrap

pytestmark = [
    pytest.mark.skipif(not code.available(), reason="a step is native code"),
    pytest.mark.filterwarnings("ignore:.*RoPE scaling factor"),
]
TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 14)]
CASES = (
    ("mixtral", {"sliding_window": 8}),
    ("olmoe", {}),
    ("olmoe", {"clip_qkv": 0.5, "attention_bias": True}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "attention_bias": True}),
    ("granitemoeshared", {}),
    ("glm4_moe", {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.25}),
    ("gpt_oss", {"num_key_value_heads": 1}),
)


def opened_engine(engine, folder, size, *, way="pass", **changes):
    """way: one row takes native calls per 'pass' or per 'layer', or goes the 'general' way of many rows."""
    made = engine(folder, size, trace=True, trunk="native", **changes)
    assert isinstance(made.trunk, NativeTrunk)
    if way != "pass":
        made.trunk.stack = None
    if way == "general":
        made.trunk._steps = [None] * len(made.trunk._steps)
    return made


def decoded(made, prompt=5):
    """Logits after each token that follows the prompt."""
    made.begin()
    state = made.trunk.start(1, 2)  # the cache has to grow
    made.prefill(np.array([TOKENS[:prompt]]), state)
    return np.concatenate([made.decode(np.array([[token]]), state) for token in TOKENS[prompt:]])


@pytest.mark.parametrize("size", ["full", "minimal"])
@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_counts_and_trace(family, changes, dtype, size, tiny, engine):
    folder, _ = tiny(family, None, dtype, **changes)
    stack, steps, slow = (opened_engine(engine, folder, size, way=way) for way in ("pass", "layer", "general"))
    assert stack.trunk.stack is not None and all(step is not None for step in stack.trunk._steps)
    expected, theirs = decoded(slow), slow.trace()
    for fast in (stack, steps):
        np.testing.assert_array_equal(decoded(fast), expected)
        assert fast.cache.table.counts() == slow.cache.table.counts()
        ours = fast.trace()
        np.testing.assert_array_equal(ours.experts_LTK, theirs.experts_LTK)
        np.testing.assert_array_equal(ours.weights_LTK, theirs.weights_LTK)


def test_all_in_memory_asks_the_seam_for_nothing(tiny, engine):
    made = opened_engine(engine, tiny("olmoe")[0], "full")
    first = decoded(made)
    layers = made.facts.layers
    for layer in layers:  # every expert, in rows that the seam computes
        made._seam(layer.ordinal, np.zeros((layer.num_experts, layer.spec.d_model), np.float32),
                   np.arange(layer.num_experts)[:, None], np.ones((layer.num_experts, 1), np.float32), None)  # fmt: skip
    state = made.trunk.start(1, 32)
    made.prefill(np.array([TOKENS[:5]]), state)
    made.trunk.seam = lambda *_: pytest.fail("asked")
    made.dispatch.resident = lambda *_: pytest.fail("asked layer by layer")
    np.testing.assert_array_equal(made.decode(np.array([[TOKENS[5]]]), state)[0], first[0])


def test_what_a_step_does_not_compute_keeps_the_general_way(tiny, engine):
    groups = {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}
    for family, changes in (("deepseek_v3", {}), ("glm4_moe", groups)):
        made = opened_engine(engine, tiny(family, **changes)[0], "full")
        routed = [step for step, layer in zip(made.trunk._steps, made.trunk._layers, strict=True) if layer.router]
        assert routed and not any(routed)
        assert np.isfinite(decoded(made)).all()


@pytest.mark.parametrize("eviction", ["engine.evict.lru", "engine.evict.lfu", "engine.evict.arc"])
@pytest.mark.parametrize(("predictor", "prefetch"), [("engine.predict.none", 0), ("engine.predict.gate", 3), ("engine.predict.previous", 3)])  # fmt: skip
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_replay_agrees_whatever_guesses(eviction, predictor, prefetch, scope, tiny, engine):
    folder, _ = tiny("olmoe")
    policy = {"eviction": eviction, "predictor": predictor, "prefetch": prefetch, "scope": scope}
    fast, slow = (opened_engine(engine, folder, "medium", way=way, **policy) for way in ("pass", "general"))
    np.testing.assert_array_equal(decoded(fast), decoded(slow))
    for phase in (False, True):
        assert fast.cache.table.counts(prefill=phase) == slow.cache.table.counts(prefill=phase)
    again = replay(fast.trace(), fast.plan.slots, eviction=eviction, predictor=predictor, prefetch=prefetch, scope=scope)
    assert again.decode == fast.cache.table.counts(prefill=False)


def test_a_step_that_is_stopped_can_be_repeated(tiny, engine):
    made = opened_engine(engine, tiny("olmoe")[0], "full", way="layer")
    state = made.trunk.start(1, 16)
    made.prefill(np.array([TOKENS[:3]]), state)
    resident, calls = made.trunk.resident, []

    def stopping(ordinal, *rest):
        calls.append(ordinal)
        if ordinal == 1:
            raise KeyboardInterrupt
        return resident.views(ordinal, *rest)

    made.trunk.resident = replace(resident, views=stopping)
    with pytest.raises(KeyboardInterrupt):
        made.decode(np.array([[TOKENS[3]]]), state)
    assert calls == [0, 1]
    made.trunk.resident = resident
    whole = opened_engine(engine, tiny("olmoe")[0], "full")
    other = whole.trunk.start(1, 16)
    whole.prefill(np.array([TOKENS[:3]]), other)
    one, two = (e.decode(np.array([[TOKENS[3]]]), s) for e, s in ((made, state), (whole, other)))
    np.testing.assert_array_equal(one, two)


def weights(rows, cols):
    return wrap(np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)), None


def test_weights_and_arrays_that_do_not_fit_are_refused():
    attention = partial(
        AttentionStep, heads=2, kv_heads=1, width=4, q_norm=None, k_norm=None, norm_heads=True, clip=0.0, interleaved=False, scale=0.5,
        window=0, sinks=None,
    )  # fmt: skip
    maps = (weights(8, 6), weights(4, 6), weights(4, 6), weights(6, 8))
    router = partial(
        RouterStep, weights(5, 6), chosen=2, bias=None, renormalised=True, scale=1.0, activation="silu", limit=0.0, alpha=1.0
    )
    norm = np.ones(6, np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        LayerStep(norm, norm, 1e-5, 1.0, attention((*maps[:3], weights(6, 7))), None, None)
    with pytest.raises(ValueError, match="by 'best'"):
        LayerStep(norm, norm, 1e-5, 1.0, attention(maps), router(score="best"), None)
    step = LayerStep(norm, norm, 1e-5, 1.0, attention(maps), router(score="softmax"), None)
    cache = SequenceCache([Room(1, 4, 4)], 3, "float32")
    x, normed = np.ones((1, 6), np.float32), np.ones((1, 6), np.float32)
    turn = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    ids, shares = np.empty((1, 2), np.int64), np.empty((1, 2), np.float32)
    step.before_experts(x, normed, *cache.place(0), *turn, ids, shares)
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-6)
    assert ids[0, 0] == linear(normed, router(score="softmax").map[0]).argmax()
    with pytest.raises(ValueError, match="no room at 3"):
        step.before_experts(x, normed, *cache.place(0)[:2], 3, *turn, ids, shares)
    with pytest.raises(ValueError, match=r"int64 \(1, 2\)"):
        step.before_experts(x, normed, *cache.place(0), *turn, ids.astype(np.int32), shares)
    with pytest.raises(ValueError, match="0 experts; expected 2"):
        step.after_choice(x, normed, [], shares)

    stack, shelf = Stack([step], [0], 2), Shelf(1, 5)
    assert stack.climb(0, x, normed, [cache.place(0)], *turn, shelf, ids, shares) == 0  # nothing on the shelf
    for expert in range(5):
        matrices = [weights(rows, cols)[0] for rows, cols in ((3, 6), (3, 6), (6, 3))]
        shelf.put(0, expert, ExpertView(*matrices))
    assert stack.climb(0, x, normed, [cache.place(0)], *turn, shelf, ids, shares) == 1
    with pytest.raises(IndexError, match="no such place"):
        shelf.put(0, 5, None)
    with pytest.raises(ValueError, match="0 caches for layers 0 to 1"):
        stack.climb(0, x, normed, [], *turn, shelf, ids, shares)
    with pytest.raises(ValueError, match=r"int64 \(1, 2\)"):
        stack.climb(0, x, normed, [cache.place(0)], *turn, shelf, ids[:, :1], shares)
    small = [weights(rows, cols)[0] for rows, cols in ((3, 4), (3, 4), (4, 3))]
    for expert in range(5):
        shelf.put(0, expert, ExpertView(*small))
    with pytest.raises(ValueError, match="do not fit their layer"):
        stack.climb(0, x, normed, [cache.place(0)], *turn, shelf, ids, shares)
