"""What the methods that give bits are told: how often experts are used, and what each number of bits would do to them.

Shapes: L MoE layers, E experts (the most of any layer), W widths, the fewest bytes first, n tokens, F expert width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moestro.compress.calibration import Calibration, LayerInputs
from moestro.compress.encode.inputs import hidden
from moestro.compress.encoding import MATRICES, encoded, plain
from moestro.core.errors import InputError, ProfileError
from moestro.core.experts import ExpertKey, ExpertSpec, ExpertWeights
from moestro.core.method import card_of, load
from moestro.core.plans.compression import Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import coded_bytes
from moestro.models.experts import read_expert
from moestro.models.layout import Layout
from moestro.profile.profile import Profile, read_arrays, write_arrays

HEADER, FORMAT = "moestro.evidence", 1
SAMPLE = 65536  # bytes of a matrix
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BitsEvidence:
    """Of layers with fewer experts than others the rest is 0, and `there_LE` is False.

    counts_LE: tokens routed to an expert. weights_LE: the sum of their combine weights. output_LEW: Frobenius norm of the change of the
    layer's output when the expert alone has that width. matrix_LEW: of the change of its weights. outlier_LE: the largest ratio of a
    column's largest to its mean size in any of its matrices. bytes_LW: of one expert in each width. energy_L: Frobenius norm of what the
    experts, each alone, add on the kept tokens. turned_L: mean of 1 - cosine of the residual stream before and after the experts;
    share_L: size of what they add, in the stream's own size; None when the profile was made without the probe residual.
    """

    there_LE: np.ndarray
    counts_LE: np.ndarray
    weights_LE: np.ndarray
    output_LEW: np.ndarray
    matrix_LEW: np.ndarray
    outlier_LE: np.ndarray
    bytes_LW: np.ndarray
    energy_L: np.ndarray | None = None
    turned_L: np.ndarray | None = None
    share_L: np.ndarray | None = None

    def spent(self, widths_LE: np.ndarray) -> int:
        """Bytes of all experts."""
        each_LE = np.take_along_axis(self.bytes_LW, widths_LE, axis=1)
        return int(each_LE[self.there_LE].sum())

    def worth(self) -> np.ndarray:
        """worth_L: what an error of a layer's output is multiplied with so that layers compare."""
        size_L = self.output_LEW[..., 0].sum(1) if self.energy_L is None else self.energy_L
        return (1.0 if self.share_L is None else self.share_L) / np.maximum(size_L, 1e-30)

    def check(self, budget: int) -> None:
        """Raises InputError for a budget in bytes that the fewest bits do not meet."""
        least = self.spent(np.zeros(self.there_LE.shape, np.int64))
        if budget < least:
            raise InputError(
                f"{budget} bytes are too few for the experts",
                expected=f"at least {least} with the fewest bits",
                fix="offer fewer bits",
            )


