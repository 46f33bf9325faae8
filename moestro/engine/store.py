"""Where experts come from: an `ExpertStore` says which bytes to read into a slot and turns a filled slot into a runnable expert.

`SourceStore` reads the original safetensors files; `PackedStore` reads what `engine.pack` wrote. A slot is `slot_bytes` of
page-aligned memory. Direct reads need aligned offsets, so a byte range lands in its slot at the same place within a page as in
the file, and the expert's matrices are views at that place: nothing is copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from moestro.core.errors import CheckpointError, InputError, PlanError, UnsupportedModel
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import ModelFacts
from moestro.core.plans.residency import Precision
from moestro.kernels.checksum import crc32
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.kernels.packed import Packed
from moestro.kernels.reader import Read, Reader, aligned
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import PLANES, ROUNDED, Codec, keeps_weights, parse_codec
from moestro.models.codecs.packed import Record
from moestro.models.codecs.source import stored_format, view
from moestro.models.codecs.trunk import PackedTrunk
from moestro.models.layout import Layout, Part

PAGE = 4096
HEADER = "experts.json"
FORMAT = 2
MIXED = "mixed"  # the codec of experts that have a width each
SAMPLED = 512  # bytes of each part that `sample` looks at


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


Views = dict[int, ExpertView]


@runtime_checkable
class ExpertStore(Protocol):
    """The experts of a model on disk.

    slot_bytes: page-aligned size that holds any one of them. extra_bytes: what the store itself keeps in memory.
    codec: 'stored' when the bytes are the checkpoint's own. changes: what is not as in the checkpoint, in words; empty when exact.
    """

    @property
    def slot_bytes(self) -> int: ...

    @property
    def extra_bytes(self) -> int: ...

    @property
    def codec(self) -> str: ...

    @property
    def changes(self) -> tuple[str, ...]: ...

    def attach(self, reader: Reader) -> None:
        """Open the files in `reader`; before any `reads`."""
        ...

    def reads(self, key: ExpertKey, slot: np.ndarray) -> list[Read]:
        """The reads that fill `slot` (uint8 [slot_bytes], page-aligned) with this expert."""
        ...

    def finish(self, key: ExpertKey, slot: np.ndarray, made: Views | None = None) -> ExpertView:
        """The runnable expert in a filled slot, valid as long as the slot's bytes are. Raises CheckpointError when they are damaged.

        made: views of this slot to be used again for experts that lie in it in the same way, and filled here.
        """
        ...

    def check(self) -> None:
        """Raises CheckpointError when the files changed since they were opened."""
        ...


class _Place(NamedTuple):
    """Where one expert lies in the files and in its slot. form: equal for experts whose views differ in nothing but the slot."""

    parts: tuple[Part, ...]
    runs: list[Run]
    places: list[int]
    form: int


class Run(NamedTuple):
    """One aligned read: bytes start:start+nbytes of `file` go to slot[at:at+nbytes]."""

    file: Path
    start: int
    nbytes: int
    at: int


def runs(parts: Sequence[Part]) -> tuple[list[Run], list[int], int]:
    """The aligned reads for one expert's parts, each part's place in the slot (in the order given), and the bytes taken.

    Parts whose pages touch are read at once.
    """
    out: list[Run] = []
    places = [0] * len(parts)
    cursor = 0
    for i in sorted(range(len(parts)), key=lambda i: (str(parts[i].file), parts[i].offset)):
        part = parts[i]
        start, stop = part.offset // PAGE * PAGE, pages(part.offset + part.nbytes)
        last = out[-1] if out else None
        if last is not None and last.file == part.file and start <= last.start + last.nbytes:
            grown = max(last.nbytes, stop - last.start)
            cursor += grown - last.nbytes
            out[-1] = last._replace(nbytes=grown)
        else:
            out.append(Run(part.file, start, stop - start, cursor))
            cursor += stop - start
        places[i] = out[-1].at + part.offset - out[-1].start
    return out, places, cursor


def broken(matrix: Matrix | Packed) -> bool:
    """Whether a matrix holds a NaN or an infinity, judged on its bits."""
    if isinstance(matrix, Packed):
        return not matrix.finite
    if matrix.format == "mxfp4":
        assert matrix.scales is not None
        return bool((matrix.scales == 255).any())
    mask = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[matrix.format]
    bits = matrix.data.view(np.uint32 if matrix.format == "f32" else np.uint16)
    rows = max(1, (1 << 17) // max(1, bits.shape[1]))  # a piece and its masked copy stay in the processor's cache
    piece = np.empty((min(rows, bits.shape[0]), bits.shape[1]), bits.dtype)
    for r in range(0, bits.shape[0], rows):
        some = bits[r : r + rows]
        if int(np.bitwise_and(some, mask, out=piece[: len(some)]).max()) >= mask:
            return True
    return False


class SourceStore:
    """Experts straight from the original safetensors files, unconverted.

    Matrices stored [in, out] cannot be used in place: their expert is turned into a packed record within its slot when it has
    been read. Raises UnsupportedModel for experts of another dtype than F32, F16, BF16 or MXFP4.
    """

    codec = "stored"
    changes: tuple[str, ...] = ()

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.checkpoint, self.layout = checkpoint, layout
        self._records: list[Record | None] = []
        self._checked: set[ExpertKey] = set()
        self._places: dict[ExpertKey, _Place] = {}
        self._forms: dict[tuple[Any, ...], int] = {}
        self._files: dict[Path, int] = {}
        size, self.extra_bytes = 0, 0
        for layer in layout.facts.layers:
            first = layout.parts(ExpertKey(layer.ordinal, 0))
            try:
                form = stored_format(first)
            except CheckpointError as error:
                raise UnsupportedModel(error.found, expected=error.expected, fix=error.fix) from error
            turned = any(part.transposed for part in first)
            record = Record.of(layer.spec, parse_codec("stored", form)) if turned else None
            self._records.append(record)
            for e in range(layer.num_experts):
                parts = layout.parts(ExpertKey(layer.ordinal, e))
                self._files |= dict.fromkeys((part.file for part in parts), -1)
                size = max(size, runs(parts)[2] + bias_bytes(layer.spec))
            if record is not None:
                size = max(size, record.nbytes)
                self.extra_bytes = max(self.extra_bytes, record.nbytes)
        self.slot_bytes = pages(size)

    def attach(self, reader: Reader) -> None:
        self._files = {file: reader.add(file) for file in sorted(self._files)}

    def check(self) -> None:
        self.checkpoint.unchanged()

    def _place(self, key: ExpertKey) -> _Place:
        found = self._places.get(key)
        if found is None:
            parts = self.layout.parts(key)
            found_runs, places, _ = runs(parts)
            looks = tuple(
                (at, p.role, p.dtype, p.shape, p.transposed, p.interleaved) for at, p in zip(places, parts, strict=True)
            )
            form = self._forms.setdefault(looks, len(self._forms))
            found = self._places[key] = _Place(parts, found_runs, places, form)
        return found

    def reads(self, key: ExpertKey, slot: np.ndarray) -> list[Read]:
        return [Read(self._files[r.file], r.start, r.nbytes, slot[r.at : r.at + r.nbytes]) for r in self._place(key).runs]

    def finish(self, key: ExpertKey, slot: np.ndarray, made: Views | None = None) -> ExpertView:
        parts, _, places, form = self._place(key)
        if made is not None and key in self._checked and (again := made.get(form)) is not None:
            return again
        found = view(parts, [slot[at : at + part.nbytes] for part, at in zip(parts, places, strict=True)])
        if key not in self._checked:
            self._check_values(key, parts, found)
            self._checked.add(key)
        if (record := self._records[key.layer]) is not None:
            record.write(_apart(found, slot), slot[: record.nbytes])
            return record.view(slot)
        if self.layout.facts.layers[key.layer].spec.bias:
            return _biases_inside(found, slot)
        if made is not None:
            made[form] = found
        return found

    def _check_values(self, key: ExpertKey, parts: Sequence[Part], found: ExpertView) -> None:
        for name in ("gate", "up", "down"):
            matrix, bias = getattr(found, name), getattr(found, f"{name}_bias")
            if (matrix is not None and broken(matrix)) or (bias is not None and not np.isfinite(bias).all()):
                layer = self.layout.facts.layers[key.layer]
                raise CheckpointError(
                    f"decoder layer {layer.index}, expert {key.expert}: {self._tensor_of(parts, name)} has values that are not finite",
                    expected="finite weights",
                    fix="download that file again; if it stays so, the checkpoint is broken",
                )

    def _tensor_of(self, parts: Sequence[Part], name: str) -> str:
        part = next(p for p in parts if name in p.role.split("_"))
        for ref in self.checkpoint.tensors.values():
            if ref.file == part.file and ref.offset <= part.offset < ref.offset + ref.nbytes:
                return f"{ref.name} in {ref.file.name}"
        return f"its {name} matrix in {part.file.name}"


def bias_bytes(spec: ExpertSpec) -> int:
    """Bytes of one expert's biases as float32."""
    return 4 * (spec.d_expert * (2 if spec.gated else 1) + spec.d_model) if spec.bias else 0


