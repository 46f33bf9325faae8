"""The decoder without torch computes what transformers computes: every family, however it is stored, fed and batched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.core.errors import CheckpointError, InputError, UnsupportedModel
from moestro.core.layer import LayerFacts, RouterFacts
from moestro.engine.attention_cache import Room, SequenceCache
from moestro.engine.engine import Engine
from moestro.engine.native import NativeTrunk, Resident, choose_trunk
from moestro.engine.sample import SamplingParams
from moestro.engine.trunk import TransformersTrunk, Trunk
from moestro.kernels.attention import attend
from moestro.models.families.settings import Settings
from moestro.models.native import native_supported
from moestro.models.native.rope import parameters, rope
from moestro.models.native.router import route
from moestro.models.writer import CheckpointWriter
from moestro.testing.tiny import FAMILIES, layouts, save_tiny

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 40)]
NATIVE = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "granitemoeshared",
    "glm4_moe",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v2",
    "deepseek_v2_groups",
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = (
    ("mixtral", {"sliding_window": 8}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("mixtral", {"head_dim": 16, "hidden_act": "gelu"}),
    ("mixtral", {"rope_parameters": LLAMA3}),
    ("olmoe", {"clip_qkv": 0.5, "attention_bias": True}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4, "rope_parameters": YARN}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "attention_bias": True}),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    ("granitemoe", {"attention_bias": True, "tie_word_embeddings": True}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": True, "partial_rotary_factor": 0.25}),
    ("glm4_moe", {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_key_value_heads": 1}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", {"rope_interleave": False, "n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
    ("deepseek_v2", {"mlp_bias": True, "q_lora_rank": None}),
    ("deepseek_v2", {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
)
# Its own rule of thumb for YaRN's settings is only a warning of transformers'.
pytestmark = pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")


class NativeEngine(Engine):
    """An engine with the native trunk."""

    def _load_trunk(self) -> Trunk:
        options = {"threads": self.threads, "resident": Resident(self._resident, self._shelf, self._used)}
        return NativeTrunk(self.checkpoint, self.layout, self._seam, self.plan.dtype, **options)


@pytest.fixture
def native(request, opened, make_plan):
    """native(folder, size, trace=..., **plan fields): an engine, closed at the end of the test."""

    def make(folder, size="full", *, trace=False, **changes):
        checkpoint, layout = opened(folder)
        made = NativeEngine(checkpoint, layout, make_plan(layout, size, **changes), threads=1, trace=trace)
        request.addfinalizer(made.close)
        return made

    return make


def logits_of(module, tokens):
    with torch.inference_mode():
        return module(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("family", NATIVE)
def test_logits_equal_transformers_in_every_layout(family, tiny, native):
    for layout in layouts(family):
        folder, module = tiny(family, layout)
        made = native(folder, "minimal")
        assert isinstance(made.trunk, Trunk)
        expected = logits_of(module, TOKENS)
        np.testing.assert_allclose(next(made.run([TOKENS])).logits_TV, expected, atol=1e-4)
        last = made.prefill(np.array([TOKENS]), made.trunk.start(1, 64))
        np.testing.assert_allclose(last[0], expected[-1], atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_variants_equal_transformers(family, changes, tmp_path, native):
    module = save_tiny(family, tmp_path, **changes)
    made = native(tmp_path, chunk=11)
    np.testing.assert_allclose(next(made.run([TOKENS])).logits_TV, logits_of(module, TOKENS), atol=1e-4)


@pytest.mark.parametrize("family", NATIVE)
def test_chunks_and_decoding_equal_one_pass(family, tiny, native):
    folder, module = tiny(family)
    made = native(folder, "medium", chunk=7)
    array, expected = np.array([TOKENS]), logits_of(module, TOKENS)
    state = made.trunk.start(1, 64)
    found = [made.prefill(array[:, :20], state)[0]]
    found += [made.decode(array[:, i : i + 1], state)[0] for i in range(20, 40)]
    np.testing.assert_allclose(np.array(found), expected[19:], atol=1e-4)
    assert state.length == 40


@pytest.mark.parametrize("family", NATIVE)
def test_how_a_prompt_is_cut_changes_no_bit(family, tiny, native):
    folder, _ = tiny(family)
    found = [next(native(folder, size, chunk=chunk).run([TOKENS])).logits_TV for size, chunk in (("full", 512), ("minimal", 9))]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("family", NATIVE)
def test_routing_equals_transformers(family, tiny, native, engine):
    folder, _ = tiny(family)
    engines = native(folder), engine(folder)
    assert [type(made.trunk) for made in engines] == [NativeTrunk, TransformersTrunk]
    ours, theirs = (next(made.run([TOKENS], inputs=True)) for made in engines)
    for mine, other in zip(ours.records, theirs.records, strict=True):
        order, others = (np.argsort(r.routing.experts_TK, axis=1) for r in (mine, other))
        pairs = [(r.routing, o) for r, o in ((mine, order), (other, others))]
        ids = [np.take_along_axis(r.experts_TK, o, 1) for r, o in pairs]
        weights = [np.take_along_axis(r.weights_TK, o, 1) for r, o in pairs]
        np.testing.assert_array_equal(ids[0], ids[1])
        np.testing.assert_allclose(weights[0], weights[1], atol=2e-6)
        np.testing.assert_allclose(mine.y_TD, other.y_TD, atol=1e-4)


@pytest.mark.parametrize("family", NATIVE)
def test_a_padded_batch_equals_each_sequence_alone(family, tiny, native):
    folder, _ = tiny(family)
    made = native(folder, batch=3, chunk=12)
    prompts = [TOKENS[:5], TOKENS[5:20], TOKENS[20:21]]
    tokens, valid = np.zeros((3, 15), np.int64), np.zeros((3, 15), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, 15 - len(prompt) :], valid[row, 15 - len(prompt) :] = prompt, True
    state = made.trunk.start(3, 32)
    found = [made.prefill(tokens, state, valid)]
    going = np.array([[True], [False], [True]])
    found += [made.decode(np.full((3, 1), 9 + i), state, going) for i in range(3)]
    assert state.valid_BT is not None
    assert state.valid_BT.shape == (3, 18) and state.valid_BT[:, 15:].tolist() == [[True] * 3, [False] * 3, [True] * 3]
    for row, prompt in enumerate(prompts):
        alone = made.trunk.start(1, 32)
        wanted = [made.prefill(np.array([prompt]), alone)[0]]
        wanted += [made.decode(np.array([[9 + i]]), alone)[0] for i in range(3)]
        for step in range(4 if going[row, 0] else 1):
            np.testing.assert_array_equal(found[step][row], wanted[step])
    whole = made.trunk.forward(tokens, made.trunk.start(3, 32), valid, every=True)
    assert whole.shape == (3, 15, made.facts.vocabulary) and not whole[~valid].any()
    np.testing.assert_array_equal(whole[:, -1], found[0])


def test_a_pass_of_padding_alone_changes_nothing(tiny, native):
    made = native(tiny("qwen2_moe")[0], trace=True)
    state = made.trunk.start(1, 32)
    first = made.prefill(np.array([TOKENS[:6]]), state)
    none = made.decode(np.array([[5]]), state, np.array([[False]]))
    assert none.shape == first.shape and not none.any()
    other = made.trunk.start(1, 32)
    made.prefill(np.array([TOKENS[:6]]), other)
    np.testing.assert_array_equal(made.decode(np.array([[9]]), state), made.decode(np.array([[9]]), other))
    assert made.trace().tokens == 14


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_answers_equal_transformers(family, tiny, native):
    folder, module = tiny(family)
    found = native(folder, "minimal").generate(TOKENS[:12], SamplingParams(max_tokens=16, ignore_eos=True)).run()[0].tokens
    with torch.inference_mode():
        ids = torch.tensor([TOKENS[:12]])
        whole = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert found == whole[0, 12:].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_sixteen_bit_weights_are_used_in_place_and_exactly(family, dtype, tiny, native):
    folder, module = tiny(family, None, dtype)
    expected = logits_of(module, TOKENS)  # a float32 module with the same weights
    wide, own = native(folder, dtype="float32"), native(folder)
    np.testing.assert_allclose(next(wide.run([TOKENS])).logits_TV, expected, atol=1e-4)
    near = next(own.run([TOKENS])).logits_TV  # keys and values are cached in 16 bits
    assert 0 < np.median(np.abs(near - expected)) < 0.01
    assert own.trunk.nbytes <= own.facts.trunk_bytes * 1.1
    assert own.trunk.start(1, 16).cache[0].nbytes * 2 == wide.trunk.start(1, 16).cache[0].nbytes
    np.testing.assert_array_equal(near, next(native(folder, "minimal", chunk=5).run([TOKENS])).logits_TV)


def test_a_tied_embedding_is_held_once(tiny, opened, tmp_path):
    folder, _ = tiny("mixtral", tie_word_embeddings=True)
    checkpoint, layout = opened(folder)
    made = NativeTrunk(checkpoint, layout, lambda *_: pytest.fail("not called"))
    assert made.nbytes == layout.facts.trunk_bytes
    twice = rewritten(checkpoint, tmp_path / "twice", extra={"lm_head.weight": checkpoint.read("model.embed_tokens.weight")})
    again = NativeTrunk(*opened(twice), lambda *_: pytest.fail("not called"))
    assert again.nbytes == made.nbytes
    apart = rewritten(checkpoint, tmp_path / "apart", extra={"lm_head.weight": 2 * checkpoint.read("model.embed_tokens.weight")})
    assert NativeTrunk(*opened(apart), lambda *_: pytest.fail("not called")).nbytes == made.nbytes + 128 * 32 * 4


def rewritten(checkpoint, folder: Path, *, without: str = "", extra=None, **config) -> Path:
    """A copy of a checkpoint with tensors left out, added or replaced."""
    writer = CheckpointWriter(folder, checkpoint.config | config)
    for name in checkpoint.tensors:
        if name != without and name not in (extra or {}):
            writer.add(name, checkpoint.read(name), "F32")
    for name, array in (extra or {}).items():
        writer.add(name, array, "F32")
    writer.finish()
    return folder


def test_every_tensor_has_a_place_and_every_place_a_tensor(tiny, opened, tmp_path):
    checkpoint, _ = opened(tiny("qwen2_moe")[0])

    def attempt(name, **changes):
        return NativeTrunk(*opened(rewritten(checkpoint, tmp_path / name, **changes)), lambda *_: pytest.fail("not called"))

    attempt("same")
    norm = "model.layers.1.self_attn.k_norm.weight"
    with pytest.raises(CheckpointError, match=f"{norm} has no place"):
        attempt("more", extra={norm: np.ones(8, np.float32)})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.self_attn\.k_proj\.bias"):
        attempt("less", without="model.layers.2.self_attn.k_proj.bias")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\]"):
        attempt("shape", extra={"model.norm.weight": np.ones(31, np.float32)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.gate\.weight are NaN"):
        attempt("nan", extra={"model.layers.0.mlp.gate.weight": np.full((6, 32), np.nan, np.float32)})
    with pytest.raises(UnsupportedModel, match="float16 is asked for"):
        NativeTrunk(checkpoint, opened(checkpoint.path)[1], lambda *_: pytest.fail("not called"), "float16")


def test_what_is_not_supported_says_why(tiny, opened, tmp_path):
    for family in FAMILIES:
        reason = native_supported(*opened(tiny(family)[0]))
        assert (reason is None) == (family in NATIVE), reason
        assert reason is None or reason.startswith("the native trunk has no")
    folder = shutil.copytree(tiny("mixtral")[0], tmp_path / "longrope")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    assert "longrope" in str(native_supported(*opened(folder)))
    assert "bfloat16 is asked for" in str(native_supported(*opened(tiny("mixtral")[0]), "bfloat16"))
    assert native_supported(*opened(tiny("mixtral")[0]), "float32") is None


def test_the_trunk_that_is_chosen(tiny, opened):
    able, unable = opened(tiny("mixtral")[0]), opened(tiny("jamba")[0])
    assert [choose_trunk(*able, name) for name in ("auto", "native", "transformers")] == ["native", "native", "transformers"]
    assert [choose_trunk(*unable, name) for name in ("auto", "transformers")] == ["transformers"] * 2
    assert choose_trunk(*able, "auto", "bfloat16") == "transformers"
    with pytest.raises(UnsupportedModel, match="no jamba"):
        choose_trunk(*unable, "native")
    with pytest.raises(InputError, match="'fast'"):
        choose_trunk(*able, "fast")


@pytest.mark.parametrize("family", [f for f in NATIVE if f not in ("deepseek_v3", "deepseek_v2_groups")])
def test_ahead_of_the_own_input_is_the_real_choice(family, tiny, native):
    made = native(tiny(family)[0])
    out = next(made.run([TOKENS], inputs=True))
    for record, layer in zip(out.records, made.facts.layers, strict=True):
        ids = made.trunk.ahead(layer.ordinal, record.x_TD, layer.top_k)
        np.testing.assert_array_equal(ids, record.routing.experts_TK)
        assert made.trunk.ahead(layer.ordinal, record.x_TD, 99).shape[1] == layer.num_experts


ROPES = (
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096, "beta_fast": 32.0},
    {"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.3, "original_max_position_embeddings": 8192, "beta_slow": 2},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


@pytest.mark.parametrize("said", ROPES, ids=lambda said: said.get("rope_type") or said["type"])
@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_frequencies_equal_transformers_at_full_size(said, where):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    fields = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 131072, "head_dim": 128}
    fields |= {"rope_theta": 250000.0} if "rope_theta" not in said else {}
    theirs = MixtralRotaryEmbedding(MixtralConfig.from_dict(fields | {where: dict(said)}))
    ours = rope(parameters(Settings(fields | {where: said}, "here"), 1e6), 128)
    np.testing.assert_allclose(ours.frequency_R, theirs.inv_freq.numpy(), rtol=2e-6)
    assert ours.scale == pytest.approx(theirs.attention_scaling)


def test_ties_go_to_the_lower_id():
    logits = np.array([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    for score, weights in (("softmax", "probs"), ("sigmoid", "probs"), ("logits", "softmax_after")):
        facts = LayerFacts(0, 0, 4, 2, None, RouterFacts(score, weights, renormalised=True, scale=3.0))  # type: ignore[arg-type]
        ids, values = route(logits, facts)
        assert ids.tolist() == [[1, 2], [0, 1]]
        np.testing.assert_allclose(values, 1.5, rtol=1e-6)


def test_the_cache_grows_and_keeps_what_it_holds():
    rng = np.random.default_rng(0)
    cache = SequenceCache([Room(2, 3, 4), Room(1, 5, 0, 2)], 4, "float32")
    all_keys, all_values, latents = (rng.standard_normal(s).astype(np.float32) for s in ((9, 2, 3), (9, 2, 4), (9, 1, 5)))
    for part in (slice(0, 3), slice(3, 4), slice(4, 9)):
        before = cache.nbytes
        keys, values, first = cache.put(0, all_keys[part], all_values[part])
        latent, shared, _ = cache.put(1, latents[part])
        cache.advance(part.stop - part.start)
        assert (cache.nbytes > before) == (part.stop == 9)
    np.testing.assert_array_equal(keys, all_keys)
    np.testing.assert_array_equal(values, all_values)
    np.testing.assert_array_equal(latent, latents)
    np.testing.assert_array_equal(shared, latents[..., :2])
    assert cache.length == 9 and first == 0


@pytest.mark.parametrize("window", [1, 5, 128, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_window_keeps_little_and_changes_no_bit(window, dtype):
    rng = np.random.default_rng(window)
    tokens, heads, width = 900, 2, 8
    q, k, v = (rng.standard_normal((tokens, heads, width)).astype(np.float32) for _ in range(3))
    whole, small = SequenceCache([Room(2, 8, 8)], tokens, dtype), SequenceCache([Room(2, 8, 8, window=window)], tokens, dtype)
    reserved, at = [], 0
    while at < tokens:
        part = slice(at, min(tokens, at + int(rng.choice([1, 1, 1, 7, 90]))))
        outs = []
        for cache in (whole, small):
            held = cache.put(0, k[part], v[part])
            lengths = np.arange(part.start + 1, part.stop + 1) - held.first
            outs.append(attend(q[part], *held[:2], lengths_T=lengths, scale=0.3, window=window, threads=1))
            cache.advance(part.stop - part.start)
        np.testing.assert_array_equal(*outs)
        reserved.append(small.nbytes)
        at = part.stop
    assert max(reserved) <= whole.nbytes * (window + 128 + 90) / tokens


def test_a_pass_that_is_broken_off_can_be_repeated(tiny, native):
    made = native(tiny("mixtral")[0])
    state = made.trunk.start(1, 32)
    made.prefill(np.array([TOKENS[:6]]), state)
    made.stop.set()
    with pytest.raises(KeyboardInterrupt):
        made.decode(np.array([[9]]), state)
    made.stop.clear()
    other = made.trunk.start(1, 32)
    made.prefill(np.array([TOKENS[:6]]), other)
    np.testing.assert_array_equal(made.decode(np.array([[9]]), state), made.decode(np.array([[9]]), other))


ALONE = """
import sys
from moestro.engine.engine import Engine
from moestro.engine.native import NativeTrunk, Resident
from moestro.engine.residency import plan_residency
from moestro.engine.sample import SamplingParams
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.native import native_supported

class NativeEngine(Engine):
    def _load_trunk(self):
        options = {"threads": self.threads, "resident": Resident(self._resident, self._shelf, self._used)}
        return NativeTrunk(self.checkpoint, self.layout, self._seam, self.plan.dtype, **options)

checkpoint = Checkpoint.open(sys.argv[1])
layout = describe(checkpoint)
assert native_supported(checkpoint, layout) is None
plan = plan_residency(checkpoint, layout, 1 << 30, runtime_bytes=1 << 26, disk_rate=1e9, memory_rate=1e10)
with NativeEngine(checkpoint, layout, plan, threads=1) as engine:
    result = engine.generate("Hello", SamplingParams(max_tokens=5, ignore_eos=True)).run()[0]
assert len(result.tokens) == 5, result
heavy = sorted({"torch", "transformers", "scipy"} & set(sys.modules))
assert not heavy, heavy
"""


def test_a_whole_run_imports_no_torch(tiny):
    for family in ("qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"):
        done = subprocess.run([sys.executable, "-c", ALONE, str(tiny(family)[0])], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
