"""The built-in tokenizer: one token per byte of UTF-8, and one that ends a document. Saved as an ordinary tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

END, END_TEXT = 256, "<|endoftext|>"
SIZE = 257


def encode(text: str) -> np.ndarray:
    """uint8 ids of a text, without the end token."""
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in `tokenizers`' byte-level models (the table of GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which every Hugging Face program reads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(END_TEXT, special=True)])
    assert backend.token_to_id(END_TEXT) == END
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TEXT, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