def _apart(found: ExpertView, slot: np.ndarray) -> ExpertView:
    """The same expert with no array left inside the slot, which is about to be written."""

    def away(value: Any) -> Any:
        if isinstance(value, Matrix):
            return Matrix(value.data.copy(), value.format, away(value.scales), value.group) if near(value.data) else value
        return value.copy() if value is not None and near(value) else value

    def near(array: np.ndarray) -> bool:
        return np.may_share_memory(array, slot)

    return ExpertView(*(away(getattr(found, n)) for n in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")))


def _biases_inside(found: ExpertView, slot: np.ndarray) -> ExpertView:
    """The same expert with its biases in the slot's last bytes, so that they cost no memory beside it."""
    biases: dict[str, np.ndarray] = {}
    stop = slot.nbytes
    for role in ("down_bias", "up_bias", "gate_bias"):
        if (value := getattr(found, role)) is not None:
            biases[role] = slot[stop - value.nbytes : stop].view(np.float32)
            biases[role][...] = value
            stop -= value.nbytes
    return ExpertView(found.gate, found.up, found.down, **biases)


class _Use(NamedTuple):
    """How one expert's record is used. planes: its bits, 0 for all. form: equal for experts whose views differ in nothing but the slot."""

    record: Record
    planes: int
    nbytes: int
    form: int


class PackedStore:
    """Experts of a packed folder: one aligned record each, read at once.

    planes_LE: how many bits of each expert's nested record are used (0: all); see `limit`. trunk_codec: of the trunk that lies
    beside the experts, 'stored' when none does.

    Raises CheckpointError for a folder that holds none, or those of another model.
    """

    def __init__(self, folder: str | Path, facts: ModelFacts) -> None:
        self.folder = Path(folder)
        header = read_header(self.folder)
        if header["fingerprint"] != facts.fingerprint:
            raise CheckpointError(
                f"the packed experts in {self.folder} were made from the model {header['fingerprint'][:12]}, this is {facts.fingerprint[:12]}",
                expected="experts packed from this checkpoint",
                fix="pack them again with `moestro apply`",
            )
        self.codec, self._changes = str(header["codec"]), tuple(header["changes"])
        # Rows are called 'stored' only where they are MXFP4, which has two forms; plain numbers go by their own names.
        self.codecs = [parse_codec(name, "mxfp4") for name in header["codecs"]]
        self.kinds = [[int(row[0]) for row in layer] for layer in header["records"]]
        self.places = [[(int(at), tuple(crcs)) for _, at, crcs in layer] for layer in header["records"]]
        self.records = [
            {kind: Record.of(la.spec, self.codecs[kind]) for kind in set(kinds)}
            for la, kinds in zip(facts.layers, self.kinds, strict=True)
        ]
        self.planes_LE = [[0] * la.num_experts for la in facts.layers]
        self.file = self.folder / header["file"]
        self.slot_bytes = max(record.nbytes for of_layer in self.records for record in of_layer.values())
        self.extra_bytes = 0
        self._trunk: dict[str, Any] | None = header["trunk"]
        self.trunk_codec = "stored" if self._trunk is None else str(self._trunk["codec"])
        self._size, self._sample = int(header["size"]), int(header["sample"])
        self._stamp: tuple[int, int] | None = None
        self._checked: set[ExpertKey] = set()
        self._index = -1
        self._uses = self._used()
        self.check()

    def trunk(self) -> PackedTrunk | None:
        """The packed trunk, read now; None when the folder holds none. Raises CheckpointError."""
        return None if self._trunk is None else PackedTrunk(self.folder, self._trunk)

    def codec_of(self, key: ExpertKey) -> Codec:
        """The format of one expert, with the number of its bits that are used."""
        codec, planes = self.codecs[self.kinds[key.layer][key.expert]], self.planes_LE[key.layer][key.expert]
        return codec._replace(planes=planes) if planes else codec

    def precision(self) -> Precision | None:
        """The width of each expert as it is used now, None where all have one codec with all its bits."""
        if self.codec != MIXED and not self.cut:
            return None
        held = [[self.codec_of(ExpertKey(la, e)).name for e in range(len(row))] for la, row in enumerate(self.kinds)]
        names = list(dict.fromkeys(name for row in held for name in row))
        return Precision("engine.pack", tuple(names), tuple(tuple(names.index(name) for name in row) for row in held))

    def follow(self, precision: Precision) -> None:
        """Read what the plan's widths ask for; before any reads. Raises PlanError when the records cannot give it."""
        keys = [[ExpertKey(la, e) for e in range(len(row))] for la, row in enumerate(self.kinds)]
        asked = [[parse_codec(precision.width(key), "mxfp4") for key in row] for row in keys]
        if any(want[:2] != self.codec_of(key)[:2] for row, wants in zip(keys, asked) for key, want in zip(row, wants)):
            raise PlanError(
                f"the plan's widths are {', '.join(precision.widths)}, the experts in {self.folder} are kept otherwise",
                expected="a store packed by this plan",
                fix="run `moestro apply` with this plan, or plan again",
            )
        self.limit([[codec.planes for codec in row] for row in asked])

    def cap(self, planes: int) -> list[list[int]]:
        """planes_LE with no more than `planes` for any expert."""
        return [[min(p or PLANES[-1], planes) for p in row] for row in self.planes_LE]

    def limit(self, planes_LE: Sequence[Sequence[int]]) -> None:
        """Use only so many bits of each expert (0: all), and read no more than these; before any reads.

        Raises InputError when the experts' records are not nested.
        """
        nested = all(codec.format == "nested" for codec in self.codecs)
        if any(p for row in planes_LE for p in row) and not nested:
            raise InputError(
                f"the packed experts are kept as {self.codec}, which has no planes to leave out",
                expected="experts packed as nested:32 or nested:64",
                fix="pack them with `moestro apply --codec nested:64`",
            )
        assert all(p in (0, *PLANES) for row in planes_LE for p in row)
        self.planes_LE = [list(row) for row in planes_LE]
        self._checked.clear()
        self._uses = self._used()
        self.slot_bytes = max(use.nbytes for row in self._uses for use in row)

    def _used(self) -> list[list[_Use]]:
        """What of each expert's record is read and how it is seen."""
        forms: dict[tuple[Record, int], int] = {}
        out = []
        for records, kinds, row in zip(self.records, self.kinds, self.planes_LE, strict=True):
            pairs = [(records[kind], planes) for kind, planes in zip(kinds, row, strict=True)]
            out.append([_Use(*pair, pair[0].size(pair[1]), forms.setdefault(pair, len(forms))) for pair in pairs])
        return out

    @property
    def sizes_LE(self) -> list[list[int]]:
        """Bytes to read for each expert as it is used now."""
        return [[use.nbytes for use in row] for row in self._uses]

    @property
    def cut(self) -> bool:
        """Whether some experts are used with fewer bits than they are kept with."""
        return any(0 < p < PLANES[-1] for row in self.planes_LE for p in row)

    @property
    def changes(self) -> tuple[str, ...]:
        used = [p for row in self.planes_LE for p in row]
        if not self.cut:
            return self._changes
        counts = {p: used.count(p) for p in PLANES}
        return (*self._changes, "of their bits are used " + ", ".join(f"{p} by {n} experts" for p, n in counts.items() if n))

    def made_from(self, checkpoint: Checkpoint, layout: Layout) -> None:
        """Raises CheckpointError when the experts are of other weights than the checkpoint's, whose headers may be the same."""
        if sample(checkpoint, layout) != self._sample:
            raise CheckpointError(
                f"the packed experts in {self.folder} have other weights than {checkpoint.path}, in the same shapes",
                expected="experts packed from this checkpoint as it is now",
                fix="pack them again with `moestro apply`",
            )

    def check(self) -> None:
        try:
            stat = self.file.stat()
        except OSError as error:
            raise CheckpointError(
                f"the packed experts' file {self.file} cannot be opened: {error}", fix="pack them again with `moestro apply`"
            ) from error
        now = (stat.st_size, stat.st_mtime_ns)
        if stat.st_size != self._size or (self._stamp or now) != now:
            raise CheckpointError(
                f"{self.file} has changed since it was packed or opened: it has {stat.st_size} bytes",
                expected=f"{self._size} bytes and no change while it is in use",
                fix="pack the experts again with `moestro apply`",
            )
        self._stamp = now

    def attach(self, reader: Reader) -> None:
        self._index = reader.add(self.file)

    def reads(self, key: ExpertKey, slot: np.ndarray) -> list[Read]:
        nbytes = self._uses[key.layer][key.expert].nbytes
        return [Read(self._index, self.places[key.layer][key.expert][0], nbytes, slot[:nbytes])]

    def finish(self, key: ExpertKey, slot: np.ndarray, made: Views | None = None) -> ExpertView:
        use = self._uses[key.layer][key.expert]
        if key not in self._checked:
            crcs = self.places[key.layer][key.expert][1]
            pieces = zip((0, *use.record.sizes), use.record.sizes, crcs, strict=False)
            if any(crc32(slot[a:b]) != crc for a, b, crc in pieces if b <= use.nbytes):
                raise CheckpointError(
                    f"MoE layer {key.layer}, expert {key.expert}: its record in {self.file} is damaged",
                    expected="the bytes that were packed",
                    fix="pack the experts again with `moestro apply`",
                )
            self._checked.add(key)
        if made is None:
            return use.record.view(slot, use.planes)
        return made.get(use.form) or made.setdefault(use.form, use.record.view(slot, use.planes))


def changes_of(codecs: Iterable[Codec], stored: Sequence[str], name: str) -> tuple[str, ...]:
    """What experts lose in these codecs, in words. stored: the checkpoint's formats, one for each codec. name: of the codec asked for."""
    pairs = list(zip(codecs, stored, strict=True))
    out = [] if all(keeps_weights(codec, form) for codec, form in pairs) else [f"experts are kept as {name}"]
    return (*out, ROUNDED) if any(codec.tiled for codec, _ in pairs) else tuple(out)


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a packed folder. Raises CheckpointError."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["moestro_experts"] != FORMAT:
            raise ValueError(f"it has format {header['moestro_experts']}, this version reads {FORMAT}")
        if missing := {"fingerprint", "sample", "codec", "changes", "codecs", "records", "file", "size", "trunk"} - set(header):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} does not hold packed experts: {error}",
            expected=f"a folder written by `moestro apply`, with {HEADER}",
            fix="pack them again with `moestro apply`",
        ) from error
    return header


