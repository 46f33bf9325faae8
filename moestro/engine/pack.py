"""Packs a checkpoint's experts for streaming: one aligned record each, in the checkpoint's own numbers or in fewer bits.

The folder is written under a temporary name and renamed at the end. A journal beside the records says which are done, so that
packing that was interrupted (Ctrl-C, a kill, a full disk) continues where it stopped; every record's digest is verified from
the disk before the folder gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import StorageError
from moestro.core.experts import ExpertKey
from moestro.core.plans.residency import ResidencyPlan
from moestro.engine.store import FORMAT, HEADER, PackedStore, SourceStore, arrived, read_header, sample
from moestro.kernels.reader import Reader, aligned
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import encode, is_exact, parse_codec
from moestro.models.codecs.packed import Record
from moestro.models.codecs.source import stored_format
from moestro.models.layout import Layout

DATA, JOURNAL = "experts.bin", "journal.jsonl"
Progress = Callable[[int, int], None]  # experts done, experts in all


def apply(plan: ResidencyPlan, checkpoint: Checkpoint, layout: Layout, out: str | Path, progress: Progress | None = None) -> Path:
    """Do what a residency plan says on disk: pack its experts into the folder `out`, which is returned.

    Raises:
        PlanError: the plan is of another model. StorageError: the target cannot be written or is something else.
        CheckpointError: a broken expert. InputError: the codec does not fit.
    """
    plan.check(layout.facts)
    return pack(checkpoint, layout, plan.codec, out, progress)


def pack(checkpoint: Checkpoint, layout: Layout, codec: str, out: str | Path, progress: Progress | None = None) -> Path:
    """As `apply`, with the codec's name. Packing that has been done already is verified no further and returned at once."""
    out, facts = Path(out), layout.facts
    forms = [stored_format(layout.parts(ExpertKey(layer.ordinal, 0))) for layer in facts.layers]
    codecs = [parse_codec(codec, form) for form in forms]
    records = [Record.of(layer.spec, coder) for layer, coder in zip(facts.layers, codecs, strict=True)]
    if out.exists():
        _refuse_other(out, checkpoint, layout, codec)
        return out
    partial = out.with_name(out.name + ".partial")
    store = SourceStore(checkpoint, layout)
    places, size = _places(records, [la.num_experts for la in facts.layers])
    said = {"fingerprint": facts.fingerprint, "sample": sample(checkpoint, layout), "codec": codec, "size": size}
    with _storage(out):
        partial.mkdir(parents=True, exist_ok=True)
        done = _resume(partial, said, records, places)
        missing = sum(records[key.layer].nbytes for key in places if key not in done)
        free = shutil.disk_usage(partial).free
    if missing > free:
        raise StorageError(
            f"{out.parent} has {free} bytes free",
            expected=f"{missing} bytes for the packed experts",
            fix="free some space or choose another --output; packing continues where it stopped",
        )
    slot = aligned(store.slot_bytes)
    with (
        _storage(out),
        Reader() as reader,
        open(partial / DATA, "r+b") as data,
        open(partial / JOURNAL, "a", encoding="utf-8") as journal,
    ):
        store.attach(reader)
        for number, (key, at) in enumerate(places.items()):
            if key not in done:
                arrived(reader, reader.submit(store.reads(key, slot)), key)
                buffer = np.empty(records[key.layer].nbytes, np.uint8)
                records[key.layer].write(encode(store.finish(key, slot), codecs[key.layer]), buffer)
                _write(data.fileno(), buffer, at)
                done[key] = zlib.crc32(buffer.data)
                journal.write(json.dumps([*key, done[key]]) + "\n")
                journal.flush()
            if progress is not None:
                progress(number + 1, len(places))
        os.fsync(data.fileno())
    checkpoint.unchanged()
    lossy = not all(is_exact(coder, form) for coder, form in zip(codecs, forms, strict=True))
    header = {"moestro_experts": FORMAT, **said, "lossy": lossy, "file": DATA, "layers": [coder.name for coder in codecs]}
    header["records"] = [
        [[places[key], done[key]] for key in (ExpertKey(la.ordinal, e) for e in range(la.num_experts))] for la in facts.layers
    ]
    with _storage(out):
        _verify(partial, records, places, done)
        temporary = partial / (HEADER + ".partial")
        temporary.write_text(json.dumps(header), encoding="utf-8")
        os.replace(temporary, partial / HEADER)
        (partial / JOURNAL).unlink()
        os.replace(partial, out)
    return out


