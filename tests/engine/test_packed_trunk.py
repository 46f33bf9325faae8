"""A trunk in few bits: the same decoder as transformers' with the dequantised weights, from the checkpoint or from a packed folder."""

import json

import numpy as np
import pytest
import torch

from moestro.core.errors import CheckpointError, InputError, PlanError, StorageError
from moestro.engine.engine import Engine
from moestro.engine.pack import Trunk, apply, pack
from moestro.engine.residency import plan_residency
from moestro.engine.sample import SamplingParams
from moestro.engine.store import PackedStore
from moestro.kernels.packed import quantise
from moestro.models.codecs.encode import ROUNDED, parse_codec
from moestro.models.codecs.trunk import encode_rows
from moestro.models.native import describe
from moestro.models.native.weights import Weights, matrices

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 30)]
WIDE = {"hidden_size": 64, "intermediate_size": 64}
SHAPES = {
    "mixtral": WIDE,
    "olmoe": WIDE,
    "qwen2_moe": {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "intermediate_size": 64},
    "granitemoeshared": {**WIDE, "shared_intermediate_size": 64},
    "deepseek_v3": {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16},
    "gpt_oss": WIDE,
}  # fmt: skip


def quantised(module, checkpoint, layout, codec):
    """The module with every matrix that the codec touches replaced by what it dequantises to; the names are those of the file."""
    decoder, coder = describe(checkpoint, layout), parse_codec(codec)
    state = dict(module.named_parameters())
    for name, pieces in matrices(decoder).items():
        rows = checkpoint.ref(name).shape[0] // pieces
        values = np.concatenate([encode_rows(checkpoint, name, coder, i * rows, rows).dequantise() for i in range(pieces)])
        with torch.no_grad():
            before = state[name].clone()
            state[name].copy_(torch.from_numpy(values))
            assert not torch.equal(before, state[name]), f"{name} is as it was"
    return module


@pytest.mark.parametrize("codec", ["int8:32", "int4:32"])
@pytest.mark.parametrize("family", SHAPES)
def test_logits_equal_transformers_with_the_dequantised_weights(family, codec, tmp_path, opened, make_plan):
    from moestro.testing.tiny import save_tiny

    module = save_tiny(family, tmp_path / "m", **SHAPES[family])
    checkpoint, layout = opened(tmp_path / "m")
    with Engine(checkpoint, layout, make_plan(layout, trunk="native", trunk_codec=codec), threads=1) as engine:
        found = next(engine.run([TOKENS])).logits_TV
        assert engine.changes == (f"the trunk's matrices are kept as {codec}", ROUNDED)
    with torch.inference_mode():
        exact = module(torch.tensor([TOKENS])).logits[0].numpy()
        expected = quantised(module, checkpoint, layout, codec)(torch.tensor([TOKENS])).logits[0].numpy()
    rounding = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
    coding = np.sqrt(np.square(expected - exact).mean() / np.square(exact).mean())
    assert 0 < rounding < 0.03, "what rounding activations to 8 bits may do over three layers"
    assert codec == "int8:32" or coding > 2 * rounding, "the weights make the difference, and are the expected ones"