@dataclass(frozen=True, slots=True)
class EvidenceFile:
    """Where evidence is kept after every layer: what was stopped goes on, and other numbers of bits are chosen without measuring again.

    told: what it is evidence of.
    """

    path: Path
    told: Mapping[str, Any]

    def read(self) -> dict[str, np.ndarray]:
        """Its arrays, none when there is no file yet. Raises InputError for a file of anything else."""
        if not self.path.exists():
            return {}
        fix = "name another file, or remove this one"
        try:
            arrays, told = read_arrays(self.path, HEADER)
        except ProfileError as error:
            raise InputError(f"{self.path} holds no evidence of bits", fix=fix) from error
        mine = json.loads(json.dumps({"format": FORMAT, **self.told}))
        if other := sorted(key for key in mine.keys() | told.keys() if mine.get(key) != told.get(key)):
            key = other[0]
            raise InputError(
                f"{self.path} is evidence with {key} {told.get(key)!r}",
                expected=f"{key} {mine.get(key)!r}, as is asked now",
                fix=fix,
            )
        return arrays

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises StorageError."""
        write_arrays(self.path, arrays, HEADER, {"format": FORMAT, **self.told}, "evidence")


def measure(
    checkpoint: Checkpoint,
    layout: Layout,
    given: Calibration,
    codecs: Sequence[str],
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    kept: EvidenceFile | None = None,
    progress: Progress | None = None,
) -> BitsEvidence:
    """Encode every expert in every width, and see. codecs: the widths, the fewest bytes first. method: of kind 'encode'. kept: go on
    from there.

    Raises InputError for widths that are not in this order and for a file of other evidence, ProfileError when the profile kept no inputs.
    """
    layers, fn = layout.facts.layers, load(method, "encode")
    shape = len(layers), max(la.num_experts for la in layers)
    bytes_LW = np.array([[expert_size(la.spec, codec) for codec in codecs] for la in layers])
    if (np.diff(bytes_LW, axis=1) <= 0).any():
        raise InputError(f"the widths {', '.join(codecs)} do not take more and more bytes", fix="name the fewest bits first")
    found = {
        "there_LE": np.zeros(shape, bool),
        "counts_LE": np.zeros(shape, np.int64),
        "weights_LE": np.zeros(shape),
        "output_LEW": np.zeros((*shape, len(codecs))),
        "matrix_LEW": np.zeros((*shape, len(codecs))),
        "outlier_LE": np.zeros(shape),
        "energy_L": np.zeros(len(layers)),
        "done_L": np.zeros(len(layers), bool),
    } | (kept.read() if kept else {})
    needs = "inputs" in card_of(fn).needs
    for la in layers:
        for e in range(la.num_experts) if not found["done_L"][la.ordinal] else ():
            seen, at = given.layer(la.ordinal), (la.ordinal, e)
            weights = read_expert(checkpoint, layout, ExpertKey(*at))
            matrices = {role: a for role, name in MATRICES.items() if (a := getattr(weights, name)) is not None}
            found["there_LE"][at], found["counts_LE"][at], found["weights_LE"][at] = (
                True,
                len(seen.own((e,))),
                seen.weight(e).sum(),
            )
            found["outlier_LE"][at] = max(outliers(matrix) for matrix in matrices.values())
            inputs = given(la.ordinal, Slot((e,))) if needs else None
            whole_nD = output(seen, e, la.spec, weights)
            found["energy_L"][la.ordinal] += float(np.square(whole_nD).sum())
            for w, codec in enumerate(codecs):
                one = partial(fn, codec=codec, **(options or {}))
                tiles = encoded(weights, inputs, one, True) if inputs else {r: one(m) for r, m in matrices.items()}
                made = {r: plain(tiles[r]) for r in matrices}
                found["matrix_LEW"][(*at, w)] = np.sqrt(sum(float(np.square(made[r] - matrices[r]).sum()) for r in made))
                other = replace(weights, **{MATRICES[r]: matrix for r, matrix in made.items()})
                found["output_LEW"][(*at, w)] = np.linalg.norm(output(seen, e, la.spec, other) - whole_nD)
        if kept and not found["done_L"][la.ordinal]:
            kept.write(found | {"done_L": np.arange(len(layers)) <= la.ordinal})
        if progress:
            progress(la.ordinal + 1, len(layers))
    del found["done_L"]
    energy_L = np.sqrt(found.pop("energy_L"))
    return BitsEvidence(**found, bytes_LW=bytes_LW, energy_L=energy_L, **given.stream())


def sampled(checkpoint: Checkpoint, layout: Layout, profile: Profile) -> str:
    """A digest of some bytes of each layer's first expert and of some kept inputs: of another training it differs, though all shapes agree."""
    digest = hashlib.sha256(np.ascontiguousarray(profile.arrays["kept_x_LND"][:, ::64]).tobytes())
    for la in layout.facts.layers:
        for part in layout.parts(ExpertKey(la.ordinal, 0)):
            raw = np.empty(min(part.nbytes, SAMPLE), np.uint8)
            checkpoint.read_range(part.file, part.offset, raw)
            digest.update(raw.tobytes())
    return digest.hexdigest()


def output(seen: LayerInputs, expert: int, spec: ExpertSpec, weights: ExpertWeights) -> np.ndarray:
    """What an expert adds to the layer's output for its own kept tokens, float32 [n, D]; a bias of the last projection left out."""
    gate_n1 = seen.weight(expert)[:, None]
    x_nD = seen.x_nD[seen.own((expert,))] * (gate_n1 if spec.weigh_input else np.float32(1))
    y_nD = hidden(x_nD, weights, spec) @ weights.down_DF.T
    return y_nD if spec.weigh_input else y_nD * gate_n1


def outliers(w_RC: np.ndarray) -> float:
    """The outlier-aware score of arXiv 2406.08155: the largest ratio, over columns, of the largest to the mean size in the column."""
    size_RC = np.abs(w_RC)
    mean_C = size_RC.mean(0)
    return float(np.divide(size_RC.max(0), mean_C, out=np.ones_like(mean_C), where=mean_C > 0).max())


def expert_size(spec: ExpertSpec, codec: str) -> int:
    """Bytes of one expert's matrices in a codec."""
    inner = coded_bytes(codec, (spec.d_expert, spec.d_model))
    return inner * (2 if spec.gated else 1) + coded_bytes(codec, (spec.d_model, spec.d_expert))
