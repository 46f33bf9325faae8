"""A GGUF file of a Llama model turned into a dense Hugging Face checkpoint: weights dequantised to bfloat16, tokenizer included.

Sources: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); llama.cpp's convert_hf_to_gguf.py, whose
reordering of query and key rows is undone here; its pre-tokenizer 'smollm' (digits one by one, then GPT-2's pattern).
Needs the `gguf` package, not torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import CheckpointError, InputError, UnsupportedModel
from moestro.kernels.convert import to_bf16
from moestro.models.writer import CheckpointWriter

if TYPE_CHECKING:
    from gguf import GGUFReader

Progress = Callable[[str, float], None]  # (what is being done, fraction from 0 to 1)
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # the token type of control tokens


def write_dense(source: Path, folder: Path, *, dtype: str = "float32", progress: Progress | None = None) -> None:
    """Write the checkpoint into the new `folder`: bfloat16 weights, config.json, tokenizer, chat template, generation config.

    dtype: what config.json says models should be run in. Raises CheckpointError, UnsupportedModel, StorageError,
    and InputError when the package gguf is missing.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise InputError("reading a GGUF file needs the package gguf", fix="pip install gguf") from error
    try:
        reader = GGUFReader(source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{source} is not a readable GGUF file: {error}", fix="install or download it again") from error
    config = dense_config(reader, dtype=dtype)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    # Companions first, so that an unknown tokenizer is refused at once; a writer left early leaves nothing.
    with TemporaryDirectory() as companions, CheckpointWriter(folder, config) as writer:
        _write_tokenizer(reader, Path(companions), config)
        for i, tensor in enumerate(reader.tensors):
            if progress:
                progress("dequantising", i / len(reader.tensors))
            name, kind = _name(tensor.name, source)
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if kind in heads:
                values = unpermute(values, heads[kind])
            writer.add(name, to_bf16(np.ascontiguousarray(values)), "BF16")
        writer.finish(copy_files_from=companions)


def unpermute(weight_RD: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as Hugging Face orders them. llama.cpp interleaves the two halves of each head for its own rope."""
    half = weight_RD.shape[0] // heads // 2
    return weight_RD.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight_RD.shape)


def dense_config(reader: GGUFReader, *, dtype: str) -> dict[str, Any]:
    """config.json of a GGUF file's model. Raises UnsupportedModel for anything but a plain Llama."""
    family = _value(reader, "general.architecture")
    scaling = [key for key in reader.fields if ".rope.scaling." in key]
    if family != "llama" or scaling or any(key.startswith("llama.expert") for key in reader.fields):
        raise UnsupportedModel(
            f"this GGUF file holds a {family} model {' with ' + scaling[0] if scaling else ''}", expected="a plain dense Llama"
        )
    width, heads = int(_value(reader, "llama.embedding_length")), int(_value(reader, "llama.attention.head_count"))
    names = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(_value(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_value(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(_value(reader, "tokenizer.ggml.padding_token_id", _value(reader, "tokenizer.ggml.eos_token_id"))),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": int(_value(reader, "llama.feed_forward_length")),
        "max_position_embeddings": int(_value(reader, "llama.context_length")),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": int(_value(reader, "llama.block_count")),
        "num_key_value_heads": int(_value(reader, "llama.attention.head_count_kv", heads)),
        # Stored in float32: the shortest decimal that rounds to it is what the model's authors wrote.
        "rms_norm_eps": float(str(np.float32(_value(reader, "llama.attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(_value(reader, "llama.rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in names,
        "use_cache": True,
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
    }


def _write_tokenizer(reader: GGUFReader, folder: Path, config: dict[str, Any]) -> None:
    """tokenizer.json and its companions. Raises UnsupportedModel for another pre-tokenizer: a wrong one changes answers silently."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, split = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre", "")
    if (model, split) != ("gpt2", "smollm"):
        raise UnsupportedModel(f"this GGUF file's tokenizer is {model} / {split}", expected="gpt2 / smollm")
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    kinds: list[int] = _value(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = [
        AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = _value(reader, "tokenizer.chat_template", "")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    ids = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    ids["unk"] = int(_value(reader, "tokenizer.ggml.unknown_token_id", config["bos_token_id"]))
    settings = {f"{key}_token": tokens[i] for key, i in ids.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    generation = {f"{key}_token_id": config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")


def _name(name: str, source: Path) -> tuple[str, str]:
    """Hugging Face's name of a GGUF tensor, and its kind ('attn_q', ...)."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight", parts[2]
    if len(parts) == 2 and parts[1] == "weight" and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.weight", parts[0]
    raise UnsupportedModel(f"{source} has the tensor {name}", expected="the tensors of a plain dense Llama")


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    if field is None:
        if default is None:
            raise CheckpointError(f"the GGUF file says nothing about {key}", fix="install or download it again")
        return default
    return field.contents()
