"""A GGUF Llama becomes the checkpoint that transformers makes of it, with the tokenizer that llama.cpp uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.build.gguf import unpermute, write_dense
from moestro.build.upcycle import default
from moestro.core.errors import CheckpointError, InputError, StorageError, UnsupportedModel
from moestro.kernels.convert import to_f32
from moestro.models.checkpoint import Checkpoint
from moestro.models.tokenizer import Tokenizer
from moestro.testing import corpora

Make = Callable[..., Path]


def test_every_tensor_is_the_one_transformers_reads(gguf_file: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = gguf_file()
    write_dense(source, tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    made = Checkpoint.open(tmp_path / "dense")
    state = {name: tensor for name, tensor in expected.state_dict().items() if name != "lm_head.weight"}
    assert set(made.tensors) == set(state)
    for name, tensor in state.items():
        assert torch.equal(torch.from_numpy(to_f32(made.read(name))), tensor.bfloat16().float()), name
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "vocab_size",
                "tie_word_embeddings", "bos_token_id", "eos_token_id", "num_hidden_layers", "hidden_act"):  # fmt: skip
        assert made.config[key] == getattr(expected.config, key), key
    assert made.config["rms_norm_eps"] == 1e-5 and made.config["rope_parameters"] == expected.config.rope_parameters


def test_unpermute_undoes_what_llama_cpp_does() -> None:
    weight = np.arange(4 * 6 * 5, dtype=np.float32).reshape(24, 5)
    permuted = weight.reshape(4, 2, 3, 5).swapaxes(1, 2).reshape(24, 5)  # convert_hf_to_gguf.py, LlamaModel.permute
    assert (unpermute(permuted, 4) == weight).all() and (unpermute(weight, 4) != weight).any()


def test_the_tokenizer_and_its_companions(gguf_file: Make, tmp_path: Path) -> None:
    write_dense(gguf_file(), tmp_path / "dense")
    tokenizer = Tokenizer.open(tmp_path / "dense")
    ids = list(tokenizer.encode("the 12"))
    assert tokenizer.decode(ids) == "the 12" and len(ids) == 4, "merged word, space, digits one by one"
    assert list(tokenizer.encode("<|im_end|>")) == [2] and 2 in tokenizer.eos_ids
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]).startswith("<|im_start|>user\nhi<|im_end|>")


@pytest.mark.parametrize(
    "changes", [{"arch": "gemma"}, {"pre": "llama-bpe"}, {"extra": "blk.0.attn_q_norm.weight"}, {"scaling": 2.0}]
)
def test_other_models_are_refused_and_leave_nothing(changes: dict[str, Any], gguf_file: Make, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel):
        write_dense(gguf_file(**changes), tmp_path / "dense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000])
def test_a_damaged_file_is_refused(keep: int, gguf_file: Make, tmp_path: Path) -> None:
    source = gguf_file()
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        write_dense(source, tmp_path / "dense")


def test_without_the_gguf_package(gguf_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        write_dense(tmp_path / "any.gguf", tmp_path / "dense")


def test_an_occupied_folder_is_left_alone(gguf_file: Make, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "mine").write_text("mine")
    with pytest.raises(StorageError):
        write_dense(gguf_file(), tmp_path / "dense")


@pytest.mark.parametrize("domain", ["documentation", "code", "sessions", "names", "licences", "numbers", "odd"])
def test_text_is_split_as_llama_cpp_splits_it(domain: str, default_model: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    source, _ = default.find_source()
    other = llama_cpp.Llama(str(source), vocab_only=True, verbose=False)
    special = {
        "numbers": "In 1905, 3.14159 and 2026-11-21; x1y22z333 ½ ",
        "odd": "naïve Straße 東京 🙂🙂  \t\n\n  don't WE'LL \r\n end",
    }
    text = special[domain] if domain in special else corpora.text(domain, 20_000)
    expected = other.tokenize(text.encode(), add_bos=False, special=False)
    found = list(Tokenizer.open(default_model).encode(text, add_special=False))
    other.close()
    assert found == expected