def _refuse_other(out: Path, checkpoint: Checkpoint, layout: Layout, codec: str) -> None:
    facts = layout.facts
    if not (out / HEADER).exists():
        raise StorageError(f"{out} exists and holds no packed experts", fix="choose another --output")
    header = read_header(out)
    if (header["fingerprint"], header["codec"]) != (facts.fingerprint, codec):
        raise StorageError(
            f"{out} holds experts of the model {header['fingerprint'][:12]} in codec {header['codec']}",
            expected=f"nothing, or those of {facts.fingerprint[:12]} in {codec}",
            fix="remove it or choose another --output",
        )
    PackedStore(out, facts).made_from(checkpoint, layout)


@contextmanager
def _storage(out: Path) -> Iterator[None]:
    """Errors of the file system as StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"packing into {out} stopped: {error}",
            fix="free some space or choose another --output; the same command continues where it stopped",
        ) from error


def _places(records: list[Record], experts: list[int]) -> tuple[dict[ExpertKey, int], int]:
    places: dict[ExpertKey, int] = {}
    cursor = 0
    for layer, (record, count) in enumerate(zip(records, experts, strict=True)):
        for e in range(count):
            places[ExpertKey(layer, e)] = cursor
            cursor += record.nbytes
    return places, cursor


def _resume(partial: Path, said: dict[str, Any], records: list[Record], places: dict[ExpertKey, int]) -> dict[ExpertKey, int]:
    """Digests of the records that an earlier attempt left whole; starts anew when it was of another model or codec."""
    journal, data = partial / JOURNAL, partial / DATA
    done: dict[ExpertKey, int] = {}
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() and data.exists() else []
    try:
        same = bool(lines) and json.loads(lines[0]) == said
        rows = [json.loads(line) for line in lines[1:] if line.endswith("]")] if same else []
    except ValueError:
        rows = []
        same = False
    if same:
        with open(data, "rb") as f:
            for layer, expert, crc in rows:
                key = ExpertKey(layer, expert)
                if key in places and _crc(f.fileno(), places[key], records[layer].nbytes) == crc:
                    done[key] = crc
    else:
        data.unlink(missing_ok=True)
    temporary = journal.with_name(JOURNAL + ".partial")
    text = "".join(json.dumps(row) + "\n" for row in [said, *([*key, crc] for key, crc in done.items())])
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, journal)
    with open(data, "ab") as f:
        f.truncate(said["size"])
    return done


def _write(file: int, record: np.ndarray, at: int) -> None:
    view = record.data
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _crc(file: int, at: int, nbytes: int) -> int:
    crc, stop = 0, at + nbytes
    while at < stop:
        piece = os.pread(file, min(1 << 20, stop - at), at)
        if not piece:
            return -1
        crc, at = zlib.crc32(piece, crc), at + len(piece)
    return crc


def _verify(partial: Path, records: list[Record], places: dict[ExpertKey, int], done: dict[ExpertKey, int]) -> None:
    with open(partial / DATA, "rb") as f:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # judge the disk, not the page cache
        for key, at in places.items():
            nbytes = records[key.layer].nbytes
            if _crc(f.fileno(), at, nbytes) != done[key]:
                raise OSError(f"the record of expert {tuple(key)} reads back differently from what was written")
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), at, nbytes, os.POSIX_FADV_DONTNEED)
