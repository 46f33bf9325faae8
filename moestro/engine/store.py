"""Where experts come from: an `ExpertStore` says which bytes to read into a slot and turns a filled slot into a runnable expert.

`SourceStore` reads the original safetensors files; `PackedStore` reads what `engine.pack` wrote. A slot is `slot_bytes` of
page-aligned memory. Direct reads need aligned offsets, so a byte range lands in its slot at the same place within a page as in
the file, and the expert's matrices are views at that place: nothing is copied.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import ModelFacts
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.kernels.reader import Read, Reader, aligned
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import parse_codec
from moestro.models.codecs.packed import Record
from moestro.models.codecs.source import stored_format, view
from moestro.models.layout import Layout, Part

PAGE = 4096
HEADER = "experts.json"
FORMAT = 1
SAMPLED = 512  # bytes of each part that `sample` looks at


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


Views = dict[int, ExpertView]


@runtime_checkable
class ExpertStore(Protocol):
    """The experts of a model on disk.

    slot_bytes: page-aligned size that holds any one of them. extra_bytes: what the store itself keeps in memory.
    codec: 'stored' when the bytes are the checkpoint's own. lossy: the values are not the checkpoint's.
    """

    @property
    def slot_bytes(self) -> int: ...

    @property
    def extra_bytes(self) -> int: ...

    @property
    def codec(self) -> str: ...

    @property
    def lossy(self) -> bool: ...

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


def broken(matrix: Matrix) -> bool:
    """Whether a matrix holds a NaN or an infinity, judged on its bits."""
    if matrix.format == "mxfp4":
        assert matrix.scales is not None
        return bool((matrix.scales == 255).any())
    if matrix.format in ("int8", "int4"):
        assert matrix.scales is not None
        return not np.isfinite(matrix.scales).all()
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
    lossy = False

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


class PackedStore:
    """Experts of a packed folder: one aligned record each, read at once.

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
        self.codec, self.lossy = str(header["codec"]), bool(header["lossy"])
        self.records = [Record.of(la.spec, parse_codec(name)) for la, name in zip(facts.layers, header["layers"], strict=True)]
        self._forms = [self.records.index(record) for record in self.records]
        self.places = [[(int(at), int(crc)) for at, crc in layer] for layer in header["records"]]
        self.file = self.folder / header["file"]
        self.slot_bytes = max(record.nbytes for record in self.records)
        self.extra_bytes = 0
        self._size, self._sample = int(header["size"]), int(header["sample"])
        self._stamp: tuple[int, int] | None = None
        self._checked: set[ExpertKey] = set()
        self._index = -1
        self.check()

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
        nbytes = self.records[key.layer].nbytes
        return [Read(self._index, self.places[key.layer][key.expert][0], nbytes, slot[:nbytes])]

    def finish(self, key: ExpertKey, slot: np.ndarray, made: Views | None = None) -> ExpertView:
        record = self.records[key.layer]
        if key not in self._checked:
            if zlib.crc32(slot[: record.nbytes].data) != self.places[key.layer][key.expert][1]:
                raise CheckpointError(
                    f"MoE layer {key.layer}, expert {key.expert}: its record in {self.file} is damaged",
                    expected="the bytes that were packed",
                    fix="pack the experts again with `moestro apply`",
                )
            self._checked.add(key)
        if made is None:
            return record.view(slot)
        form = self._forms[key.layer]
        return made.get(form) or made.setdefault(form, record.view(slot))


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a packed folder. Raises CheckpointError."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["moestro_experts"] != FORMAT:
            raise ValueError(f"it has format {header['moestro_experts']}, this version reads {FORMAT}")
        if missing := {"fingerprint", "sample", "codec", "lossy", "layers", "records", "file", "size"} - set(header):
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
                crc = zlib.crc32(some.data, crc)
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
