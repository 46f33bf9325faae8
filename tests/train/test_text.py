"""Where text comes from, and how it becomes token files."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import CheckpointError, InputError
from moestro.models.tokenizer import Tokenizer
from moestro.train.data import bytes as byte_tokens
from moestro.train.data.text import read
from moestro.train.data.tokens import open_tokens, prepare, vocabulary_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Loose text, two domains as folders, JSON lines in a third, and a hidden file."""
    files = {
        "top.txt": "at the top",
        "law/a.txt": "first",
        "law/b.md": "second",
        "law/deep/c.txt": "third",
        "code/x.py": "print(1)",
        ".git/config": "hidden",
        "code/.cache": "hidden too",
        "rows/r.jsonl": '{"text": "eins", "lang": "de"}\n\n{"text": "one", "lang": "en"}\n',
    }
    for name, text in files.items():
        (path := tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


def test_a_folder_in_order_with_a_domain_per_inner_folder(folder):
    assert list(read(str(folder))) == [
        ("code", "print(1)"),
        ("law", "first"),
        ("law", "second"),
        ("law", "third"),
        ("rows", "eins"),
        ("rows", "one"),
        ("corpus", "at the top"),
    ]


def test_files_patterns_names_and_fields(folder):
    assert list(read(str(folder / "law/a.txt"))) == [("a", "first")]
    assert list(read(f"mine={folder / 'law/a.txt'}")) == [("mine", "first")]
    assert list(read(f"x={folder}/law/**/*.txt")) == [("x", "first"), ("x", "third")]
    rows = str(folder / "rows/r.jsonl")
    assert list(read(rows, domain_field="lang")) == [("de", "eins"), ("en", "one")]
    assert list(read(rows, field="lang")) == [("r", "de"), ("r", "en")]


def test_compressed_rows(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    assert list(read(str(path))) == [("rows", "packed")]


def test_installed_text():
    ((domain, text),) = read("installed:names")
    assert domain == "names" and "LATIN SMALL LETTER A\n" in text
    assert next(read("mine=installed:names")) == ("mine", text)


def test_a_data_set_from_the_hub(folder, monkeypatch):
    asked = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert [text for _, text in read("hub:org/some-data@v1:*.txt")] == ["first", "third", "at the top"]
    assert asked == {"name": "org/some-data", "repo_type": "dataset", "revision": "v1", "allow_patterns": ["*.txt"]}
    assert {domain for domain, _ in read("hub:org/some-data")} == {"some-data"}
    with pytest.raises(InputError, match="no file like"):
        list(read("hub:org/some-data:*.csv"))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def snapshot(name: str, **options: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError, match=r"org/name could not be fetched: no route"):
        list(read("hub:org/name"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        list(read(str(tmp_path / "a.parquet")))


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["uno", "due"], "lang": ["it", "it"], "n": [1, 2]}), path)
    assert list(read(str(path))) == [("a", "uno"), ("a", "due")]
    assert list(read(str(path), domain_field="lang")) == [("it", "uno"), ("it", "due")]
    with pytest.raises(InputError, match=r"row 1 of .* has no text 'body'"):
        list(read(str(path), field="body"))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="cannot be read"):
        list(read(str(path)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{}/none", "there is no text at"),
        ("{}/*.rst", "there is no text at"),
        ("{}/bad.txt", "is not UTF-8: byte 0xff at position 1"),
        ("{}/bad.jsonl", "row 2 of .* is no JSON"),
        ("{}/rows.jsonl", "row 1 of .* has no text 'text', only: body"),
        ("{}/list.jsonl", "row 1 of .* has no text 'text', only: list"),
        ("=x", "lacks a name or a place"),
        ("installed:klingon", "no text domain 'klingon'"),
        ("hub:justaname", "names no data set"),
    ],
)
def test_what_cannot_be_read(tmp_path, spec, said):
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match=said):
        list(read(spec.format(tmp_path)))


def test_token_files_hold_the_text_and_its_ends(tmp_path):
    documents = [("a", "xy"), ("b", "é"), ("a", "z")]
    made = prepare(documents, "bytes", tmp_path / "tokens")
    assert [d.name for d in made.domains] == ["a", "b"] and made.vocabulary == 257
    assert made.ids[0].tolist() == [120, 121, 256, 122, 256] and made.ids[1].tolist() == [0xC3, 0xA9, 256]
    assert [(d.tokens, d.bytes, d.documents) for d in made.domains] == [(5, 3, 2), (3, 2, 1)]
    again = open_tokens(tmp_path / "tokens")
    assert again.digest == made.digest and np.array_equal(again.ids[0], made.ids[0])
    assert prepare([("a", "xy"), ("b", "e")], "bytes", tmp_path / "other").digest != made.digest
    assert not list(tmp_path.glob("*.partial"))


def test_the_byte_tokenizer_file_gives_the_same_ids(tmp_path):
    text = "".join(map(chr, range(300))) + "日本 <|x|> 🙂\r\n"
    byte_tokens.save(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.encode(text) == byte_tokens.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.size == byte_tokens.SIZE and tokenizer.eos_ids == (byte_tokens.END,)


def test_a_tokenizer_of_a_model(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<u>": 0, "red": 1, "fox": 2, "<end>": 3}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text("{}")
    backend.save(str(model / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no token that ends a text"):
        vocabulary_of(str(model))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    made = prepare([("a", "red fox blue")], str(model), tmp_path / "tokens")
    assert made.ids[0].tolist() == [1, 2, 0, 3] and made.vocabulary == 4 == vocabulary_of(str(model))
    (out := tmp_path / "out").mkdir()
    made.save_tokenizer(out)
    assert sorted(file.name for file in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_no_text_at_all(tmp_path):
    with pytest.raises(InputError, match="the data has no text"):
        prepare([], "bytes", tmp_path / "tokens")
    assert not list(tmp_path.iterdir())


def test_too_many_domains(tmp_path):
    with pytest.raises(InputError, match="more than 256 domains"):
        prepare(((str(i), "x") for i in range(300)), "bytes", tmp_path / "tokens")


def test_token_files_that_were_cut(tmp_path):
    prepare([("a", "abcdef")], "bytes", tmp_path / "tokens")
    file = tmp_path / "tokens" / "domain-000.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"has 5 tokens of a[\s\S]*expected: 7"):
        open_tokens(tmp_path / "tokens")
