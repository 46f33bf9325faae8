"""Data: what is read from files, how it is labelled, cut and counted, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moestro.core.errors import InputError
from moestro.models.tokenizer import Tokenizer
from moestro.profile.data import cut, digest_of
from moestro.profile.sources import Document, read
from moestro.testing.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.open(folder)


@pytest.fixture
def folder(tmp_path):
    for name, text in {"de/a.txt": "eins", "de/b.txt": "zwei", "en/a.txt": "one two", ".git/x": "hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def rows(path, *values, name="a.jsonl"):
    (path / name).write_text("\n".join(json.dumps(v) for v in values) + "\n")
    return str(path / name)


def test_labels_of_files_and_folders(folder):
    assert [(d.label, d.text) for d in read([str(folder)], label="folder")] == [("de", "eins"), ("de", "zwei"), ("en", "one two")]
    assert [d.label for d in read([str(folder)])] == ["a", "b", "a"]
    assert {d.label for d in read([str(folder)], label="none")} == {"all"}
    assert [d.label for d in read([f"german={folder}/de", f"{folder}/en"])] == ["german", "german", "a"]


def test_rows_of_json(tmp_path):
    path = rows(
        tmp_path, {"text": "x\u2028y", "lang": "de"}, {"messages": [{"role": "user", "content": "hi"}], "lang": "en"}, "plain"
    )
    found = read([path])
    assert found[0].text == "x\u2028y" and found[1].messages == [{"role": "user", "content": "hi"}] and found[2].text == "plain"
    path = rows(tmp_path, {"text": "x", "lang": "de"}, {"tokens": [1, 2], "lang": "en"}, name="b.jsonl")
    assert [(d.label, d.tokens) for d in read([path], label="column:lang")] == [("de", None), ("en", [1, 2])]
    path = rows(tmp_path, {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, name="c.jsonl")
    assert read([path])[0].messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert read([rows(tmp_path, {"a": "x", "b": "y"}, name="d.jsonl")], text_column="b")[0].text == "y"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"text": "x"}\n{"text": ', {}, "line 2 is not JSON"),
        ('{"n": 1}\n', {}, "row 1 has no text: it has n"),
        ('{"text": "x"}\n', {"label": "column:lang"}, "row 1 has no 'lang'"),
        ('{"text": "x"}\n', {"text_column": "body"}, "row 1 has no 'body'"),
        ("3\n", {}, "row 1 is a JSON int"),
        ('{"messages": [{"content": "x"}]}\n', {}, "a message has no role"),
        ("", {}, "holds no documents"),
        ('{"text": "x"}\n', {"label": "row"}, "--label is 'row'"),
        ('{"text": "x"}\n', {"label": "column:"}, "--label is 'column:'"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, options, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read([str(tmp_path / "a.jsonl")], **options)


def test_bad_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8: byte 0xe9 at position 3"):
        read([str(tmp_path)])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="plain text and has no column"):
        read([str(tmp_path)], label="column:lang")
    with pytest.raises(InputError, match="there is no file or folder"):
        read([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        read([str(tmp_path / "empty")])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no such data set could be fetched"):
        read(["nobody/nothing-of-this-name"])


def tokens(n, label="a", start=0):
    return Document(label, "s", tokens=list(range(start, start + n)))


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (5, 2), (7, 1), (50, 50), (10, 9)])
def test_every_token_is_counted_once(length, stride):
    made = cut([tokens(23), tokens(4, start=50)], None, length=length, stride=stride)
    seen = np.concatenate([s.tokens_T[s.counted_T] for s in made.sequences])
    assert seen.tolist() == [*range(23), *range(50, 54)] and made.tokens == 27
    for s in made.sequences:
        assert (
            len(s.tokens_T) <= length and (s.tokens_T - s.start - (50 if s.document else 0) == np.arange(len(s.tokens_T))).all()
        )
    later = [s for s in made.sequences if s.start]
    assert all((~s.counted_T).sum() == len(s.tokens_T) - s.counted_T.sum() for s in later)


def test_a_limit_is_shared_by_the_labels():
    made = cut([tokens(30, "a"), tokens(30, "a"), tokens(30, "b")], None, length=8, tokens=80)
    counts = [sum(int(s.counted_T.sum()) for s in made.sequences if s.labels_T[0] == g) for g in range(2)]
    assert counts == [40, 30] and made.labels == ("a", "b")


def test_the_digest_knows_tokens_labels_and_masks():
    base = cut([tokens(9)], None, length=4)
    same = cut([tokens(9)], None, length=4)
    others = [
        cut([tokens(9, start=1)], None, length=4),
        cut([tokens(9, "b")], None, length=4),
        cut([tokens(9)], None, length=5),
        cut([tokens(9)], None, length=4, stride=3),
    ]
    assert base.digest == same.digest == digest_of(base.sequences, base.labels)
    assert len({base.digest, *(o.digest for o in others)}) == 5


def test_characters_are_those_of_the_text(tokenizer):
    made = cut([Document("a", "s", text="hello"), Document("b", "s", text="you")], tokenizer, length=3)
    assert made.characters_G == (5, 3)
    assert cut([Document("a", "s", text="hello")], tokenizer, tokens=2).characters_G == (2,)


def test_prompt_and_answer_are_told_apart(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    document = Document("x", "s", messages=[*chat, {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}])
    both = cut([document], tokenizer, by_part=True)
    ids, answer = both.sequences[0].tokens_T, both.sequences[0].labels_T == 1
    assert both.labels == ("prompt", "answer")
    assert tokenizer.decode(ids[answer].tolist(), skip_special=False) == "yo</s>cd</s>"
    only = cut([document], tokenizer, part="answer").sequences[0]
    assert (only.counted_T == answer).all() and (only.tokens_T == ids).all(), "the prompt stays as context"
    assert (cut([document], tokenizer, part="prompt").sequences[0].counted_T == ~answer).all()
    with pytest.raises(InputError, match="no text to profile with: no answer"):
        cut([Document("x", "s", text="hi")], tokenizer, part="answer")


def test_a_template_that_rewrites_the_past_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat", lambda messages, add_generation_prompt: [len(messages)] * 3)
    document = Document("x", "s", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert cut([document], tokenizer).tokens == 3
    with pytest.raises(InputError, match="does not write a longer chat"):
        cut([document], tokenizer, part="answer")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 1}, "sequences of 1"), ({"stride": 999}, "stride of 999"), ({"part": "middle"}, "part is 'middle'")],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        cut([tokens(5)], None, **options)


def test_bad_data(tokenizer):
    with pytest.raises(InputError, match="no text to profile"):
        cut([], tokenizer)
    with pytest.raises(InputError, match="has no tokenizer"):
        cut([Document("a", "s", text="x")], None)
    with pytest.raises(InputError, match="257 labels"):
        cut([tokens(2, str(i)) for i in range(257)], None)
