"""Runs tests on native code whose every access is checked: `python tests/kernels/sanitize.py [asan|tsan|valgrind]`, by default all three.

asan      the extension with the address and the undefined-behaviour sanitizer: the kernels at every level of this machine, and the steps,
          replays and stores that lie on them
tsan      the extension with the thread sanitizer: readers, the pool, replays
valgrind  the installed extension: reads of memory that nobody has written; errors of the interpreter itself are passed over

Extensions are built apart, in build/sanitize. Linux with GCC or Clang.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer"
PYTEST = ["-q", "-p", "no:cacheprovider", "--capture=sys"]  # what a sanitizer says of a process that it ends must be seen
ENGINE = [f"tests/engine/test_{name}.py" for name in ("step", "store", "cache", "coded", "native_replay")]
# What is left out takes minutes here, and what is not runs the same code.
CHECKED = "not any_trace and not without_native and not (scalar and company and not mxfp4)"
SHARED = "(reader or avx2 or neon or cache or planted) and not (company or long_calls or bf16 or bandwidth or in_pieces or packed or fork or control)"
UNWRITTEN = "not numpy and not scalar and not refusals"

# The built extension in the place of the installed one, then pytest.
ON_BUILT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("moestro.kernels._native", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def run(command: Sequence[str], **environment: str) -> None:
    print("+", *(word for word in command if "\n" not in word), flush=True)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # for a cmake that pip installed
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path, **environment})
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}")


def built(name: str, sanitizers: str) -> Path:
    """The extension with these sanitizers."""
    folder = BUILD / name
    flags = f"{FLAGS} -fsanitize={sanitizers}"
    options = ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}", f"-DPython_EXECUTABLE={sys.executable}"]
    run(["cmake", "-S", str(ROOT), "-B", str(folder), *options])
    run(["cmake", "--build", str(folder), "--parallel"])
    return next(folder.glob("_native*.so"))


def libraries(*names: str) -> str:
    """What has to be loaded before Python, which was built without sanitizers; libstdc++ for exceptions to be seen."""
    compiler = os.environ.get("CXX", "c++")
    found = (
        subprocess.check_output([compiler, f"-print-file-name={name}.so"], text=True).strip() for name in (*names, "libstdc++")
    )
    return " ".join(found)


def asan() -> None:
    module = built("asan", "address,undefined -fno-sanitize-recover=undefined")
    run(
        [sys.executable, "-c", ON_BUILT, str(module), *PYTEST, "tests/kernels", *ENGINE, "-k", CHECKED],
        LD_PRELOAD=libraries("libasan", "libubsan"),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter keeps much until it ends
        UBSAN_OPTIONS="print_stacktrace=1",
    )


def tsan() -> None:
    module = built("tsan", "thread")
    chosen = ["tests/kernels", "tests/engine/test_cache.py", "tests/engine/test_native_replay.py", "-k", SHARED]
    fixed = ["setarch", "--addr-no-randomize"]  # the thread sanitizer wants its addresses where it expects them
    run(
        [*fixed, sys.executable, "-c", ON_BUILT, str(module), *PYTEST, *chosen],
        LD_PRELOAD=libraries("libtsan"),
        TSAN_OPTIONS="halt_on_error=1",
    )


def valgrind() -> None:
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed; install it, or name the checks to run: asan, tsan")
    chosen = ["tests/kernels/test_packed.py", "tests/kernels/test_norm.py", "tests/kernels/test_linear.py", "-k", UNWRITTEN]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "errors.xml"
        checks = ["--leak-check=no", "--child-silent-after-fork=yes", "--xml=yes", f"--xml-file={found}"]
        run(["valgrind", *checks, sys.executable, "-m", "pytest", *PYTEST, *chosen], OPENBLAS_NUM_THREADS="1")
        errors = [error for error in ElementTree.parse(found).iter("error") if ours(error)]
    for error in errors:
        print("".join(error.itertext()))
    if errors:
        raise SystemExit(f"valgrind: {len(errors)} errors")


def ours(error: ElementTree.Element) -> bool:
    """Whether the extension was running, or numpy met what it had left."""
    frames = [str(frame.findtext("obj")) for frame in error.iterfind("stack[1]/frame")]
    return any("/_native." in frame for frame in frames) or "/numpy/" in frames[0]


if __name__ == "__main__":
    for name in sys.argv[1:] or ("asan", "tsan", "valgrind"):
        {"asan": asan, "tsan": tsan, "valgrind": valgrind}[name]()
