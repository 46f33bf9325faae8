"""Chromium without a window, if this machine has one: loads a page, plays a script in it and gives back what the script found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REASON = "no Chromium on this machine (apt-get install chromium)"

_WATCH = """<script>
window.errors = [];
addEventListener("error", (e) => errors.push(String(e.message)));
addEventListener("unhandledrejection", (e) => errors.push(String(e.reason)));
document.addEventListener("securitypolicyviolation", (e) => errors.push("policy: " + e.violatedDirective));
for (const kind of ["error", "warn"]) { const old = console[kind]; console[kind] = (...a) => { errors.push(a.join(" ")); old(...a); }; }
</script>"""
_PLAY = """<script>
const go = async (hash) => { location.hash = hash; await new Promise((r) => setTimeout(r, 30)); };
const set = async (node, value) => { if (node.type === "checkbox") node.checked = value; else node.value = value;
  node.dispatchEvent(new Event("change")); await new Promise((r) => setTimeout(r, 30)); };
const all = (selector) => [...document.querySelectorAll(selector)];
(async () => {
  const out = {};
  try { %s } catch (e) { errors.push("script: " + e.stack); }
  const told = document.createElement("pre"); told.id = "told"; told.textContent = JSON.stringify({ out, errors }); document.body.append(told);
})();
</script>"""


def play(page: Path, script: str, *, width: int = 1280) -> tuple[dict[str, Any], list[str]]:
    """(what the script put into `out`, every error, warning and breach of the content policy)."""
    assert BROWSER is not None
    text = page.read_text("utf-8").replace("<head>", "<head>" + _WATCH, 1)
    copy = page.with_name("played.html")
    copy.write_text(text.replace("</body>", _PLAY % script + "</body>", 1), "utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=20000",
    ]
    command += [f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    told = json.loads(unescape(found[1]))
    return told["out"], told["errors"]
