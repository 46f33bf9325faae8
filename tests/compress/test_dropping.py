"""What a model does not load, above all layers for multi-token prediction, is lost or left plain only where it is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGUFReader

from moestro.compress.bits import BitsWish, plan_bits
from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.export.coded import CodedJob
from moestro.compress.export.compressed_tensors import compressed_tensors
from moestro.compress.export.gguf import gguf
from moestro.core.errors import CoverageError, InputError
from moestro.core.plan import read_plan
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.writer import CheckpointWriter
from moestro.testing.tiny import save_tiny
from tests.cli.conftest import moestro  # noqa: F401

KEPT, NEXT = "model.layers.1.self_attn.kv_b_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight"
DROP = "model.layers.2.*"


def with_next_layer(folder, family, **changes):
    """A model of two layers whose file has a third, for the token after the next."""
    save_tiny(family, folder / "bare", num_hidden_layers=2, **changes)
    bare = Checkpoint.open(folder / "bare")
    with CheckpointWriter(folder / "model", bare.config | {"num_nextn_predict_layers": 1}) as writer:
        for name in bare.tensors:
            writer.copy(name, bare)
            if name.startswith("model.layers.1."):
                writer.copy(name.replace(".1.", ".2.", 1), bare, name)
        writer.add("model.layers.2.eh_proj.weight", np.ones((64, 128), np.float32))
        return writer.finish(copy_files_from=bare)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    wide = {"hidden_size": 64, "moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 8}
    wide |= {"intermediate_size": 64, "n_group": 2, "topk_group": 1}
    return with_next_layer(tmp_path_factory.mktemp("next"), "deepseek_v3", **wide)


def coded(checkpoint, out, **wishes):
    layout = describe(checkpoint)
    found = plan_bits(checkpoint, layout, BitsWish("compress.encode.rtn", ("int4:32",), trunk="int4:32", **wishes))
    made = compress(found.plan, checkpoint, layout, out, encoder=Encoder(found.plan, layout.facts), form=CodedJob)
    return found, made.checkpoint


def test_the_plan_says_so_before_anything_is_written(moestro, model, tmp_path):  # noqa: F811
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    profile = ("profile", model.path, tmp_path / "book.txt", "-o", tmp_path / "p", "--length", "64", "-q", "--probe", "norms")
    assert moestro(*profile, "--allow-unseen").code == 0
    asked = ("plan", "reap", model.path, "--profile", tmp_path / "p", "--keep", "6", "--allow-unseen", "-o", tmp_path / "plan")
    done = moestro(*asked)
    assert done.code == 1 and f"--drop '{DROP}'" in done.err and not (tmp_path / "plan").exists()
    part = moestro(*asked, "--drop", "model.layers.2.mlp.*")
    assert part.code == 1 and "would stay without the others" in part.err
    for pattern in ("model.layers.3.*", "lm_head*"):
        nothing = moestro(*asked, "--drop", pattern)
        assert nothing.code == 2 and "no tensor that may be dropped" in nothing.err
    assert moestro(*asked, "--drop", DROP).code == 0 and read_plan(tmp_path / "plan").dropped == (DROP,)  # type: ignore[attr-defined]
    done = moestro("apply", tmp_path / "plan", "-o", tmp_path / "out")
    assert done.code == 0 and "left out" in done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["n_routed_experts"] == 6


def test_what_stays_plain_is_told(moestro, model):  # noqa: F811
    asked = ("plan", "bits", model.path, "--codec", "int4:32", "--trunk", "int4:32", "--ends", "int8:32")
    done = moestro(*asked)
    assert done.code == 1 and "2 that the kernels take in no tiles" in done.err and "that the model does not load" in done.err
    done = moestro(*asked, "--drop", DROP)
    assert done.code == 1 and "2 matrices" in done.err and "does not load" not in done.err
    assert moestro(*asked, "--allow-plain").code == 0
    other = moestro("plan", "rtn", model.path, "--codec", "int4:32", "--trunk-codec", "int4:32")
    assert other.code == 1 and "--allow-plain" in other.err


def test_compressed_tensors(model, tmp_path):
    found, small = coded(model, tmp_path / "small")
    assert KEPT in found.plain and NEXT in found.plain and NEXT in small.tensors
    with pytest.raises(CoverageError, match=r"--drop 'model\.layers\.2\.\*', or allow it: --allow-plain 'model\.layers\.2\.\*'"):
        compressed_tensors(small, tmp_path / "out", allow_plain=("lm_head.weight", "kv_b_proj.weight"))
    whole = compressed_tensors(small, tmp_path / "whole", allow_plain=("lm_head.weight", "kv_b_proj.weight", DROP))
    assert NEXT in whole.tensors and NEXT.removesuffix(".weight") in whole.config["quantization_config"]["ignore"]
    less = compressed_tensors(small, tmp_path / "less", allow_plain=("lm_head.weight", "kv_b_proj.weight"), dropped=(DROP,))
    assert not any(name.startswith("model.layers.2.") for name in less.tensors) and less.config["num_nextn_predict_layers"] == 0
    found, small = coded(model, tmp_path / "dropped", dropped=(DROP,))
    assert NEXT not in small.tensors and NEXT not in found.plain and small.config["num_nextn_predict_layers"] == 0


def test_gguf(tmp_path):
    checkpoint = with_next_layer(tmp_path, "qwen3_moe", hidden_size=64, mlp_only_layers=[], norm_topk_prob=True)
    with pytest.raises(CoverageError, match=r"--drop 'model\.layers\.2\.\*'"):
        gguf(checkpoint, tmp_path / "m.gguf", pre="gpt-2")
    with pytest.raises(InputError, match="no tensor that may be dropped"):
        gguf(checkpoint, tmp_path / "m.gguf", pre="gpt-2", dropped=(DROP, "model.layers.7.*"))
    assert not list(tmp_path.glob("*.gguf*"))
    names = {t.name for t in GGUFReader(gguf(checkpoint, tmp_path / "m.gguf", pre="gpt-2", dropped=(DROP,))).tensors}
    assert "blk.1.attn_q.weight" in names and not any(name.startswith("blk.2.") for name in names)
