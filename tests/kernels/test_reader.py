"""The reader: every byte arrives, in the promised order, and every failure is told; native and Python queues alike."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels import native
from moestro.kernels.reader import BLOCK, Hurry, Populated, Read, Reader, aligned, probe

SIZE = 9 * (1 << 20) + 12345  # more than two pieces, not a multiple of a block
COMMON = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def content(tmp_path_factory):
    data = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    path = tmp_path_factory.mktemp("reader") / "data.bin"
    data.tofile(path)
    return path, data


def blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def test_aligned_memory():
    buffer = aligned(3 << 20)
    assert buffer.ctypes.data % BLOCK == 0 and buffer.shape == (3 << 20,) and buffer.flags.writeable and not buffer.any()
    assert aligned(0).shape == (0,)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("direct", [True, False])
def test_whole_file(level, content, threads, direct):
    path, data = content
    buffer = aligned(blocks(SIZE))
    buffer[:] = 7
    with Reader(threads, direct) as reader:
        file = reader.add(path)
        assert reader.size(file) == SIZE
        reader.wait(reader.submit([Read(file, 0, blocks(SIZE), buffer)]))
        assert (buffer[:SIZE] == data).all() and reader.bytes_read == SIZE and reader.seconds_busy > 0


@given(data=st.data())
@COMMON
def test_any_ranges(level, content, data):
    """Aligned and unaligned offsets, lengths and addresses, several reads per ticket, several tickets."""
    path, expected = content
    draw = data.draw
    with Reader(draw(st.integers(1, 3)), draw(st.booleans())) as reader:
        files = [reader.add(path), reader.add(path)]
        jobs = []
        for _ in range(draw(st.integers(1, 4))):
            reads = []
            for _ in range(draw(st.integers(0, 3))):
                even = draw(st.booleans())
                offset = draw(st.integers(0, SIZE - 1))
                nbytes = draw(st.integers(0, min(SIZE - offset, 200_000)))
                shift = draw(st.integers(0, 70))
                if even:
                    offset, shift = offset // BLOCK * BLOCK, 0
                    nbytes = blocks(nbytes)
                buffer = aligned(nbytes + shift + 9)
                buffer[:] = 255
                reads.append(Read(files[draw(st.integers(0, 1))], offset, nbytes, buffer[shift:]))
            jobs.append((reader.submit(reads, draw(st.sampled_from(Hurry))), reads))
        for ticket, reads in reversed(jobs):
            if draw(st.booleans()):
                reader.promote(ticket)
            reader.wait(ticket)
            assert reader.done(ticket)
            reader.wait(ticket)  # waiting again is harmless
            for _, offset, nbytes, into in reads:
                real = min(nbytes, SIZE - offset)
                assert (into[:real] == expected[offset : offset + real]).all()
                assert (into[real : nbytes + 9][-9:] == 255).all(), "nothing beyond the range is written"


def test_reads_beyond_the_end(level, content):
    path, _ = content
    buffer = aligned(4 * BLOCK)
    with Reader() as reader:
        file = reader.add(path)
        reader.wait(reader.submit([Read(file, blocks(SIZE) - BLOCK, BLOCK, buffer)]))
        for offset, nbytes in ((blocks(SIZE) - BLOCK, 2 * BLOCK), (blocks(SIZE), BLOCK), (1 << 40, 10)):
            ticket = reader.submit([Read(file, 0, BLOCK, buffer), Read(file, offset, nbytes, buffer)])
            for _ in range(2):
                with pytest.raises(EOFError, match=r"data\.bin, which has 94"):
                    reader.wait(ticket)
            assert reader.done(ticket)
        reader.wait(reader.submit([Read(file, 0, BLOCK, buffer)]))  # the reader lives on


def test_a_file_that_shrinks(level, tmp_path):
    path = tmp_path / "shrinks.bin"
    path.write_bytes(b"x" * (4 * BLOCK))
    with Reader() as reader:
        file = reader.add(path)
        os.truncate(path, BLOCK)
        with pytest.raises(EOFError, match="no more"):
            reader.wait(reader.submit([Read(file, 0, 4 * BLOCK, aligned(4 * BLOCK))]))


def test_files_that_cannot_be_read(level, tmp_path):
    with Reader() as reader:
        with pytest.raises(FileNotFoundError, match=r"absent\.bin"):
            reader.add(tmp_path / "absent.bin")
        file = reader.add(tmp_path)  # a folder opens but does not read
        if reader.size(file):
            with pytest.raises(IsADirectoryError):
                reader.wait(reader.submit([Read(file, 0, 10, aligned(10))]))


def test_urgent_reads_overtake_prefetches(level, content):
    """One thread, so order shows: an urgent ticket and a promoted one end before prefetches queued earlier."""
    path, _ = content
    whole = aligned(blocks(SIZE))
    with Reader(1) as reader:
        file = reader.add(path)
        later = [reader.submit([Read(file, 0, blocks(SIZE), whole)], Hurry.SOON) for _ in range(40)]
        promoted = reader.submit([Read(file, 0, BLOCK, aligned(BLOCK))], Hurry.SOON)
        urgent = reader.submit([Read(file, 0, BLOCK, aligned(BLOCK))])
        reader.promote(promoted)
        reader.wait(urgent)
        reader.wait(promoted)
        assert not reader.done(later[-1]), "40 reads of 9 MB cannot end before two of 4 KiB that overtook them"
        for ticket in later:
            reader.wait(ticket)


def test_what_has_no_hurry_waits_for_everything_else(level, content):
    path, _ = content
    whole = aligned(blocks(SIZE))
    with Reader(1) as reader:
        file = reader.add(path)
        idle = [reader.submit([Read(file, 0, blocks(SIZE), whole)], Hurry.IDLE) for _ in range(40)]
        soon = reader.submit([Read(file, 0, BLOCK, aligned(BLOCK))], Hurry.SOON)
        reader.wait(soon)
        reader.promote(idle[-1], Hurry.SOON)
        reader.wait(idle[-1])
        assert not reader.done(idle[-2]), "39 reads of 9 MB cannot end before one of them that overtook the others"
        for ticket in idle:
            reader.cancel(ticket)
            reader.wait(ticket)


def test_a_cancelled_read_ends_without_being_read(level, content):
    path, _ = content
    whole = aligned(blocks(SIZE))
    with Reader(1) as reader:
        file = reader.add(path)
        later = [reader.submit([Read(file, 0, blocks(SIZE), whole)], Hurry.SOON) for _ in range(40)]
        for ticket in later[1:]:
            reader.cancel(ticket)
        for ticket in later:
            reader.wait(ticket)
        assert all(reader.done(ticket) for ticket in later)
        assert SIZE <= reader.bytes_read <= 2 * SIZE, "the first, and at most what had begun of another"
        reader.cancel(later[0])  # what has ended stays as it is
        reader.wait(reader.submit([Read(file, 0, BLOCK, whole)]))


def test_close_with_reads_in_flight(level, content):
    path, _ = content
    buffer = aligned(blocks(SIZE))
    reader = Reader(2)
    file = reader.add(path)
    tickets = [reader.submit([Read(file, 0, blocks(SIZE), buffer)], Hurry.SOON) for _ in range(50)]
    outcome = []

    def wait() -> None:
        try:
            reader.wait(tickets[-1])
        except ValueError as error:
            outcome.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.01)
    reader.close()
    waiter.join(5)
    assert outcome and "closed" in outcome[0]
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.submit([Read(file, 0, BLOCK, buffer)])
    with pytest.raises(ValueError, match="closed"):
        reader.add(path)


def test_buffers_and_readers_may_be_dropped_in_flight(level, content):
    """Nobody else holds the buffers: the reader must, or this crashes."""
    path, _ = content
    for _ in range(5):
        reader = Reader(2)
        file = reader.add(path)
        for _ in range(5):
            reader.submit([Read(file, 0, 1 << 20, aligned(1 << 20))], Hurry.SOON)
        gc.collect()
        del reader


def test_finished_buffers_are_let_go(level, content):
    path, _ = content
    with Reader() as reader:
        file = reader.add(path)
        for _ in range(20):
            last = reader.submit([Read(file, 0, BLOCK, aligned(BLOCK))], Hurry.SOON)
        while not reader.done(last):
            time.sleep(0.001)
        reader.wait(reader.submit([]))
        assert len(reader._alive) <= 1, "nobody waited for these tickets, still their buffers must go"


def test_waiting_leaves_the_interpreter_free(level, content):
    path, _ = content
    with Reader(1) as reader:
        file = reader.add(path)
        ticket = reader.submit([Read(file, 0, blocks(SIZE), aligned(blocks(SIZE)))] * 30)
        worked = []
        thread = threading.Thread(target=lambda: worked.append(sum(range(100_000))))
        thread.start()
        reader.wait(ticket)
        thread.join()
        assert worked


def test_control_c_interrupts_a_wait(level, tmp_path):
    path = tmp_path / "sparse.bin"
    path.touch()
    os.truncate(path, 64 << 20)
    code = f"""
