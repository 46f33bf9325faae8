import numpy as np

from moestro.engine.trunk import Trunk

TOKENS = np.array([[5, 9, 77, 40, 31, 8, 100, 64]])


def test_it_is_a_trunk_and_counts_its_weights(tiny, engine):
    made = engine(tiny("mixtral")[0])
    assert isinstance(made.trunk, Trunk)
    assert made.trunk.nbytes >= made.facts.trunk_bytes
    assert made.trunk.nbytes < made.facts.trunk_bytes + 100_000  # rotary frequencies and the like


def test_keys_and_values_are_held_once_and_in_the_room_reserved(tiny, engine):
    made = engine(tiny("mixtral")[0])
    state = made.trunk.start(1, 64)
    made.prefill(TOKENS, state)
    layer = state.cache.layers[0]
    address = layer.keys.data_ptr()
    for token in range(20):
        made.decode(np.array([[token + 3]]), state)
    assert layer.keys.data_ptr() == address and layer.keys.shape[2] == 28 and layer.get_seq_length() == 28
    assert state.length == 28


def test_more_tokens_than_reserved_still_work(tiny, engine):
    made = engine(tiny("mixtral")[0])
    small, large = made.trunk.start(1, 8), made.trunk.start(1, 64)
    for state in (small, large):
        made.prefill(TOKENS, state)
    for token in range(5):
        a, b = (made.decode(np.array([[token + 3]]), state) for state in (small, large))
        np.testing.assert_array_equal(a, b)


def test_logits_of_every_token_or_of_the_last(tiny, engine):
    made = engine(tiny("qwen3_moe")[0])
    every = made.trunk.forward(TOKENS, made.trunk.start(1, 16), every=True)
    last = made.trunk.forward(TOKENS, made.trunk.start(1, 16))
    assert every.shape == (1, 8, made.facts.vocabulary) and last.shape == (1, made.facts.vocabulary)
    assert every.dtype == last.dtype == np.float32
    np.testing.assert_allclose(every[:, -1], last, atol=1e-5)


def test_bfloat16_trunk_hands_over_float32(tiny, engine):
    made = engine(tiny("mixtral", None, "bfloat16")[0])
    seen = []
    seam = made.trunk.seam
    made.trunk.seam = lambda ordinal, x, ids, w, valid: (
        seen.append((x.dtype, ids.dtype, w.dtype)),
        seam(ordinal, x, ids, w, valid),
    )[1]
    assert made.trunk.forward(TOKENS, made.trunk.start(1, 16)).dtype == np.float32
    assert set(seen) == {(np.dtype("float32"), np.dtype("int64"), np.dtype("float32"))}


def test_ahead_of_the_own_input_is_the_real_choice(tiny, engine):
    """Given a layer's real input, `ahead` names the experts that the layer takes, for every kind of router."""
    for family in (
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
        "gpt_oss",
        "llama4_text",
        "granitemoe",
        "ernie4_5_moe",
        "lfm2_moe",
        "minimax_m2",
    ):
        made = engine(tiny(family, **({"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}))[0])
        out = next(made.run([TOKENS[0].tolist()], inputs=True))
        for record, layer in zip(out.records, made.facts.layers):
            ids = made.trunk.ahead(layer.ordinal, record.x_TD, layer.top_k)
            assert ids is not None, family
            np.testing.assert_array_equal(np.sort(ids, 1), np.sort(record.routing.experts_TK, 1), err_msg=family)


def test_no_gradients_are_kept(tiny, engine):
    made = engine(tiny("mixtral")[0])
    state = made.trunk.start(1, 16)
    made.prefill(TOKENS, state)
    assert not state.cache.layers[0].keys.requires_grad
