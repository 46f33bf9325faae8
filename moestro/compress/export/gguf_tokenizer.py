"""A byte-level BPE tokenizer (tokenizer.json), chat templates and the usual sampling (generation_config.json) as a GGUF file's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.models.checkpoint import read_json
from moestro.models.tokenizer import Tokenizer

_NORMAL, _CONTROL, _ADDED, _UNUSED = 1, 3, 4, 5
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def add_tokenizer(writer: Any, folder: Path, config: dict[str, Any], pre: str = "") -> None:
    """Add tokens, merges, special ids, chat templates and settings of sampling of the model in `folder` to a GGUFWriter.

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
    named = [(token, i, _NORMAL) for token, i in model["vocab"].items()]
    named += [(a["content"], a["id"], _CONTROL if a["special"] else _ADDED) for a in data.get("added_tokens", ())]
    for token, i, kind in named:
        if i >= size:
            raise CheckpointError(f"the token {token!r} has the id {i}", expected=f"ids below {size}")
        tokens[i], kinds[i] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    mine = Tokenizer.open(folder)
    for key, add in (("bos", writer.add_bos_token_id), ("pad", writer.add_pad_token_id)):
        if (said := config.get(f"{key}_token_id")) is not None:
            add(int(said))
    # What ends an answer: the tokenizer's own end first; llama.cpp has three places for such tokens.
    ends = sorted(mine.eos_ids, key=lambda i: tokens[i] != mine.special.get("eos_token"))
    for i, add in zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(i)
    writer.add_add_bos_token(mine.encode("a")[:1] == [config.get("bos_token_id")])
    if mine.templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in mine.templates.items()])
    if mine.generation.get("do_sample"):
        sampling = (("temperature", writer.add_sampling_temp, float), ("top_p", writer.add_sampling_top_p, float),
                    ("top_k", writer.add_sampling_top_k, int), ("min_p", writer.add_sampling_min_p, float))  # fmt: skip
        for name, add, kind in sampling:
            if (value := mine.generation.get(name)) is not None:
                add(kind(value))


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
        fix="name llama.cpp's own: moestro export --pre NAME",
    )
