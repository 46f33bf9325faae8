"""A tiny GGUF file of a Llama, as llama.cpp writes them, and the default model's checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, *, quantised: bool = True, seed: int = 0, **changes: Any) -> Path:
    """changes: `arch`, `pre`, `extra` (one more tensor's name), `scaling`."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize
    from tokenizers.pre_tokenizers import ByteLevel

    layers, width, inner, heads, groups = 2, 64, 96, 4, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the"]
    writer = GGUFWriter(path, changes.get("arch", "llama"))
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if "scaling" in changes:
        writer.add_rope_scaling_factor(changes["scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(seed)

    def put(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        if quantised and len(shape) == 2:
            kind = GGMLQuantizationType.Q8_0 if name.startswith("token") else GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    put("token_embd.weight", len(tokens), width)
    put("output_norm.weight", width)
    for i in range(layers):
        for part, shape in {
            "attn_norm": (width,), "attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width),
            "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (inner, width), "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }.items():  # fmt: skip
            put(f"blk.{i}.{part}.weight", *shape)
    if "extra" in changes:
        put(changes["extra"], width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="tiny.gguf", **changes: write_gguf(tmp_path / name, **changes)


@pytest.fixture(scope="session")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The default model, from the user's cache when it is there; else built once and removed at the end."""
    from moestro.build.upcycle import default

    folder, _, _ = default._target()
    if default.is_complete(folder):
        yield folder
        return
    home = tmp_path_factory.mktemp("moestro-home")
    before = os.environ.get("MOESTRO_HOME")
    os.environ["MOESTRO_HOME"] = str(home)
    try:
        folder = default.ensure_default_model()
    finally:
        os.environ.pop("MOESTRO_HOME")
        if before is not None:
            os.environ["MOESTRO_HOME"] = before
    yield folder
    shutil.rmtree(home)