from moestro.kernels.reader import Reader, Read, aligned
reader = Reader(1)
buffer = aligned(64 << 20)
ticket = reader.submit([Read(reader.add({str(path)!r}), 0, 64 << 20, buffer)] * 20_000)  # minutes of reading
print("ready", flush=True)
try:
    reader.wait(ticket)
except KeyboardInterrupt:
    reader.close()
    print("interrupted", reader.bytes_read < 20_000 * (64 << 20), flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline().strip() == "ready"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert out.strip() == "interrupted True"


def test_probe(level, content, tmp_path):
    path, _ = content
    assert 1e6 < probe(path, 1 << 20, 0.05) < 1e12
    assert probe(path, 1 << 30, 0.01) > 1e6, "a size beyond the file's"
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ValueError, match="empty"):
        probe(empty, 4096)


@pytest.mark.skipif(not Path("/proc/self/statm").exists() or not native.available(), reason="needs Linux and native code")
def test_a_large_buffer_gets_its_memory_beside_what_comes_next_and_keeps_what_was_written():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    buffer, before = aligned(Populated.LEAST), resident()
    buffer[-1] = 7
    populated = Populated(buffer)
    populated.wait()
    if not native.extension().populate(buffer.ctypes.data, 4096):
        pytest.skip("a kernel that cannot")
    assert resident() - before > Populated.LEAST * 3 // 4
    assert buffer[-1] == 7 and not buffer[:-1].any()
    populated.close()
    populated.close()


def test_a_buffer_that_is_closed_at_once_or_small_may_stay_without_memory(level):
    for nbytes in (4096, Populated.LEAST):
        Populated(aligned(nbytes)).close()
