"""Packs a checkpoint for streaming: one aligned record per expert, in the checkpoint's own numbers or in fewer bits, and maybe the trunk.

The folder is written under a temporary name and renamed at the end. A journal beside the records says which are done, so that
packing that was interrupted (Ctrl-C, a kill, a full disk) continues where it stopped; every record's digest is verified from
the disk before the folder gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import InputError, StorageError
from moestro.core.experts import ExpertKey
from moestro.core.plans.residency import Precision, ResidencyPlan
from moestro.engine.store import FORMAT, HEADER, MIXED, PackedStore, SourceStore, arrived, changes_of, read_header, sample
from moestro.kernels.checksum import crc32
from moestro.kernels.reader import Reader, aligned
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import PLANES, Codec, encode, parse_codec, parse_trunk_codec
from moestro.models.codecs.packed import Record
from moestro.models.codecs.source import stored_format
from moestro.models.codecs.trunk import FILE, PackedTrunk, write_trunk
from moestro.models.layout import Layout
from moestro.models.native import describe
from moestro.models.native.weights import matrices, trunk_bytes, twin

DATA, JOURNAL = "experts.bin", "journal.jsonl"
Progress = Callable[[int, int], None]  # experts done, experts in all


def apply(plan: ResidencyPlan, checkpoint: Checkpoint, layout: Layout, out: str | Path, progress: Progress | None = None) -> Path:
    """Do what a residency plan says on disk: pack its experts, and a quantised trunk, into the folder `out`, which is returned.

    Raises:
        PlanError: the plan is of another model. StorageError: the target cannot be written or is something else.
        CheckpointError: a broken expert. InputError: the codec does not fit.
    """
    plan.check(layout.facts)
    widths = plan.precision if plan.codec == MIXED else None
    return pack(checkpoint, layout, plan.codec, out, progress, trunk_codec=plan.trunk_codec, widths=widths)


def pack(
    checkpoint: Checkpoint,
    layout: Layout,
    codec: str,
    out: str | Path,
    progress: Progress | None = None,
    *,
    trunk_codec: str = "stored",
    widths: Precision | None = None,
) -> Path:
    """As `apply`, with the codecs' names. widths: of each expert, with the codec 'mixed'.

    Packing that has been done already is verified no further and returned at once.
    """
    out, facts = Path(out), layout.facts
    made = codecs_of(checkpoint, layout, codec, widths)
    records = {key: Record.of(facts.layers[key.layer].spec, coder) for key, coder in made.items()}
    trunk = Trunk.of(checkpoint, layout, trunk_codec)
    if out.exists():
        _refuse_other(out, checkpoint, layout, codec, trunk_codec, list(made.values()))
        return out
    partial = out.with_name(out.name + ".partial")
    store = SourceStore(checkpoint, layout)
    names = list(dict.fromkeys(coder.name for coder in made.values()))
    places, size = _places(records)
    said = {"fingerprint": facts.fingerprint, "sample": sample(checkpoint, layout), "codec": codec, "codecs": names, "size": size}
    said["kinds"] = [names.index(coder.name) for coder in made.values()]
    with _storage(out):
        partial.mkdir(parents=True, exist_ok=True)
        done = _resume(partial, said, records, places)
        missing = sum(records[key].nbytes for key in places if key not in done) + trunk.nbytes
        free = shutil.disk_usage(partial).free
    if missing > free:
        raise StorageError(
            f"{out.parent} has {free} bytes free",
            expected=f"{missing} bytes for the packed model",
            fix="free some space or choose another --output; packing continues where it stopped",
        )
    slot = aligned(store.slot_bytes)
    with (
        _storage(out),
        Reader() as reader,
        open(partial / DATA, "r+b") as data,
        open(partial / JOURNAL, "a", encoding="utf-8") as journal,
    ):
        described = trunk.write(partial)
        store.attach(reader)
        for number, (key, at) in enumerate(places.items()):
            if key not in done:
                arrived(reader, reader.submit(store.reads(key, slot)), key)
                buffer = np.empty(records[key].nbytes, np.uint8)
                records[key].write(encode(store.finish(key, slot), made[key]), buffer)
                _write(data.fileno(), buffer, at)
                done[key] = [crc32(buffer[a:b]) for a, b in _pieces(records[key])]
                journal.write(json.dumps([*key, done[key]]) + "\n")
                journal.flush()
            if progress is not None:
                progress(number + 1, len(places))
        os.fsync(data.fileno())
    checkpoint.unchanged()
    changes = changes_of(made.values(), [stored_format(layout.parts(key)) for key in made], codec)
    header = {"moestro_experts": FORMAT, **said, "changes": changes, "file": DATA, "trunk": described}
    header["records"] = [
        [
            [names.index(made[key].name), places[key], done[key]]
            for key in (ExpertKey(la.ordinal, e) for e in range(la.num_experts))
        ]
        for la in facts.layers
    ]
    with _storage(out):
        _verify(partial, records, places, done)
        if described is not None:
            PackedTrunk(partial, described).check()
        temporary = partial / (HEADER + ".partial")
        temporary.write_text(json.dumps(header), encoding="utf-8")
        os.replace(temporary, partial / HEADER)
        (partial / JOURNAL).unlink()
        os.replace(partial, out)
    return out


def codecs_of(checkpoint: Checkpoint, layout: Layout, codec: str, widths: Precision | None = None) -> dict[ExpertKey, Codec]:
    """The concrete codec of every expert, in the order of the records. Raises InputError."""
    if (codec == MIXED) != (widths is not None):
        raise InputError(
            f"the codec is {codec!r} and widths are {'given' if widths else 'not given'}",
            expected="'mixed' with the width of each expert",
            fix="plan with --quality, and apply that plan",
        )
    out: dict[ExpertKey, Codec] = {}
    for layer in layout.facts.layers:
        for key in (ExpertKey(layer.ordinal, e) for e in range(layer.num_experts)):
            form = stored_format(layout.parts(key))
            out[key] = parse_codec(codec if widths is None else widths.width(key), form)
    if cut := next((coder for coder in out.values() if coder.format == "nested" and coder.planes != PLANES[-1]), None):
        raise InputError(f"{cut.name} is a part of a nested codec", expected=f"{cut.format}:{cut.group}, which holds all planes")
    return out


@dataclass(frozen=True, slots=True)
class Trunk:
    """What of the trunk is to be written: nothing when its codec is 'stored'."""

    checkpoint: Checkpoint
    names: tuple[str, ...] = ()
    coded: Mapping[str, int] = field(default_factory=dict)
    codec: Codec | None = None
    nbytes: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout, codec: str) -> Trunk:
        coder = parse_trunk_codec(codec)
        if coder is None:
            return cls(checkpoint)
        decoder = describe(checkpoint, layout)
        left_out = twin(checkpoint, decoder)
        names = tuple(name for name in decoder.names() if name != left_out)
        return cls(checkpoint, names, matrices(decoder), coder, trunk_bytes(checkpoint, names, decoder, coder))

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Write the file into `folder` and describe it."""
        if self.codec is None:
            return None
        with open(folder / FILE, "wb") as file:
            described = write_trunk(self.checkpoint, self.names, self.coded, self.codec, file)
            file.flush()
            os.fsync(file.fileno())
        return described