def sample(checkpoint: Checkpoint, layout: Layout) -> int:
    """A digest of a few of the experts' bytes: two models of one shape share every header, but not their weights. Raises CheckpointError."""
    crc, piece = 0, np.empty(SAMPLED, np.uint8)
    for layer in layout.facts.layers:
        for e in range(0, layer.num_experts, max(1, layer.num_experts // 4)):
            for part in layout.parts(ExpertKey(layer.ordinal, e)):
                some = piece[: min(SAMPLED, part.nbytes)]
                checkpoint.read_range(part.file, part.offset, some)
                crc = crc32(some, crc)
    return crc


def arrived(reader: Reader, ticket: int, key: ExpertKey) -> None:
    """Wait for the reads of one expert. Raises CheckpointError when they failed."""
    try:
        reader.wait(ticket)
    except (OSError, EOFError) as error:
        raise CheckpointError(
            f"MoE layer {key.layer}, expert {key.expert} cannot be read: {error}",
            expected="files that stay whole while they are in use",
            fix="check the disk and the file, and start again",
        ) from error


def load(store: ExpertStore, reader: Reader, key: ExpertKey) -> tuple[ExpertView, np.ndarray]:
    """One expert read now into a slot of its own: (view, slot). Keep the slot as long as the view is used."""
    slot = aligned(store.slot_bytes)
    arrived(reader, reader.submit(store.reads(key, slot)), key)
    return store.finish(key, slot), slot