@pytest.mark.parametrize("family", SHAPES)
def test_a_packed_trunk_gives_the_same_bits_as_quantising_at_load(family, tmp_path, opened, make_plan):
    from moestro.testing.tiny import save_tiny

    save_tiny(family, tmp_path / "m", dtype="bfloat16", **SHAPES[family])
    checkpoint, layout = opened(tmp_path / "m")
    plan = make_plan(layout, trunk="native", trunk_codec="int4:32", codec="int8:32")
    store = PackedStore(apply(plan, checkpoint, layout, tmp_path / "p"), layout.facts)
    bare = PackedStore(pack(checkpoint, layout, "int8:32", tmp_path / "q"), layout.facts)
    assert (store.trunk_codec, bare.trunk_codec) == ("int4:32", "stored")
    engines = [Engine(checkpoint, layout, plan, store=s, threads=1) for s in (store, bare)]
    a, b = (next(engine.run([TOKENS])).logits_TV for engine in engines)
    np.testing.assert_array_equal(a, b)
    array = np.array([TOKENS])
    for engine in engines:
        state = engine.trunk.start(1, 64)
        steps = [engine.prefill(array[:, :20], state)[0]] + [engine.decode(array[:, i : i + 1], state)[0] for i in range(20, 30)]
        np.testing.assert_array_equal(np.array(steps), a[19:])
        engine.close()
    planned = plan_residency(
        checkpoint, layout, "4GiB", codec="int8:32", trunk_codec="int4:32", runtime_bytes=1, disk_rate=1e9, memory_rate=1e9
    )
    for engine in engines:  # vectors are float32 in memory
        assert planned.memory.trunk <= engine.trunk.nbytes <= planned.memory.trunk * 1.15 + 8192
    assert planned.memory.trunk < layout.facts.trunk_bytes


def test_a_folder_opens_as_it_was_packed(tmp_path, tiny, opened, make_plan):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, layout = opened(folder)
    out = pack(checkpoint, layout, "int4:32", tmp_path / "p", trunk_codec="int8:32")
    assert sorted(p.name for p in out.iterdir()) == ["experts.bin", "experts.json", "trunk.bin"]
    assert pack(checkpoint, layout, "int4:32", out, trunk_codec="int8:32") == out
    with pytest.raises(StorageError, match="the trunk in int8:32"):
        pack(checkpoint, layout, "int4:32", out)
    with Engine.open(folder, memory=4 << 30, store=out, threads=1) as engine:
        assert (engine.plan.codec, engine.plan.trunk_codec) == ("int4:32", "int8:32")
        generation = engine.generate(TOKENS, SamplingParams(max_tokens=3, ignore_eos=True), text=False)
        generation.run()
        assert generation.statistics is not None and not generation.statistics.exact
        assert generation.statistics.summary().endswith(f"EXACT to the packed model: every number is that of {out}")
    with Engine.open(folder, memory=4 << 30, store=out, threads=1, trunk_codec="stored") as engine:
        assert engine.changes == ("experts are kept as int4:32", ROUNDED) and engine.packed == ""
    with pytest.raises(PlanError, match="native"):
        make_plan(layout, trunk="transformers", trunk_codec="int8:32").check(layout.facts)
    with pytest.raises(InputError, match="native trunk"):
        plan_residency(checkpoint, layout, "4GiB", trunk="transformers", trunk_codec="int8:32")


def test_a_tied_embedding_is_written_once(tmp_path, opened):
    from moestro.models.writer import CheckpointWriter
    from moestro.testing.tiny import save_tiny

    save_tiny("mixtral", tmp_path / "m", tie_word_embeddings=True, **WIDE)
    checkpoint, layout = opened(tmp_path / "m")
    alone = Trunk.of(checkpoint, layout, "int8:32")
    for scale in (1, 2):
        writer = CheckpointWriter(tmp_path / f"twice{scale}", checkpoint.config)
        for name in checkpoint.tensors:
            writer.add(name, checkpoint.read(name), "F32")
        writer.add("lm_head.weight", scale * checkpoint.read("model.embed_tokens.weight"), "F32")
        writer.finish()
        other, other_layout = opened(tmp_path / f"twice{scale}")
        trunk = Trunk.of(other, other_layout, "int8:32")
        assert (trunk.nbytes == alone.nbytes) == (scale == 1)
        weights = Weights(other, trunk.coded, trunk.codec)
        embedding, head = weights.outer(describe(other, other_layout))
        assert (embedding is head) == (scale == 1) and weights.nbytes == embedding.nbytes * scale
        out = pack(other, other_layout, "stored", tmp_path / f"p{scale}", trunk_codec="int8:32")
        embedding, head = Weights(other, trunk.coded, trunk.codec, PackedStore(out, other_layout.facts).trunk()).outer(
            describe(other, other_layout)
        )
        assert (embedding is head) == (scale == 1)


