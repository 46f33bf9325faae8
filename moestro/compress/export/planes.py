"""Low planes: a nested model's matrices in their first two or three bits, as a model of its own.

Paper      Wang et al. 2025, arXiv 2504.15299 (D2MoE)
Idea       The bytes of fewer bits lie at the beginning of the bytes of more, and are a model by themselves.
Rule       of every matrix in nested:G the parts of the first `bits` planes, as nested:G/bits; all other tensors as they are
Needs      a coded checkpoint with matrices in nested:G
Gives      a folder of the same family
Departs    nothing
Checked    every matrix is what the first planes of the original stand for; every other tensor is the original's
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from moestro.compress.record import MANIFEST, save
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.plans.compression import CompressionPlan
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import coded_bytes, describe, is_coded
from moestro.models.codecs.encode import PLANES, parse_codec
from moestro.models.families import describe as layout_of
from moestro.models.writer import CheckpointWriter, check_room


@method("compress.export.planes", kind="export", paper="2504.15299", fidelity="exact")
def planes(checkpoint: Checkpoint, out: str | Path, *, bits: int = 2) -> Checkpoint:
    """Write the folder `out` and open it. Raises InputError for a model without more nested planes than that, StorageError."""
    coded = {name: (ref.dtype, (ref.shape[0], ref.shape[1])) for name, ref in checkpoint.tensors.items() if is_coded(ref.dtype)}
    fewer = {codec: _cut(codec, bits) for codec, _ in coded.values()}
    if bits not in PLANES[:-1] or all(old == new for old, new in fewer.items()):
        raise InputError(
            f"{checkpoint.path} has no matrices in nested of more than {bits} bits",
            expected=f"a model made with a codec such as nested:64, and {' or '.join(map(str, PLANES[:-1]))} bits",
            fix="moestro plan bits MODEL --codec nested:64 ..., and moestro apply",
        )
    made = {name: (fewer[codec], shape) for name, (codec, shape) in coded.items()}
    sizes = {name: coded_bytes(*found) for name, found in made.items()}
    changes = [_words(text, fewer) for text in checkpoint.config["quantization_config"].get("changes", ())]
    config = dict(checkpoint.config) | {"quantization_config": describe(made, changes)}
    check_room(out, checkpoint.nbytes - sum(checkpoint.tensors[name].nbytes - size for name, size in sizes.items()))
    with CheckpointWriter(out, config) as writer:
        for name in sorted(checkpoint.tensors, key=lambda n: (checkpoint.tensors[n].file, checkpoint.tensors[n].offset)):
            if name not in made or made[name] == coded[name]:
                writer.copy(name, checkpoint)
                continue
            ref, raw = checkpoint.tensors[name], np.empty(sizes[name], np.uint8)
            checkpoint.read_range(ref.file, ref.offset, raw)
            writer.stream(name, "U8", (raw.size,), [raw])
        checkpoint.unchanged()
        trunk = set(layout_of(checkpoint).trunk)
        saved = sum(checkpoint.tensors[name].nbytes - size for name, size in sizes.items() if name not in trunk)
        _record(checkpoint, writer.partial, fewer, saved)
        return writer.finish(copy_files_from=checkpoint)


def _cut(codec: str, bits: int) -> str:
    made = parse_codec(codec)
    return made._replace(planes=min(made.planes, bits)).name if made.format == "nested" else codec


def _words(text: str, fewer: dict[str, str]) -> str:
    """A change in words, with the new codec's name."""
    return " ".join(fewer.get(word, word) for word in text.split(" "))


def _record(checkpoint: Checkpoint, folder: Path, fewer: dict[str, str], saved: int) -> None:
    """The plan that made the model, with the fewer planes; what was measured of more of them is left out. saved: bytes of experts."""
    if not (checkpoint.path / MANIFEST).exists():
        return
    record = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    plan = CompressionPlan.from_json(record["plan"])
    encodings = tuple(replace(e, codec=fewer.get(e.codec, e.codec)) for e in plan.encodings)
    said = (
        *plan.stated,
        "of nested weights the first planes alone were taken: " + ", ".join(sorted(set(fewer.values()) - set(fewer))),
    )
    save(
        folder,
        record
        | {
            "plan": replace(
                plan, encodings=encodings, stated=said, judged=(), sizes=(plan.sizes[0], plan.sizes[1] - saved)
            ).to_json()
        },
    )
