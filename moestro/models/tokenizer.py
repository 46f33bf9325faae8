"""Text to tokens and back, and chats, from a model folder's tokenizer.json; without transformers or torch.

Source: `transformers` 5 `tokenization_utils_base.py` for what tokenizer_config.json adds to tokenizer.json: tokens, and no more;
what stands around a text (`add_bos_token`) is tokenizer.json's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.core.errors import CheckpointError, InputError
from moestro.models import chat
from moestro.models.checkpoint import read_json

_HELD = 8  # tokens without a whole character after which they are given out as they are
_HALF = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        special: special tokens by role, as 'bos_token'.
        templates: chat templates by name.
        generation: what generation_config.json says, {} without one.
        eos_ids: tokens that end an answer. stops: texts that end one.
        context: tokens the model can see, if its configuration says so.
    """

    def __init__(self, folder: Path, backend: Any, config: dict[str, Any], special: dict[str, str]) -> None:
        self.folder, self.special = folder, special
        self._backend = backend
        self.templates = chat.read_templates(folder, config)
        self.generation = _optional(folder / "generation_config.json")
        model = _optional(folder / "config.json")
        text = model.get("text_config") if isinstance(model.get("text_config"), dict) else {}
        self.eos_ids = _ids(self.generation) or _ids(model) or _ids(text)
        if not self.eos_ids and (eos := backend.token_to_id(special.get("eos_token", ""))) is not None:
            self.eos_ids = (eos,)
        stops = self.generation.get("stop_strings") or ()
        self.stops: tuple[str, ...] = (stops,) if isinstance(stops, str) else tuple(stops)
        self.context = _context(model, text or {}, config)

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """Open the tokenizer of a model folder. Raises CheckpointError when it has none that can be read."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            others = [n for n in ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model") if (folder / n).exists()]
            raise CheckpointError(
                f"{folder} has no tokenizer.json" + (f", only {others[0]}" if others else ""),
                expected="the file that fast tokenizers are saved in",
                fix="convert it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                if others
                else "copy tokenizer.json from the model this one was made of",
            )
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read: {error}", fix="download or copy it again") from error
        backend.no_truncation()
        backend.no_padding()
        config = _optional(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _optional(folder / "special_tokens_map.json")
        try:
            special = _special(config)
            _add_tokens(backend, config, special)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} describes its tokens in an unknown way: {error}",
                fix="download it again, or remove it: tokenizer.json is enough",
            ) from error
        return cls(folder, backend, config, special)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids; with `add_special` also those the tokenizer puts around a text. Raises InputError for text that is not Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text cannot be encoded as UTF-8 (character {error.start}, U+{ord(text[error.start]):04X})",
                expected="text, not raw bytes",
                fix="check the input's encoding",
            ) from error
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the tokens. Ids beyond the tokenizer (a padded vocabulary) have none."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of a token given as text, or None."""
        return self._backend.token_to_id(token)

    def stream(self, context: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """Decodes tokens as they come. context: the tokens before them, which decide whether the first begins with a space."""
        return TextStream(self, context, skip_special)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The chat as text, special tokens written out. template: the name of one of `templates`. Raises InputError, CheckpointError."""
        source = chat.choose(self.templates, template, tools is not None)
        known = {**self.special, **variables}
        return chat.render(
            source, messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=documents, **known
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any) -> list[int]:
        """The chat as token ids; options as for `render_chat`. Raises InputError, CheckpointError."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **options), add_special=False)


class TextStream:
    """Text of tokens as they come, in whole characters: joined, the pieces are what `decode` gives for all of them.

    A character's bytes may be spread over tokens; they are held back until it is whole, or for 8 tokens if it never is.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        # A few tokens before the new ones are decoded with them, as some decoders treat the start of a text differently.
        self._ids = [int(i) for i in context[-4:]]
        self._shown = len(self._ids)

    def add(self, ids: int | Iterable[int]) -> str:
        """The text that has become certain with these tokens, maybe ''."""
        piece = ""
        for i in [ids] if isinstance(ids, int) else ids:
            self._ids.append(int(i))
            piece += self._take()
        return piece

    def finish(self) -> str:
        """What is still held back; bytes that never became a character are replacement characters."""
        return self._emit(len(self._ids))

    def _take(self) -> str:
        end = len(self._ids)
        if not self._text(end).endswith(_HALF):
            return self._emit(end)
        if end - self._shown < _HELD:
            return ""
        # Bytes that are no text at all. The last three may still be the start of a character.
        return self._emit(next((cut for cut in range(end - 1, end - 4, -1) if not self._text(cut).endswith(_HALF)), end))

    def _emit(self, end: int) -> str:
        before, text = self._text(self._shown), self._text(end)
        if piece := text[len(before) :]:
            del self._ids[: self._shown]  # tokens without text stay: they are no context by themselves
            end -= self._shown
        self._shown = end
        return piece

    def _text(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[:end], self._skip)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by role: the usual ones, and any other `..._token` of the configuration."""
    extra = config.get("extra_special_tokens")
    rows = {k: v for k, v in config.items() if k.endswith("_token")} | (extra if isinstance(extra, dict) else {})
    named = {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in rows.items()}
    return {k: v for k, v in named.items() if isinstance(v, str)}


def _add_tokens(backend: Any, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add what tokenizer_config.json lists and tokenizer.json lacks, in the order of their ids."""
    from tokenizers import AddedToken

    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    rows = config.get("added_tokens_decoder", {})
    listed = sorted(((int(i), AddedToken(**row)) for i, row in rows.items()), key=lambda row: row[0])
    new = [token for _, token in listed if repr(token) not in known]
    present = {token.content for token in backend.get_added_tokens_decoder().values()} | {token.content for token in new}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    for row in [*special.values(), *(extra if isinstance(extra, list) else ())]:
        text = row["content"] if isinstance(row, dict) else row
        if text not in present:
            new.append(AddedToken(text, special=True))
            present.add(text)
    if new:
        backend.add_tokens(new)


def _ids(config: Mapping[str, Any] | None) -> tuple[int, ...]:
    found = (config or {}).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"the model's eos_token_id is {found!r}", expected="a token id, or a list of them")
    return tuple(ids)


def _context(model: Mapping[str, Any], text: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    for source in (text, model):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(source.get(name), int):
                return int(source[name])
    most = config.get("model_max_length")
    return int(most) if isinstance(most, int | float) and 0 < most < 1e12 else None
