"""The promise: what is in memory, what is read and what was guessed change no bit, and the whole is transformers' own function."""

import numpy as np
import pytest
import torch

from moestro.core.experts import ExpertKey
from moestro.engine.engine import Engine
from moestro.engine.replay import NONE, policies, replay
from moestro.engine.sample import SamplingParams
from moestro.testing.tiny import FAMILIES, layouts

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 40)]
SOME = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "lfm2_moe", "jamba")
PREDICTORS = ("previous", "gate", "edgemoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_equals_transformers_at_every_cache_size(family, tiny, engine):
    for layout in layouts(family):
        folder, module = tiny(family, layout)
        with torch.inference_mode():
            expected = module(torch.tensor([TOKENS])).logits[0].numpy()
        found = [next(engine(folder, size).run([TOKENS])).logits_TV for size in ("minimal", "full")]
        np.testing.assert_allclose(found[0], expected, atol=1e-4)
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_other_dtypes_run_exactly_at_every_cache_size(family, dtype, tiny, engine):
    folder, module = tiny(family, None, dtype)
    with torch.inference_mode():
        expected = module(torch.tensor([TOKENS])).logits[0].numpy()
    wide = next(engine(folder, "minimal", dtype="float32").run([TOKENS])).logits_TV
    np.testing.assert_allclose(wide, expected, atol=1e-4)  # 16-bit weights, float32 arithmetic
    narrow = [next(engine(folder, size).run([TOKENS])).logits_TV for size in ("minimal", "medium", "full")]
    np.testing.assert_array_equal(narrow[0], narrow[1])
    np.testing.assert_array_equal(narrow[0], narrow[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_whole_prefill(family, tiny, engine):
    folder, _ = tiny(family)
    whole = engine(folder, "medium")
    chunked = engine(folder, "medium", chunk=7)
    a, b = (next(e.run([TOKENS])).logits_TV for e in (whole, chunked))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert len(chunked.pieces(len(TOKENS), 1)) == (6 if chunked.trunk.continues else 1)


def test_a_trunk_whose_states_cannot_continue_is_found_out(tiny, engine):
    assert not engine(tiny("jamba")[0]).trunk.continues
    assert engine(tiny("lfm2_moe")[0]).trunk.continues
    assert engine(tiny("gpt_oss")[0]).trunk.continues


@pytest.mark.parametrize("family", SOME)
def test_decoding_equals_one_pass_over_the_same_tokens(family, tiny, engine):
    """KV cache, sliding windows and recurrent states: logits while decoding are those of a prompt of that length."""
    folder, module = tiny(family)
    made = engine(folder, "minimal")
    array = np.array([TOKENS])
    state = made.trunk.start(1, 64)
    logits = [made.prefill(array[:, :20], state)[0]]
    logits += [made.decode(array[:, i : i + 1], state)[0] for i in range(20, 40)]
    with torch.inference_mode():
        expected = module(torch.tensor([TOKENS])).logits[0].numpy()[19:]
    np.testing.assert_allclose(np.array(logits), expected, atol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_greedy_answers_equal_transformers(family, tiny, engine):
    folder, module = tiny(family)
    made = engine(folder, "minimal")
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    found = made.generate(TOKENS[:12], params).run()[0].tokens
    with torch.inference_mode():
        ids = torch.tensor([TOKENS[:12]])
        whole = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert found == whole[0, 12:].tolist()


@pytest.mark.parametrize("family", SOME)
def test_a_batch_answers_as_each_prompt_alone(family, tiny, engine):
    folder, _ = tiny(family)
    prompts = [TOKENS[:5], TOKENS[5:20], TOKENS[20:21]]
    params = SamplingParams(max_tokens=10, temperature=0.8, top_k=20, seed=3)
    alone = engine(folder, "medium", batch=1).generate(prompts, params).run()
    together = engine(folder, "medium", batch=3, chunk=12).generate(prompts, params).run()
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.finish for r in together] == [r.finish for r in alone]


def test_padding_demands_no_expert(tiny, engine):
    folder, _ = tiny("mixtral")
    made = engine(folder, "full", batch=2, trace=True)
    made.generate([TOKENS[:3], TOKENS[3:13]], SamplingParams(max_tokens=1, ignore_eos=True)).run()
    trace = made.trace()
    assert trace.tokens == 13
    assert sorted(zip(trace.sequences_T.tolist(), trace.positions_T.tolist())) == [(0, i) for i in range(3)] + [
        (1, i) for i in range(10)
    ]
    assert (trace.experts_LTK >= 0).all()


def settings():
    for scope in ("layer", "global"):
        for eviction in policies():
            yield scope, eviction, NONE, 0
        for predictor in PREDICTORS:
            yield scope, "engine.evict.lru", f"engine.predict.{predictor}", 3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("scope", "eviction", "predictor", "prefetch"), list(settings()))
def test_any_policy_gives_the_same_bits_and_replay_agrees(family, scope, eviction, predictor, prefetch, tiny, engine):
    folder, _ = tiny(family)
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=1, ignore_eos=True)
    expected = engine(folder, "full").generate(TOKENS, params).run()[0].tokens
    for size in ("minimal", "medium"):
        plan = {"scope": scope, "eviction": eviction, "predictor": predictor, "prefetch": prefetch}
        made = engine(folder, size, trace=True, chunk=16, **plan)
        assert made.generate(TOKENS, params).run()[0].tokens == expected
        table = made.cache.table
        said = replay(made.trace(), table.slots, scope, eviction, predictor=predictor, prefetch=prefetch)
        assert (said.prefill, said.decode) == (table.counts(prefill=True), table.counts(prefill=False))
        assert said.decode.misses > 0


def test_pinned_experts_stay_and_replay_agrees(tiny, engine, opened):
    folder, _ = tiny("qwen3_moe")
    pinned = (ExpertKey(0, 3), ExpertKey(1, 5))
    _, layout = opened(folder)
    slots = tuple(la.top_k + 2 for la in layout.facts.layers)
    made = engine(folder, "full", trace=True, slots=slots, pinned=pinned)
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    expected = engine(folder, "full").generate(TOKENS, params).run()[0].tokens
    assert made.generate(TOKENS, params).run()[0].tokens == expected
    said = replay(made.trace(), slots, "layer", pinned=pinned)
    assert (said.prefill, said.decode) == (made.cache.table.counts(prefill=True), made.cache.table.counts(prefill=False))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_when_everything_fits_it_is_read_unasked_and_counts_stay_those_of_replay(scope, tiny, engine, opened):
    folder, _ = tiny("qwen3_moe")
    _, layout = opened(folder)
    experts = [la.num_experts for la in layout.facts.layers]
    slots = (sum(experts),) if scope == "global" else tuple(experts)
    made = engine(folder, "full", trace=True, scope=scope, slots=slots)
    assert len(made.cache._early) == sum(experts) - len(slots)
    for ticket in made.cache._early.values():
        made.reader.wait(ticket)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = engine(folder, "minimal").generate(TOKENS, params).run()[0].tokens
    assert made.generate(TOKENS, params).run()[0].tokens == expected
    table = made.cache.table
    said = replay(made.trace(), slots, scope)
    assert (said.prefill, said.decode) == (table.counts(prefill=True), table.counts(prefill=False))
    every = [ExpertKey(la, e) for la, count in enumerate(experts) for e in range(count)]
    most = sum(read.nbytes for key in every for read in made.store.reads(key, made.cache.slot(0)))
    assert most / 2 < made.reader.bytes_read <= most, "nothing is read twice"


def test_bytes_read_are_the_missed_experts(tiny, engine):
    folder, _ = tiny("mixtral", hidden_size=64, intermediate_size=128)
    made = engine(folder, "minimal")
    generation = made.generate(TOKENS[:8], SamplingParams(max_tokens=12, ignore_eos=True))
    generation.run()
    misses = made.cache.table.counts().misses
    said = generation.statistics
    assert said.prefill_bytes + said.decode_bytes == made.cache.bytes_read(prefill=True) + made.cache.bytes_read(prefill=False)
    size = made.facts.layers[0].expert_bytes
    assert misses * size <= said.prefill_bytes + said.decode_bytes <= misses * (size + 6 * 4096)


def test_runner_records_routing_and_inputs(tiny, engine):
    folder, _ = tiny("qwen2_moe")
    made = engine(folder, "minimal", chunk=16)
    out = next(made.run([TOKENS], inputs=True))
    assert [r.ordinal for r in out.records] == list(range(len(made.facts.layers)))
    for record, layer in zip(out.records, made.facts.layers):
        assert record.routing.experts_TK.shape == (40, layer.top_k)
        assert record.x_TD.shape == record.y_TD.shape == (40, layer.spec.d_model)
    assert next(made.run([TOKENS])).records[0].x_TD is None


def test_plan_of_another_model_is_refused(tiny, opened, make_plan):
    from moestro.core.errors import PlanError

    checkpoint, layout = opened(tiny("mixtral")[0])
    _, other = opened(tiny("olmoe")[0])
    with pytest.raises(PlanError, match="made for"):
        Engine(checkpoint, layout, make_plan(other))
