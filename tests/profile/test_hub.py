"""A data set by its name on the Hub, fetched over HTTP from a server of this test that answers as the Hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
FILES = {"train.jsonl": b'{"text": "first"}\n{"text": "second"}\n', "README.md": b"not data"}
JSON = {"Content-Type": "application/json"}


class Hub(BaseHTTPRequestHandler):
    """Revision v2 of the data set org/set, and nothing else."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if self.path == "/api/datasets/org/set/revision/v2":
            said = {"id": "org/set", "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES], "tags": []}
            status, headers, body = 200, JSON, json.dumps(said).encode()
        elif self.path.startswith(f"/api/datasets/org/set/tree/{COMMIT}"):
            rows = [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in FILES.items()]
            status, headers, body = 200, JSON, json.dumps(rows).encode()
        elif self.path == f"/datasets/org/set/resolve/{COMMIT}/{name}" and name in FILES:
            status, headers, body = 200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}, FILES[name]
            self.server.fetched.add(name)  # type: ignore[attr-defined]
        self.send_response(status)
        for field, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


def test_a_data_set_is_fetched_from_the_hub(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.fetched = set()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        said = [
            subprocess.run(
                [sys.executable, "-c", f"from moestro.profile.sources import read; print([d.text for d in read(['{name}'])])"],
                env=os.environ | here,
                capture_output=True,
                text=True,
                timeout=60,
            )
            for name in ("org/set@v2", "org/none")
        ]
        server.shutdown()
        assert server.fetched == {"train.jsonl"}, "only data is fetched"  # type: ignore[attr-defined]
    assert said[0].stdout.strip() == "['first', 'second']", said[0].stderr
    assert said[1].returncode and "no such data set could be fetched from the Hub" in said[1].stderr
