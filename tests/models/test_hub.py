"""Hub ids through huggingface_hub itself, against a small server on the loopback that speaks the Hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

COMMIT, OLD = "a" * 40, "b" * 40
INDEX = "model.safetensors.index.json"


def files() -> dict[str, dict[str, bytes]]:
    """Repositories by name: the files of each."""
    one = {"config.json": b'{"model_type": "olmoe"}', "model.safetensors": save({"a": np.ones(3, np.float32)})}
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    two = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        INDEX: json.dumps({"weight_map": shards}).encode(),
        **{file: save({name: np.full(3, 2, np.float32)}) for name, file in shards.items()},
        "original/model.safetensors": b"never fetched",
        "original/config.json": b"never fetched",
        "consolidated.safetensors": b"never fetched",
        "pytorch_model.bin": b"never fetched",
    }
    pickle, gguf = {"config.json": b"{}", "pytorch_model.bin": b"x"}, {"config.json": b"{}", "m-Q4_K.gguf": b"x"}
    return {"org/single": one, "org/shards": two, "org/pickle": pickle, "org/gguf": gguf}


class Hub(BaseHTTPRequestHandler):
    """/api/models/ORG/NAME/revision/REV, /api/models/ORG/NAME/tree/REV and /ORG/NAME/resolve/REV/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        self.server.asked.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        api = path[:2] == ["api", "models"]
        repo, what, revision, rest = "/".join(path[2:4] if api else path[:2]), *(path[4:6] if api else path[2:4]), path[4:]
        if repo == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if repo == "org/broken":
            return self.answer(500, b"on fire")
        if repo not in files():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in ("main", "v1", COMMIT, OLD):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        commit = OLD if revision in ("v1", OLD) else COMMIT
        stored = files()[repo]
        if commit == OLD:
            stored = {**stored, "config.json": b'{"old": true}'}
        if what == "revision":
            siblings = [{"rfilename": name} for name in stored]
            return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        if what == "tree":
            rows = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in stored.items()]
            return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        name = "/".join(rest)
        if name not in stored:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, stored[name], ETag=f'"{hashlib.sha1(stored[name]).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def look(home: Path, *models: str, endpoint: str = "http://127.0.0.1:9", **env: str) -> list[dict[str, Any]]:
    """Open each model in a fresh process (huggingface_hub reads its variables at import); a row for each."""
    code = """
import json, sys
from moestro.core.errors import MoestroError
from moestro.models.checkpoint import Checkpoint
for model in sys.argv[1:]:
    try:
        c = Checkpoint.open(model)
        row = dict(path=str(c.path), source=c.source, config=c.config, tensors={n: c.read(n).tolist() for n in c.tensors},
                   files=sorted(p.relative_to(c.path).as_posix() for p in c.path.rglob('*') if p.is_file()))
    except MoestroError as error:
        row = dict(error=str(error), kind=type(error).__name__)
    print(json.dumps(row))
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    # No Xet, no telemetry: the loopback server is all there is.
    env = {**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **env}
    done = subprocess.run(
        [sys.executable, "-c", code, *models], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_download_then_cache_then_offline(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    single, shards, old = look(tmp_path, "org/single", "org/shards", "org/single@v1", endpoint=endpoint)
    assert single["config"] == {"model_type": "olmoe"} and single["tensors"] == {"a": [1, 1, 1]}
    assert shards["tensors"] == {"a": [2, 2, 2], "b": [2, 2, 2]} and shards["source"] == "org/shards"
    assert shards["files"] == sorted(
        ["config.json", "tokenizer.json", "chat_template.jinja", INDEX, "model-1.safetensors", "model-2.safetensors"]
    )
    assert old["config"] == {"old": True} and OLD in old["path"]
    # The Hub's own cache, used where it is.
    assert single["path"] == str(tmp_path / "hub" / "models--org--single" / "snapshots" / COMMIT)
    # Again: nothing is fetched a second time.
    server.asked.clear()  # type: ignore[attr-defined]
    assert look(tmp_path, "org/shards", endpoint=endpoint)[0]["tensors"] == shards["tensors"]
    assert not [a for a in server.asked if "resolve" in a]  # type: ignore[attr-defined]
    # Offline, and with a server that is not there, the cache answers.
    server.asked.clear()  # type: ignore[attr-defined]
    offline = look(tmp_path, "org/single", "org/single@v1", "org/none", endpoint=endpoint, HF_HUB_OFFLINE="1")
    assert offline[0] == single and offline[1] == old and not server.asked  # type: ignore[attr-defined]
    assert offline[2]["kind"] == "CheckpointError" and "unset HF_HUB_OFFLINE" in offline[2]["error"]
    (away,) = look(tmp_path, "org/single")
    assert away == single


def test_refusals(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    models = ["org/none", "org/gated", "org/single@nope", "org/pickle", "org/.-bad--id"]
    none, gated, revision, pickle, invalid = look(tmp_path, *models, endpoint=endpoint)
    assert {row["kind"] for row in (none, gated, revision, pickle, invalid)} == {"CheckpointError"}
    assert "no such model on the Hub" in none["error"] and "hf auth login" in none["error"]
    assert "is gated" in gated["error"]
    assert "no such revision" in revision["error"]
    assert "no model.safetensors, only pytorch_model.bin" in pickle["error"]
    assert "could not be fetched" in invalid["error"]
    (gguf,) = look(tmp_path, "org/gguf", endpoint=endpoint)
    assert gguf["kind"] == "UnsupportedModel" and "GGUF files such as m-Q4_K.gguf" in gguf["error"]
    (alone,) = look(tmp_path / "other", "org/single")
    assert "neither in the Hub's cache" in alone["error"] and "http://127.0.0.1:9" in alone["error"]


def test_a_hand_made_cache_works_offline(tmp_path: Path) -> None:
    """As older versions of huggingface_hub leave it: refs and snapshots, no listing."""
    repo = tmp_path / "hub" / "models--org--single"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for i, (name, data) in enumerate(files()["org/single"].items()):
        (repo / "blobs" / str(i)).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    (row,) = look(tmp_path, "org/single", HF_HUB_OFFLINE="1")
    assert row["tensors"] == {"a": [1, 1, 1]} and row["path"] == str(snapshot)