def _refuse_other(out: Path, checkpoint: Checkpoint, layout: Layout, codec: str, trunk_codec: str, codecs: list[Codec]) -> None:
    facts = layout.facts
    if not (out / HEADER).exists():
        raise StorageError(f"{out} exists and holds no packed experts", fix="choose another --output")
    header = read_header(out)
    held = "stored" if header["trunk"] is None else header["trunk"]["codec"]
    same = [header["codecs"][kind] for kind in header["kinds"]] == [coder.name for coder in codecs]
    if (header["fingerprint"], header["codec"], held) != (facts.fingerprint, codec, trunk_codec) or not same:
        raise StorageError(
            f"{out} holds experts of the model {header['fingerprint'][:12]} in codec {header['codec']} and the trunk in {held}",
            expected=f"nothing, or those of {facts.fingerprint[:12]} in {codec} and the trunk in {trunk_codec}"
            + ("" if same else ", each expert with the same width"),
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


def _pieces(record: Record) -> list[tuple[int, int]]:
    """The parts of a record that may be read without what follows them, each with its own digest."""
    return list(zip((0, *record.sizes), record.sizes, strict=False))


def _places(records: Mapping[ExpertKey, Record]) -> tuple[dict[ExpertKey, int], int]:
    places: dict[ExpertKey, int] = {}
    cursor = 0
    for key, record in records.items():
        places[key] = cursor
        cursor += record.nbytes
    return places, cursor


def _resume(
    partial: Path, said: dict[str, Any], records: Mapping[ExpertKey, Record], places: dict[ExpertKey, int]
) -> dict[ExpertKey, list[int]]:
    """Digests of the records that an earlier attempt left whole; starts anew when it was of another model or codec."""
    journal, data = partial / JOURNAL, partial / DATA
    done: dict[ExpertKey, list[int]] = {}
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() and data.exists() else []
    try:
        same = bool(lines) and json.loads(lines[0]) == said
        rows = [json.loads(line) for line in lines[1:] if line.endswith("]]")] if same else []
    except ValueError:
        rows = []
        same = False
    if same:
        with open(data, "rb") as f:
            for layer, expert, crcs in rows:
                key = ExpertKey(layer, expert)
                if key in places and _crcs(f.fileno(), places[key], records[key]) == crcs:
                    done[key] = crcs
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


def _crcs(file: int, at: int, record: Record) -> list[int]:
    return [_crc(file, at + start, stop - start) for start, stop in _pieces(record)]


def _crc(file: int, at: int, nbytes: int) -> int:
    crc, stop = 0, at + nbytes
    while at < stop:
        piece = os.pread(file, min(1 << 20, stop - at), at)
        if not piece:
            return -1
        crc, at = crc32(np.frombuffer(piece, np.uint8), crc), at + len(piece)
    return crc


def _verify(
    partial: Path, records: Mapping[ExpertKey, Record], places: dict[ExpertKey, int], done: dict[ExpertKey, list[int]]
) -> None:
    with open(partial / DATA, "rb") as f:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # judge the disk, not the page cache
        for key, at in places.items():
            if _crcs(f.fileno(), at, records[key]) != done[key]:
                raise OSError(f"the record of expert {tuple(key)} reads back differently from what was written")
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), at, records[key].nbytes, os.POSIX_FADV_DONTNEED)
