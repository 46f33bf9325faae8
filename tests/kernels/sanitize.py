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
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
CORES = os.cpu_count() or 1
FLAGS = "-O1 -g1 -fno-omit-frame-pointer"
PYTEST = ["-q", "-p", "no:cacheprovider", "--capture=sys"]  # what a sanitizer says of a process that it ends must be seen
ENGINE = [f"tests/engine/test_{name}.py" for name in ("step", "store", "cache", "coded", "native_replay")]
# What is left out takes minutes here, and what is not runs the same code.
CHECKED = "not any_trace and not without_native and not (scalar and company and not mxfp4)"
SHARED = "(reader or avx2 or neon or cache or planted) and not (company or long_calls or bf16 or bandwidth or in_pieces or packed or fork or control)"
UNWRITTEN = "not numpy and not scalar and not refusals and not (company and not mxfp4)"

# The built extension in the place of the installed one, then pytest.
ON_BUILT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("moestro.kernels._native", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Check:
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    errors: Callable[[], list[str]] = list  # what it found, besides a command that fails


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # for a cmake that pip installed
    # Threads of OpenBLAS hand over their results unseen by a sanitizer.
    everywhere = {**os.environ, "PATH": path, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env={**everywhere, **(environment or {})}, text=True, **options)


def built(name: str, sanitizers: str) -> str:
    """The extension with these sanitizers."""
    folder = BUILD / name
    flags = f"{FLAGS} -fsanitize={sanitizers}"
    options = ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--parallel", str(CORES)],
    ):
        print("+", *command, flush=True)
        if code := run(command).returncode:
            raise SystemExit(f"cmake ended with {code}")
    return str(next(folder.glob("_native*.so")))


def libraries(*names: str) -> str:
    """What has to be loaded before Python, which was built without sanitizers; libstdc++ for exceptions to be seen."""
    compiler = os.environ.get("CXX", "c++")
    found = (
        subprocess.check_output([compiler, f"-print-file-name={name}.so"], text=True).strip() for name in (*names, "libstdc++")
    )
    return " ".join(found)


def asan() -> Check:
    command = [sys.executable, "-c", ON_BUILT, built("asan", "address,undefined -fno-sanitize-recover=undefined")]
    environment = {
        "LD_PRELOAD": libraries("libasan", "libubsan"),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps much until it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return Check([*command, *PYTEST, "tests/kernels", *ENGINE, "-k", CHECKED], environment)


def tsan() -> Check:
    fixed = ["setarch", "--addr-no-randomize"]  # the thread sanitizer wants its addresses where it expects them
    command = [*fixed, sys.executable, "-c", ON_BUILT, built("tsan", "thread")]
    chosen = ["tests/kernels", "tests/engine/test_cache.py", "tests/engine/test_native_replay.py", "-k", SHARED]
    return Check([*command, *PYTEST, *chosen], {"LD_PRELOAD": libraries("libtsan"), "TSAN_OPTIONS": "halt_on_error=1"})


def valgrind() -> Check:
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed; install it, or name the checks to run: asan, tsan")
    chosen = ["tests/kernels/test_packed.py", "tests/kernels/test_norm.py", "tests/kernels/test_linear.py", "-k", UNWRITTEN]
    BUILD.mkdir(parents=True, exist_ok=True)
    found = BUILD / "valgrind.xml"
    checks = ["--child-silent-after-fork=yes", "--xml=yes", f"--xml-file={found}"]

    def errors() -> list[str]:
        return ["".join(error.itertext()) for error in ElementTree.parse(found).iter("error") if ours(error)]

    return Check(["valgrind", *checks, sys.executable, "-m", "pytest", *PYTEST, *chosen], errors=errors)


def ours(error: ElementTree.Element) -> bool:
    """Whether the extension was running, or numpy met what it had left. With --xml leaks are looked for whatever one asks."""
    if str(error.findtext("kind")).startswith("Leak_"):
        return False
    frames = [str(frame.findtext("obj")) for frame in error.iterfind("stack[1]/frame")]
    return any("/_native." in frame for frame in frames) or "/numpy/" in frames[0]


def passes(name: str, check: Check) -> bool:
    began = time.perf_counter()
    done = run(check.command, check.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = check.errors() if done.returncode == 0 else [f"{name} ended with {done.returncode}"]
    print(f"== {name}, {time.perf_counter() - began:.0f} s", done.stdout, *found, sep="\n", flush=True)
    return not found


def main(names: Sequence[str]) -> None:
    checks = {name: {"asan": asan, "tsan": tsan, "valgrind": valgrind}[name]() for name in names}
    with ThreadPoolExecutor(CORES) as pool:  # most of a check's work is one thread's
        passed = list(pool.map(passes, checks, checks.values()))
    failed = [name for name, good in zip(checks, passed, strict=True) if not good]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:] or ("asan", "tsan", "valgrind"))
