"""A child process under a kernel memory limit, and what the kernel counted of it; plus the rates of this machine's disk and memory.

Needs Linux and root for the limit (cgroup v1 or v2), for dropping the page cache and for setting the read-ahead. Without them
`require` raises Unlimited with what is missing; callers may go on with `limited=False`, and results then say so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import platform
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
DROP = Path("/proc/sys/vm/drop_caches")


class Unlimited(RuntimeError):
    """The kernel cannot hold a child to a memory limit here; the message says why."""


@dataclass(slots=True)
class Outcome:
    """What became of a child. Bytes unless named otherwise; None where the kernel did not tell.

    peak: the group's highest count (anonymous memory, page cache it brought in, kernel memory). peak_anonymous and peak_cache:
    the highest of each, sampled.
    """

    returncode: int
    seconds: float
    stdout: str
    stderr: str
    limit: int | None
    peak: int | None = None
    peak_anonymous: int | None = None
    peak_cache: int | None = None
    out_of_memory: bool = False
    timed_out: bool = False
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    major_faults: int = 0

    def result(self) -> dict[str, Any]:
        """The JSON object on the child's last line of output, or {'error': ...}."""
        for line in reversed(self.stdout.splitlines()):
            if line.startswith("{"):
                return json.loads(line)
        if self.out_of_memory:
            why = "killed by the kernel: out of memory under the limit"
        elif self.timed_out:
            why = "stopped: took too long"
        else:
            why = f"exit code {self.returncode}: {self.stderr.strip()[-2000:]}"
        return {"error": why}

    def counts(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in ("stdout", "stderr")}


def version() -> int | None:
    """1 or 2: which kind of memory control group this machine offers, or None."""
    if (V1 / "memory.limit_in_bytes").exists() or (V1 / "cgroup.procs").exists():
        return 1
    controllers = V2 / "cgroup.controllers"
    return 2 if controllers.exists() and "memory" in controllers.read_text().split() else None


def require() -> None:
    """Raises Unlimited unless a limit can be set here."""
    if platform.system() != "Linux":
        raise Unlimited(f"memory limits need Linux's control groups, this is {platform.system()}")
    if os.geteuid() != 0:
        raise Unlimited("memory limits, dropping the page cache and setting the read-ahead need root; run with sudo")
    kind = version()
    if kind is None:
        raise Unlimited("no memory control group is mounted under /sys/fs/cgroup")
    try:
        group = _Group.make(1 << 30)
    except OSError as error:
        raise Unlimited(f"cannot make a memory control group (v{kind}): {error}") from error
    group.remove()


@dataclass(slots=True)
class _Group:
    path: Path
    kind: int

    @classmethod
    def make(cls, limit: int) -> _Group:
        kind = version()
        assert kind is not None
        root = V1 if kind == 1 else V2
        if kind == 2 and "memory" not in (root / "cgroup.subtree_control").read_text().split():
            (root / "cgroup.subtree_control").write_text("+memory")
        path = root / f"moestro-bench-{os.getpid()}-{time.monotonic_ns()}"
        path.mkdir()
        group = cls(path, kind)
        try:
            if kind == 1:
                (path / "memory.limit_in_bytes").write_text(str(limit))
                with contextlib.suppress(OSError):  # present only where swap is accounted
                    (path / "memory.memsw.limit_in_bytes").write_text(str(limit))
            else:
                (path / "memory.max").write_text(str(limit))
                with contextlib.suppress(OSError):
                    (path / "memory.swap.max").write_text("0")
        except OSError:
            group.remove()
            raise
        return group

    def _number(self, v1: str, v2: str) -> int | None:
        try:
            return int((self.path / (v1 if self.kind == 1 else v2)).read_text())
        except (OSError, ValueError):
            return None

    @property
    def peak(self) -> int | None:
        return self._number("memory.max_usage_in_bytes", "memory.peak")

    def split(self) -> tuple[int, int]:
        """Anonymous and page-cache bytes now."""
        names = ("total_rss", "total_cache") if self.kind == 1 else ("anon", "file")
        table = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(table[names[0]]), int(table[names[1]])

    def killed(self) -> bool:
        """Whether the kernel killed a process for want of memory."""
        table = (self.path / ("memory.oom_control" if self.kind == 1 else "memory.events")).read_text()
        return any(line.startswith("oom_kill ") and int(line.split()[1]) for line in table.splitlines())

    def remove(self) -> None:
        for _ in range(200):  # the kernel lets go of a dead member a little late
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.02)


def run(
    argv: Sequence[str], *, limit: int | None, timeout: float, env: dict[str, str] | None = None, interval: float = 0.05
) -> Outcome:
    """Run `argv` to its end, in a group of its own limited to `limit` bytes (None: no limit). Kills it after `timeout` seconds."""
    group = _Group.make(limit) if limit is not None else None
    if group is not None:
        argv = ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group.path), *argv]
    peaks = [0, 0]
    stop = threading.Event()

    def sample() -> None:
        assert group is not None
        while not stop.wait(interval):
            with contextlib.suppress(OSError, KeyError, ValueError):
                peaks[:] = map(max, peaks, group.split())

    sampler = threading.Thread(target=sample, daemon=True) if group else None
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, env=env, start_new_session=True)
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        clock = threading.Timer(timeout, give_up)
        clock.start()
        try:
            if sampler:
                sampler.start()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            give_up()
            process.wait()
            raise
        finally:
            clock.cancel()
            stop.set()
            if sampler:
                sampler.join()
            try:
                seconds = time.perf_counter() - began
                peak = group.peak if group else None
                killed = group.killed() if group else False
            finally:
                if group:
                    group.remove()
        out.seek(0)
        err.seek(0)
        return Outcome(
            returncode=process.returncode,
            seconds=seconds,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
            limit=limit,
            peak=peak,
            peak_anonymous=peaks[0] if group else None,
            peak_cache=peaks[1] if group else None,
            out_of_memory=killed,
            timed_out=timed_out.is_set(),
            user_seconds=usage.ru_utime,
            system_seconds=usage.ru_stime,
            major_faults=usage.ru_majflt,
        )


