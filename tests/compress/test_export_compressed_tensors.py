"""What is written as compressed-tensors is read back by the library as the numbers that the tiles stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moestro.compress.bits import blank, encode_experts, encode_trunk
from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.export.coded import CodedJob
from moestro.compress.export.compressed_tensors import compressed_tensors
from moestro.compress.trunk import trunk_matrices
from moestro.core.errors import CoverageError, InputError
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import is_coded, read_coded
from moestro.models.families import describe
from moestro.testing.tiny import save_tiny

library = pytest.importorskip("compressed_tensors")
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """coded(experts, trunk) -> a coded OLMoE."""
    folder = tmp_path_factory.mktemp("ct")
    save_tiny("olmoe", folder / "model", **WIDE)
    checkpoint = Checkpoint.open(folder / "model")
    layout = describe(checkpoint)

    def get(experts: str, trunk: str, outer: str = "") -> Checkpoint:
        plan = encode_experts(blank(checkpoint, layout, "by.hand"), layout, "compress.encode.rtn", experts)
        found, rtn = trunk_matrices(checkpoint, layout), "compress.encode.rtn"
        plan = encode_trunk(plan, found, inner=(rtn, trunk) if trunk else None, outer=(rtn, outer) if outer else None)
        out = folder / "-".join((experts, trunk, outer)).replace(":", "_").replace("/", "_")
        return compress(
            plan, checkpoint, layout, out, encoder=Encoder(plan, layout.facts), form=CodedJob, overwrite=True
        ).checkpoint

    return get


@pytest.mark.parametrize(
    ("experts", "trunk"), [("int4:32", "int4:32"), ("int8:64", "int8:64"), ("mxfp4", "mxfp4"), ("int4:64", "int8:32")]
)
def test_the_library_reads_every_number_back(experts, trunk, coded, tmp_path):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    source = coded(experts, trunk)
    made = compressed_tensors(source, tmp_path / "out", allow_plain=("lm_head.weight",))
    config = QuantizationConfig.model_validate(made.config["quantization_config"])
    state = {k: v for file in made.files for k, v in load_file(file).items()}
    schemes: list[Any] = list(config.config_groups.values())
    for name, ref in source.tensors.items():
        if not is_coded(ref.dtype):
            assert torch.equal(state[name], load_file(ref.file)[name])
            continue
        module = name.removesuffix(".weight")
        mine = [s for s in schemes if s.targets == ["Linear"] or module in s.targets]
        assert len(mine) == 1 and module not in config.ignore
        reader: Any = BaseCompressor.get_value_from_registry(mine[0].format)
        local = {k.removeprefix(module + "."): v for k, v in state.items() if k.startswith(module + ".")}
        scale = local["weight_scale"]
        if scale.dtype == torch.float16:
            local["weight_scale"] = scale.float()  # so that the product is not rounded to float16
        read = reader.decompress(local, mine[0])["weight"].float().numpy()
        np.testing.assert_array_equal(read, read_coded(source, name).dequantise())
    named = {module for s in schemes for module in s.targets}
    assert (named == {"Linear"}) == (experts == trunk)
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(config.ignore)


@pytest.mark.parametrize("codec", ["uint4:32", "int3:32", "int2:64", "nested:32"])
def test_codecs_without_a_form_are_refused(codec, coded, tmp_path):
    with pytest.raises(InputError, match="no form for " + codec):
        compressed_tensors(coded(codec, "int8:32"), tmp_path / "out")


def test_nothing_stays_plain_silently(coded, tmp_path):
    with pytest.raises(CoverageError, match="13 matrices are not quantised"):
        compressed_tensors(coded("int4:32", ""), tmp_path / "out")
    with pytest.raises(CoverageError, match=r"1 matrices .* lm_head"):
        compressed_tensors(coded("int4:32", "int4:32"), tmp_path / "out")
    with pytest.raises(InputError, match="no reader takes quantised embeddings"):
        compressed_tensors(coded("int4:32", "int4:32", "int4:32"), tmp_path / "out")
    with pytest.raises(InputError, match="not a coded checkpoint"):
        compressed_tensors(Checkpoint.open(coded("int4:32", "").path.parent / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_loads_a_folder_whose_head_is_the_embedding(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from moestro.compress.bits import BitsWish, plan_bits
    from moestro.models.open import open_model

    save_tiny("mixtral", tmp_path / "model", **WIDE, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(tmp_path / "model")
    layout = describe(checkpoint)
    assert "lm_head.weight" not in checkpoint.tensors
    plan = plan_bits(checkpoint, layout, BitsWish("compress.encode.rtn", ("int8:32",), trunk="int8:32")).plan
    small = compress(plan, checkpoint, layout, tmp_path / "small", encoder=Encoder(plan, layout.facts), form=CodedJob).checkpoint
    made = compressed_tensors(small, tmp_path / "out")
    assert "lm_head" in made.config["quantization_config"]["ignore"]
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        stock = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(ids).logits
        mine = open_model(small).module(ids).logits
    torch.testing.assert_close(stock, mine, atol=2e-2, rtol=0)  # the library multiplies in float16 what the tiles do in float32