@pytest.mark.parametrize("format", ["int8", "int4", "uint4", "int3", "int2", "mxfp4"])
def test_pieces_of_a_matrix_are_its_tiles(format, tmp_path, monkeypatch):
    """Encoding a few rows at a time gives the same bytes as all at once, and rows can be looked up."""
    from moestro.models.codecs import trunk
    from moestro.models.writer import CheckpointWriter

    values = np.random.default_rng(0).standard_normal((77, 64)).astype(np.float32)
    with CheckpointWriter(tmp_path / "m", {}) as writer:
        writer.add("w", values, "F32")
        checkpoint = writer.finish()
    codec = parse_codec(format if format == "mxfp4" else f"{format}:32")
    whole = quantise(values, codec.format, codec.group)
    monkeypatch.setattr(trunk, "_WEIGHTS_AT_ONCE", 64 * 20)
    pieces = encode_rows(checkpoint, "w", codec)
    np.testing.assert_array_equal(pieces.parts[0], whole.parts[0])
    ids = np.array([76, 0, 5, 5, 16, 33])
    np.testing.assert_array_equal(pieces.take(ids, np.empty((6, 64), np.float32)), whole.dequantise()[ids])


def test_damage_is_found(tmp_path, tiny, opened, make_plan):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, layout = opened(folder)
    plan = make_plan(layout, trunk="native", trunk_codec="int8:32", codec="int8:32")
    out = apply(plan, checkpoint, layout, tmp_path / "p")

    def start():
        return Engine(checkpoint, layout, plan, store=PackedStore(out, layout.facts), threads=1).close()

    start()
    sound = (out / "trunk.bin").read_bytes()
    (out / "trunk.bin").write_bytes(sound[:200] + b"\x55\xaa\x55" + sound[203:])
    with pytest.raises(CheckpointError, match=r"embed_tokens.* is damaged"):
        start()
    (out / "trunk.bin").write_bytes(sound[:-4096])
    with pytest.raises(CheckpointError, match="were written"):
        start()
    (out / "trunk.bin").unlink()
    with pytest.raises(CheckpointError, match=r"trunk\.bin cannot be read"):
        start()
    header = json.loads((out / "experts.json").read_text())
    header["trunk"]["entries"].pop()
    (out / "experts.json").write_text(json.dumps(header))
    (out / "trunk.bin").write_bytes(sound)
    with pytest.raises(CheckpointError, match=r"is not in .*trunk\.bin"):
        start()


def test_rows_that_do_not_divide_are_refused_before_anything_is_read(tmp_path, tiny, opened):
    checkpoint, layout = opened(tiny("mixtral", hidden_size=48)[0])
    with pytest.raises(InputError, match="has rows of 48"):
        plan_residency(checkpoint, layout, "4GiB", trunk_codec="int4:32")
    with pytest.raises(InputError, match="has rows of 48"):
        pack(checkpoint, layout, "stored", tmp_path / "p", trunk_codec="int4:32")
    assert not list(tmp_path.iterdir())


def test_packing_that_was_stopped_goes_on(tmp_path, tiny, opened):
    checkpoint, layout = opened(tiny("mixtral", **WIDE)[0])
    options = {"trunk_codec": "int4:32"}
    whole = pack(checkpoint, layout, "int4:32", tmp_path / "whole", **options)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, layout, "int4:32", tmp_path / "p", stop, **options)
    pack(checkpoint, layout, "int4:32", tmp_path / "p", **options)
    for name in ("experts.bin", "experts.json", "trunk.bin"):
        assert (tmp_path / "p" / name).read_bytes() == (whole / name).read_bytes()