def drop_page_cache() -> bool:
    """Write back and forget every clean page, so that the next run reads the disk. False where not allowed."""
    os.sync()
    try:
        DROP.write_text("3")
    except OSError:
        return False
    return True


def device_queue(path: Path) -> Path | None:
    """The settings folder of the block device that holds `path`, or None (tmpfs, overlay, network)."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        return None
    device = device.resolve()
    return next((d / "queue" for d in (device, device.parent) if (d / "queue" / "read_ahead_kb").exists()), None)


def read_ahead(path: Path) -> int | None:
    """The device's read-ahead in KiB, or None."""
    queue = device_queue(path)
    return int((queue / "read_ahead_kb").read_text()) if queue else None


@contextlib.contextmanager
def read_ahead_of(path: Path, kib: int | None) -> Iterator[int | None]:
    """Set the read-ahead of the device under `path` and put the old one back, also on Ctrl-C or SIGTERM. None leaves it alone."""
    queue = device_queue(path)
    if queue is None or kib is None:
        yield read_ahead(path)
        return
    file = queue / "read_ahead_kb"
    before = file.read_text()

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    handler = signal.signal(signal.SIGTERM, leave) if threading.current_thread() is threading.main_thread() else None
    try:
        file.write_text(str(kib))
        yield int(file.read_text())
    finally:
        file.write_text(before)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold an exclusive lock on `path`, so that two benchmarks never time at once."""
    if path is None:
        yield
        return
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes per second of direct reads at random places. rates: {(size, outstanding): median}; best: the highest of them."""

    best: float
    rates: dict[str, float] = field(default_factory=dict)


def disk_rate(
    path: Path, sizes: Sequence[int], *, outstanding: Sequence[int] = (1, 2), seconds: float = 0.25, rounds: int = 3
) -> DiskRate:
    """Probe each read size and queue depth in turn, `rounds` times round robin; the median of each. `best` is what a reader that
    chose well would get, so a bound made from it flatters nobody. Raises OSError where direct reads are refused."""
    size_of_file = path.stat().st_size
    seen: dict[str, list[float]] = {}
    for turn in range(rounds):
        for size in sizes:
            size = min(size, size_of_file) // 4096 * 4096
            for depth in outstanding:
                rate = _direct_reads(path, size, depth, seconds, size_of_file, turn)
                seen.setdefault(f"{size}x{depth}", []).append(rate)
    rates = {k: statistics.median(v) for k, v in seen.items()}
    return DiskRate(max(rates.values()), rates)


def _direct_reads(path: Path, size: int, depth: int, seconds: float, size_of_file: int, seed: int) -> float:
    """Into huge pages where there are any, as an engine's slots are: into small pages a device may read in many more requests."""
    done = [0] * depth
    failure: list[OSError] = []
    with mmap.mmap(-1, max(depth * size, 32 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pool:
        pool.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(pool), mmap.PAGESIZE):
            pool[at] = 0  # page faults are not the disk's time
        began = time.perf_counter()

        def work(i: int) -> None:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
                try:
                    with memoryview(pool) as all_of_it, all_of_it[i * size : (i + 1) * size] as into:
                        draw = random.Random(seed * 64 + i)
                        while time.perf_counter() - began < seconds:
                            done[i] += os.preadv(fd, [into], draw.randrange((size_of_file - size) // 4096 + 1) * 4096)
                finally:
                    os.close(fd)
            except OSError as error:
                failure.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        elapsed = time.perf_counter() - began
    if failure:
        raise failure[0]
    return sum(done) / elapsed


def memory_rate(threads: int, nbytes: int = 1 << 28) -> float:
    """Bytes per second at which `threads` threads together read memory that no cache holds; best of 5."""
    import numpy as np

    parts = [np.ones(nbytes // 8, np.int64) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        best = max(best, threads * nbytes / (time.perf_counter() - began))
    return best


def machine(path: Path) -> dict[str, Any]:
    """What a reader must know of the hardware and kernel."""
    cpu = platform.processor() or platform.machine()
    total = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                cpu = line.split(":", 1)[1].strip()
                break
        total = int(next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal")).split()[1]) * 1024
    flags = ""
    with contextlib.suppress(OSError, StopIteration):
        flags = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("flags", "Features")))
    known = (
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512_bf16",
        "avx512_vnni",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "asimddp",
        "bf16",
        "i8mm",
    )
    queue = device_queue(path)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": [x for x in known if x in flags.split()],
        "memory": total,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "device": queue.parent.name if queue else None,
        "read_ahead_kib_before": read_ahead(path),
        "control_group": version(),
    }
