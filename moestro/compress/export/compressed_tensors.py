"""compressed-tensors: the format of quantised checkpoints that vLLM and transformers load, from a coded checkpoint, with the same numbers.

Paper      none; https://github.com/vllm-project/compressed-tensors, read as version 0.20 writes it
Idea       A coded matrix holds whole numbers and scales; so does a compressed one. Only their order in the file differs.
Rule       int8:G, int4:G: pack-quantized: weight_packed int32 [R, C bits / 32] of v + 2^(bits - 1), the first in the lowest bits,
           weight_scale float16 [R, C / G], weight_shape int64 [2];  mxfp4: mxfp4-pack-quantized: weight_packed uint8 [R, C / 2],
           the first in the low nibble, weight_scale uint8 [R, C / 32]
Needs      a coded checkpoint
Gives      a folder with per-expert names; config.json with the groups and every module that is left alone
Departs    nothing; codecs that the format has no levels for (uint4, int3, int2, nested) are refused
Checked    the library reads every tensor back as the number that the tiles stand for
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from moestro.compress.dropping import lost_tensors, pattern_of, predicts
from moestro.core.errors import CoverageError, InputError
from moestro.core.method import method
from moestro.kernels.ffn import MXFP4_VALUES
from moestro.kernels.packed import BLOCK, Packed, whole_numbers
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import is_coded, read_coded
from moestro.models.codecs.encode import parse_codec
from moestro.models.families import describe
from moestro.models.families.resize import without_predictions
from moestro.models.writer import CheckpointWriter, check_room

BITS = {"int8": 8, "int4": 4}
FORMATS = {"int8": "pack-quantized", "int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized"}


@method("compress.export.compressed_tensors", kind="export", fidelity="exact")
def compressed_tensors(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_plain: Iterable[str] = (),
    dropped: Iterable[str] = (),
) -> Checkpoint:
    """Write the folder `out` and open it. allow_plain: patterns, or ends of the names, of weights that may stay plain, such as 'lm_head.weight'.

    dropped: patterns of tensors that the model does not load and that are left out.

    Routers, norms and embeddings are always plain in this format. Raises InputError for codecs without a form here,
    CoverageError for other matrices that are plain and not named, StorageError.
    """
    coded = {name: ref.dtype for name, ref in checkpoint.tensors.items() if is_coded(ref.dtype)}
    _refuse(checkpoint, coded)
    allowed, layout = tuple(allow_plain), describe(checkpoint)
    lost = lost_tensors(dropped, layout)
    tensors = {name: ref for name, ref in checkpoint.tensors.items() if name not in lost}
    plain = [
        name
        for name, ref in tensors.items()
        if name not in coded and len(ref.shape) == 2 and not _embedding(name) and not _chooses(name)
    ]
    if left := [n for n in plain if not any(n.endswith(given) or fnmatch(n, given) for given in allowed)]:
        whole = pattern_of(left[0])
        raise CoverageError(
            f"{len(left)} matrices are not quantised, such as {left[0]}",
            expected="all of them, or leave to keep them as they are",
            fix=f"leave out what the model does not load: --drop '{whole}', or allow it: --allow-plain '{whole}'"
            if left[0] in layout.ignored
            else f"allow it: --allow-plain {_ending(left[0])}",
        )
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if any(predicts(name, layout.facts) for name in lost):
        config = without_predictions(config)
    ignored = [
        n.removesuffix(".weight")
        for n, ref in tensors.items()
        if n.endswith(".weight") and len(ref.shape) == 2 and n not in coded and not _embedding(n)
    ]
    if layout.facts.tied_embeddings:
        ignored.append("lm_head")  # readers make a module of it, whose numbers are the embedding's
    check_room(out, sum(ref.nbytes for ref in tensors.values()))
    with CheckpointWriter(out, config | {"quantization_config": described(coded, ignored)}, overwrite=overwrite) as writer:
        for name in sorted(tensors, key=lambda n: (tensors[n].file, tensors[n].offset)):
            if name not in coded:
                writer.copy(name, checkpoint)
                continue
            for ending, (array, dtype) in parts_of(read_coded(checkpoint, name)).items():
                writer.add(f"{name.removesuffix('weight')}{ending}", array, dtype)
        checkpoint.unchanged()
        return writer.finish(copy_files_from=checkpoint)


def _ending(name: str) -> str:
    """What a tensor is called in every layer, or its whole name outside of them."""
    before, _, inside = name.rpartition("layers.")
    return inside.partition(".")[2] if before or name.startswith("layers.") else name


def parts_of(packed: Packed) -> dict[str, tuple[np.ndarray, str]]:
    """The tensors of one matrix, by the end of their name."""
    ((whole_RC, scale_RB),) = whole_numbers(packed)
    if packed.format == "mxfp4":
        nibbles_RC = nibbles_of(whole_RC)
        exponent_RB = (np.rint(np.log2(scale_RB)) + 128).astype(np.uint8)  # the multiplier is half of the scale
        return {"weight_packed": (nibbles_RC[:, 0::2] | nibbles_RC[:, 1::2] << 4, "U8"), "weight_scale": (exponent_RB, "U8")}
    bits = BITS[packed.format]
    u_RC = (whole_RC + (1 << (bits - 1))).astype(np.uint8)
    bytes_RC = u_RC if bits == 8 else u_RC[:, 0::2] | u_RC[:, 1::2] << 4
    scale_RG = scale_RB[:, :: packed.group // BLOCK].astype(np.float16)
    return {
        "weight_packed": (np.ascontiguousarray(bytes_RC).view("<i4"), "I32"),
        "weight_scale": (np.ascontiguousarray(scale_RG), "F16"),
        "weight_shape": (np.array(packed.shape, np.int64), "I64"),
    }


def nibbles_of(doubled_RC: np.ndarray) -> np.ndarray:
    """The E2M1 codes, uint8, of twice their values."""
    size_RC = np.searchsorted(2 * MXFP4_VALUES[:8], np.abs(doubled_RC))  # values rise with their code
    return (size_RC | np.where(doubled_RC < 0, 8, 0)).astype(np.uint8)


def described(coded: dict[str, str], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config`: a group for each codec, by the names of its modules where there are several."""
    codecs = list(dict.fromkeys(coded.values()))
    groups = {}
    for i, name in enumerate(codecs):
        codec = parse_codec(name)
        four = codec.format == "mxfp4"
        weights = {
            "num_bits": BITS.get(codec.format, 4), "type": "float" if four else "int", "symmetric": True, "strategy": "group",
            "group_size": codec.group, "dynamic": False, "observer": None,
        } | ({"scale_dtype": "torch.uint8"} if four else {})  # fmt: skip
        targets = ["Linear"] if len(codecs) == 1 else [n.removesuffix(".weight") for n, c in coded.items() if c == name]
        groups[f"group_{i}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
            "format": FORMATS[codec.format],
        }  # fmt: skip
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _refuse(checkpoint: Checkpoint, coded: dict[str, str]) -> None:
    if not coded:
        raise InputError(f"{checkpoint.path} is not a coded checkpoint", expected="one written by `moestro apply` with tiles")
    odd = sorted({codec for codec in coded.values() if parse_codec(codec).format not in FORMATS})
    if odd:
        raise InputError(
            f"compressed-tensors has no form for {', '.join(odd)}",
            expected="int8:G, int4:G or mxfp4",
            fix="encode with one of these",
        )
    if ends := [name for name in coded if _embedding(name)]:
        raise InputError(
            f"{ends[0]} is coded, and no reader takes quantised embeddings", fix="leave the embedding as it is stored"
        )


def _embedding(name: str) -> bool:
    return "embed" in name


def _chooses(name: str) -> bool:
    """Whether it is a router or the gate of shared experts."""
    return name.rpartition(".weight")[0].rpartition(".")[2] in ("gate", "router", "wg", "shared_expert_gate", "layer")
