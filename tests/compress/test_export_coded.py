"""Plans with codecs written as tiles: they run as they lie, with the values that the encoder chose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from moestro.compress.bits import blank, encode_experts, encode_trunk, expert_bytes
from moestro.compress.calibration import Calibration
from moestro.compress.encode.gptq import gptq
from moestro.compress.encode.rtn import rtn
from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.export.coded import CodedJob
from moestro.compress.export.planes import planes
from moestro.compress.live import compress_live
from moestro.compress.record import read_plan_of
from moestro.compress.trunk import trunk_matrices
from moestro.core.errors import CheckpointError, InputError, PlanError
from moestro.core.experts import ExpertKey
from moestro.core.plans.compression import CompressionPlan, Encoding, Slot
from moestro.engine.engine import Engine
from moestro.engine.sample import SamplingParams
from moestro.kernels.packed import Packed
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import is_coded, read_coded
from moestro.models.experts import read_expert
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from moestro.testing.tiny import save_tiny
from tests.compress.conftest import Saved

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
TOKENS = np.random.default_rng(5).integers(4, 120, 60).tolist()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    made = {}

    def get(family, layout=None):
        if (family, layout) not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            save_tiny(family, folder, layout, **WIDE)
            checkpoint = Checkpoint.open(folder)
            made[family, layout] = Saved(folder, checkpoint, describe(checkpoint))
        return made[family, layout]

    return get


@pytest.fixture(scope="module")
def profile(wide):
    one = wide("olmoe")
    model = open_model(one.checkpoint)
    documents = [Document("a", "drawn", tokens=np.random.default_rng(i).integers(4, 120, 40).tolist()) for i in range(6)]
    recording = Recording(model, cut(documents, None, length=40), make({"inputs": {"most": 1000}, "counts": {}}))
    recording.run(model)
    return recording.profile()


def coded(plan, one, out, profile=None):
    return compress(
        plan, one.checkpoint, one.layout, out, encoder=Encoder(plan, one.layout.facts, profile), form=CodedJob
    ).checkpoint


@pytest.mark.parametrize(
    ("family", "layout"), [("olmoe", None), ("qwen3_moe", "fused"), ("granitemoe", None), ("gpt_oss", "fused")]
)
def test_tiles_and_plain_numbers_are_one_model(family, layout, wide, tmp_path):
    """The coded checkpoint opened live computes what the same plan written in plain float32 computes."""
    one = wide(family, layout)
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "int4:32")
    plan = encode_trunk(plan, trunk_matrices(one.checkpoint, one.layout), inner=("compress.encode.rtn", "int8:32"), outer=None)
    plain = compress(plan, one.checkpoint, one.layout, tmp_path / "plain").checkpoint
    made = coded(plan, one, tmp_path / "coded")
    a, b = (next(open_model(c, "float32").run([TOKENS])).logits_TV.numpy() for c in (plain, made))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert made.nbytes < 0.6 * plain.nbytes
    assert describe(made).facts.expert_bytes == plan.sizes[1] + biases(one)
    assert read_plan_of(made.path).layers == plan.layers
    assert any("stay as they are stored" in line for line in plan.stated)


def biases(one):
    spec = one.layout.facts.layers[0].spec
    each = 4 * (2 * spec.d_expert + spec.d_model) if spec.bias else 0
    return each * sum(la.num_experts for la in one.layout.facts.layers)


def test_gptq_takes_each_experts_own_inputs_and_the_last_matrix_what_the_others_give(wide, profile, tmp_path):
    one = wide("olmoe")
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.gptq", "int3:32")
    written = plan.to_json()
    assert written["encodings"][0].pop("chained")
    made, apart = (
        coded(plan, one, tmp_path / "coded", profile),
        coded(type(plan).from_json(written), one, tmp_path / "old", profile),
    )
    live = compress_live(plan, open_model(one.checkpoint), encoder=Encoder(plan, one.layout.facts, profile))
    logits = [next(iter(m.run([TOKENS]))).logits_TV.numpy() for m in (live, open_model(made, "float32"))]
    np.testing.assert_allclose(*logits, atol=1e-5)
    given = Calibration(profile, one.layout.facts)
    for e in (0, 3):
        weights = read_expert(one.checkpoint, one.layout, ExpertKey(1, e))
        gate, up = (gptq(a, given(1, Slot((e,))).first(), codec="int3:32").dequantise() for a in (weights.gate_FD, weights.up_FD))
        gives = replace(weights, gate_FD=gate, up_FD=up)
        last, down_DF = given(1, Slot((e,))).chained(weights, gives)
        want = gptq(down_DF, last, codec="int3:32")
        before = gptq(weights.down_DF, given(1, Slot((e,))).last(weights), codec="int3:32")
        found, old = (read_coded(c, f"model.layers.1.mlp.experts.{e}.down_proj.weight") for c in (made, apart))
        assert all(np.array_equal(a, b) for a, b in zip(want.parts, found.parts, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(before.parts, old.parts, strict=True))
        assert not np.array_equal(want.parts[0], before.parts[0])
    plain = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.gptq", "int3:32")
    with pytest.raises(PlanError, match="--probe inputs"):
        Encoder(plain, one.layout.facts)


def test_the_kept_inputs_are_the_models_own(wide, profile):
    one = wide("olmoe")
    model = open_model(one.checkpoint)
    records = next(model.run([np.random.default_rng(2).integers(4, 120, 40).tolist()], inputs=True)).records
    seen = Calibration(profile, one.layout.facts).layer(2)
    assert len(seen.x_nD) == 240
    np.testing.assert_allclose(seen.x_nD[80:120], records[2].x_TD.numpy(), atol=2e-3)
    np.testing.assert_array_equal(seen.experts_nK[80:120], records[2].routing.experts_TK.numpy())
    assert len(seen.own((1,))) == (seen.experts_nK == 1).any(1).sum() == len(seen.weight(1))
    counts = {k: int((Calibration(profile, one.layout.facts).layer(k.layer).experts_nK == k.expert).sum()) for k in
              Calibration(profile, one.layout.facts).rare()}  # fmt: skip
    assert all(n < 32 for n in counts.values()) and counts == Calibration(profile, one.layout.facts).rare()


@pytest.mark.parametrize(("family", "layout", "dtype"), [("olmoe", None, "bfloat16"), ("gpt_oss", "fused", "float16")])
def test_rounding_from_the_stored_numbers_gives_the_bytes_of_rounding_floats(family, layout, dtype, tmp_path):
    """No copy in float32 is made; what is not finite is named all the same, and nothing stays behind."""
    save_tiny(family, tmp_path / "model", layout, dtype, **WIDE)
    checkpoint = Checkpoint.open(tmp_path / "model")
    layout_of = describe(checkpoint)
    plan = encode_experts(blank(checkpoint, layout_of, "by.hand"), layout_of, "compress.encode.rtn", "uint4:32")
    plan = encode_trunk(plan, trunk_matrices(checkpoint, layout_of), inner=None, outer=("compress.encode.rtn", "int8:32"))

    def made(out):
        return compress(plan, checkpoint, layout_of, out, encoder=Encoder(plan, layout_of.facts), form=CodedJob).checkpoint

    coded = made(tmp_path / "coded")
    weights = read_expert(checkpoint, layout_of, ExpertKey(1, 3))
    names = sorted(n for n in coded.tensors if ".layers.1." in n and ".experts.3." in n and is_coded(coded.tensors[n].dtype))
    for name, w_RC in zip(names, (weights.down_DF, weights.gate_FD, weights.up_FD), strict=True):
        assert np.array_equal(read_coded(coded, name).parts[0], rtn(w_RC, codec="uint4:32").parts[0])
    part = layout_of.parts(ExpertKey(1, 3))[0]
    with open(part.file, "r+b") as file:
        file.seek(part.offset + 10)
        file.write(b"\xff\xff")
    checkpoint = Checkpoint.open(tmp_path / "model")
    with pytest.raises(CheckpointError, match="of expert 3 in MoE layer 1 are NaN"):
        made(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_pruned_and_coded_in_one_plan(wide, tmp_path):
    one = wide("olmoe")
    plan = blank(one.checkpoint, one.layout, "by.hand")
    kept = tuple(replace(la, slots=la.slots[1:5]) for la in plan.layers)
    plan = encode_experts(replace(plan, layers=kept), one.layout, "compress.encode.rtn", "int4:64")
    made = coded(plan, one, tmp_path / "coded")
    facts = describe(made).facts
    assert facts.layers[0].num_experts == 4 and facts.expert_bytes == expert_bytes(plan, one.layout)
    packed = read_coded(made, "model.layers.0.mlp.experts.0.up_proj.weight")
    wanted = read_expert(one.checkpoint, one.layout, ExpertKey(0, 1)).up_FD
    assert np.abs(packed.dequantise() - wanted).max() < np.abs(wanted).max() / 7


def test_bits_may_differ_between_experts(wide, tmp_path):
    one = wide("olmoe")
    rows = [["int2:64" if e % 2 else "int8:64" for e in range(la.num_experts)] for la in one.layout.facts.layers]
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", rows)
    made = coded(plan, one, tmp_path / "coded")
    assert CompressionPlan.from_json(plan.to_json()) == plan
    for e in range(4):
        ref = made.ref(f"model.layers.0.mlp.experts.{e}.gate_proj.weight")
        assert ref.dtype == rows[0][e]
    assert describe(made).facts.expert_bytes == plan.sizes[1]


def test_an_interrupted_run_goes_on(wide, tmp_path):
    one = wide("olmoe")
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "int4:32")
    whole = coded(plan, one, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(done, layers):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        compress(plan, one.checkpoint, one.layout, tmp_path / "again", form=CodedJob, progress=stop)
    assert not (tmp_path / "again").exists()
    again = compress(plan, one.checkpoint, one.layout, tmp_path / "again", form=CodedJob).checkpoint
    for name in whole.tensors:
        if is_coded(whole.tensors[name].dtype):
            assert all(
                np.array_equal(a, b) for a, b in zip(read_coded(whole, name).parts, read_coded(again, name).parts, strict=True)
            )


@pytest.mark.parametrize("fault", ["some experts", "some of the trunk", "group", "codec", "twice"])
def test_what_cannot_be_written_is_refused_before_anything_is(fault, wide, tmp_path):
    one = wide("olmoe")
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "int4:32")
    match fault:
        case "some experts":
            first = replace(plan.layers[0], slots=(Slot((0,)), *plan.layers[0].slots[1:]))
            plan, error = replace(plan, layers=(first, *plan.layers[1:])), "others have none"
        case "some of the trunk":
            plan, error = replace(plan, tensors={"model.layers.0.self_attn.q_proj.weight": (0,)}), "has none"
        case "group":
            plan, error = replace(plan, encodings=(Encoding("compress.encode.rtn", "int4:128"),)), "multiples of 128"
        case "codec":
            plan, error = replace(plan, encodings=(Encoding("compress.encode.rtn", "int5:32"),)), "unknown codec"
        case _:
            made = coded(plan, one, tmp_path / "first")
            one, error = Saved(made.path, made, describe(made)), "removed but not changed"
            plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "int4:32")
    with pytest.raises((PlanError, InputError), match=error):
        coded(plan, one, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_method_that_makes_another_codec_is_found_out(wide, tmp_path):
    one = wide("olmoe")
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "int4:32")
    lying = replace(plan, encodings=(Encoding("compress.encode.rtn", "int4:32", {"codec": "int8:32"}),))
    with pytest.raises(PlanError, match="came out as int8:32"):
        coded(lying, one, tmp_path / "out")


def test_experts_of_a_coded_model_are_removed(wide, tmp_path):
    one = wide("olmoe")
    made = coded(
        encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "int4:32"),
        one,
        tmp_path / "all",
    )
    layout = describe(made)
    plan = blank(made, layout, "by.hand")
    plan = replace(plan, layers=tuple(replace(la, slots=la.slots[3:]) for la in plan.layers))
    fewer = compress(plan, made, layout, tmp_path / "fewer").checkpoint
    for la in describe(fewer).facts.layers:
        assert la.num_experts == layout.facts.layers[la.ordinal].num_experts - 3
        for e in range(la.num_experts):
            new, old = (read_expert(c, describe(c), ExpertKey(la.ordinal, i)) for c, i in ((fewer, e), (made, e + 3)))
            assert np.array_equal(new.up_FD, old.up_FD) and np.array_equal(new.down_DF, old.down_DF)
    with Engine.open(fewer.path, threads=1) as engine:
        assert engine.changes[0].startswith("made from") and "weights are kept as int4:32 (encode.rtn)" in engine.changes


def test_low_planes_are_a_model(wide, tmp_path):
    one = wide("olmoe")
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.rtn", "nested:32")
    made = coded(plan, one, tmp_path / "all")
    for bits in (2, 3):
        few = planes(made, tmp_path / f"{bits}", bits=bits)
        assert few.tensors.keys() == made.tensors.keys() and few.nbytes < made.nbytes
        for name, ref in made.tensors.items():
            if is_coded(ref.dtype):
                whole, low = read_coded(made, name), read_coded(few, name)
                cut = Packed(whole.parts[: bits - 1], whole.format, whole.group, whole.rows, whole.cols)
                assert few.tensors[name].dtype == f"nested:32/{bits}" and np.array_equal(low.dequantise(), cut.dequantise())
            else:
                assert np.array_equal(made.read(name), few.read(name))
        read = read_plan_of(few.path)
        assert read.encodings[0].codec == f"nested:32/{bits}" and read.sizes[1] == describe(few).facts.expert_bytes
        with Engine.open(few.path, threads=1) as engine:
            engine.generate([TOKENS[:8]], SamplingParams(max_tokens=2, ignore_eos=True), text=False)
            assert f"weights are kept as nested:32/{bits} (encode.rtn)" in engine.changes
    with pytest.raises(InputError, match="no matrices in nested"):
        planes(few, tmp_path / "again", bits=3)
    with pytest.raises(InputError, match="no matrices in nested"):
        planes(one.checkpoint, tmp_path / "plain")


def test_numbers_depend_on_no_number_of_threads(wide, profile, tmp_path, monkeypatch):
    one, seen, real = wide("olmoe"), set(), Encoder.prepare

    def watched(self, *given):
        seen.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return real(self, *given)

    monkeypatch.setattr(Encoder, "prepare", watched)
    plan = encode_experts(blank(one.checkpoint, one.layout, "by.hand"), one.layout, "compress.encode.gptq", "int4:32")
    encoder = Encoder(plan, one.layout.facts, profile)
    with threadpool_limits(2):
        compress(plan, one.checkpoint, one.layout, tmp_path / "out", encoder=encoder, form=CodedJob)
        compress_live(plan, open_model(one.checkpoint), encoder=encoder)
    assert seen == {1}
