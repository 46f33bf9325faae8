"""A byte-level BPE tokenizer (tokenizer.json) as a GGUF file's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.models.checkpoint import read_json

_NORMAL, _CONTROL, _ADDED, _UNUSED = 1, 3, 4, 5
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def add_tokenizer(writer: Any, folder: Path, config: dict[str, Any], pre: str = "") -> None:
    """Add tokens, merges and special ids of the tokenizer in `folder` to a GGUFWriter.

    Raises CheckpointError without a tokenizer, UnsupportedModel for one that is not byte-level BPE, or whose way of splitting words
    has no name here and none is given: a wrong one changes answers silently.
    """
    data = read_json(folder / "tokenizer.json")
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedModel(f"the tokenizer is {model.get('type')}, with bytes as fallback", expected="byte-level BPE")
    name = pre or _split(data.get("pre_tokenizer"))
    size = int(config["vocab_size"])
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [_UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in data.get("added_tokens", ()):
        if added["id"] >= size:
            raise CheckpointError(f"the token {added['content']!r} has the id {added['id']}", expected=f"ids below {size}")
        tokens[added["id"]], kinds[added["id"]] = added["content"], _CONTROL if added["special"] else _ADDED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)):
        said = config.get(f"{key}_token_id")
        ids = said if isinstance(said, list) else [] if said is None else [said]
        if ids:
            add(int(ids[0]))
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _split(data: Any) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    steps = data.get("pretokenizers", [data]) if isinstance(data, dict) else []
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and (steps[0].get("pattern") or {}).get("Regex") == _QWEN:
        return "qwen2"
    raise UnsupportedModel(
        f"the pre-tokenizer {json.dumps(data)[:200]} has no name that is known here",
        expected="that of SmolLM, GPT-2 or Qwen",
        fix="name llama.cpp's own with --option pre=NAME",
    )
