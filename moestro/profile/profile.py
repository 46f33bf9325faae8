"""A profile: named statistics of a model on some texts, with what they were made of. One safetensors file; its trace is a file beside it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import InputError, ProfileError, StorageError
from moestro.core.layer import LayerFacts
from moestro.core.trace import Trace

FORMAT = 1
HEADER = "moestro_profile"


@dataclass(frozen=True, slots=True)
class Profile:
    """Statistics of one run.

    arrays: by name, the trailing capitals say the shape (L layers, E experts of the widest layer, K slots, G labels, ...); counts are
    integers, sums float64. model: fingerprint. layers: facts of each MoE layer as plain data (num_experts, top_k, ...).
    tokens_G: counted tokens of each label; characters_G: their characters, None for an unfinished run. data: digest of the texts.
    probes: names and options. trace: a sample, or None.
    """

    arrays: Mapping[str, np.ndarray]
    model: str
    family: str
    layers: tuple[dict[str, Any], ...]
    labels: tuple[str, ...]
    tokens_G: tuple[int, ...]
    characters_G: tuple[int, ...] | None
    data: str
    sources: tuple[dict[str, Any], ...]
    probes: Mapping[str, Mapping[str, Any]]
    trace: Trace | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Counted tokens."""
        return sum(self.tokens_G)

    @property
    def experts_L(self) -> np.ndarray:
        """E of each layer."""
        return np.array([layer["num_experts"] for layer in self.layers])

    @property
    def top_k_L(self) -> np.ndarray:
        """K of each layer."""
        return np.array([layer["top_k"] for layer in self.layers])

    def need(self, probe: str, name: str) -> np.ndarray:
        """A statistic. probe: the short name of the one that gives it. Raises ProfileError when the profile was made without it."""
        if name not in self.arrays:
            raise ProfileError(
                f"the profile holds no {name}",
                expected=f"a profile made with the probe {probe}",
                fix=f"moestro profile MODEL DATA --probe {probe}",
            )
        return self.arrays[name]

    def need_trace(self) -> Trace:
        """The sampled trace. Raises ProfileError when there is none."""
        if self.trace is None or not self.trace.tokens:
            raise ProfileError(
                "the profile has no trace",
                expected="the sampled trace, in a file beside it",
                fix="profile again without --trace-tokens 0, and keep the .trace file beside the profile",
            )
        return self.trace

    def label(self, name: str) -> int:
        """The number of a label. Raises InputError for an unknown one."""
        if name not in self.labels:
            raise InputError(f"the profile has no label {name!r}", expected="one of " + ", ".join(self.labels))
        return self.labels.index(name)

    def check_model(self, fingerprint: str) -> None:
        """Raises ProfileError when the profile is of another model."""
        if self.model != fingerprint:
            raise ProfileError(
                f"the profile was made with the model {self.model[:12]}, this is {fingerprint[:12]}",
                expected="a profile of this model",
                fix="moestro profile MODEL DATA -o PROFILE",
            )

    def save(self, path: str | Path) -> None:
        """Write the profile, and its trace to `trace_path(path)`. Raises StorageError."""
        path = Path(path)
        said = {name: getattr(self, name) for name in self.__slots__ if name not in ("arrays", "trace")}
        if self.trace is not None:
            self.trace.save(trace_path(path))
        said["trace_tokens"] = self.trace.tokens if self.trace is not None else 0
        write_arrays(path, dict(self.arrays), HEADER, {"format": FORMAT, **said})
        if self.trace is None:
            trace_path(path).unlink(missing_ok=True)  # of a profile that was here before

    @classmethod
    def open(cls, path: str | Path) -> Profile:
        """Read a profile and map its trace, if that is still beside it. Raises ProfileError, and TraceError for a broken trace."""
        path = Path(path)
        arrays, said = read_arrays(path, HEADER)
        if said.get("format") != FORMAT:
            raise ProfileError(f"{path} has format {said.get('format')}, this version reads {FORMAT}", fix="profile again")
        beside = trace_path(path)
        trace = Trace.open(beside) if said.get("trace_tokens") and beside.exists() else None
        if trace is not None and (trace.model != said["model"] or trace.info.get("data") != said["data"]):
            raise ProfileError(f"{beside} is not the trace of {path}", fix="profile again, or remove that file")
        try:
            tuples = {name: tuple(said[name]) for name in ("layers", "labels", "tokens_G", "sources")}
            characters = said["characters_G"]
            plain = {name: said[name] for name in ("model", "family", "data", "probes", "info")}
            return cls(
                arrays=arrays, trace=trace, characters_G=None if characters is None else tuple(characters), **tuples, **plain
            )
        except (KeyError, TypeError) as error:
            raise ProfileError(f"{path} lacks {error} in its header", fix="profile again") from error


def trace_path(profile: str | Path) -> Path:
    """Where the trace of a profile is."""
    return Path(f"{profile}.trace")


def layer_facts(layer: LayerFacts) -> dict[str, Any]:
    """What measures have to know of a layer, JSON-ready."""
    return {
        "index": layer.index,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "shared": layer.shared,
        "spec": asdict(layer.spec),
        "score": layer.router.score,
    }


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], header: str, said: Mapping[str, Any], what: str = "profile"
) -> None:
    """One safetensors file through a temporary name. Raises StorageError."""
    from safetensors.numpy import save

    temporary = path.with_name(path.name + ".writing")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        temporary.write_bytes(save(kept, metadata={header: json.dumps(said)}))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write the {what} {path}: {error}", fix="choose another place") from error


def read_arrays(path: Path, header: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Everything in a file of `write_arrays`. Raises ProfileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as f:
            said = json.loads((f.metadata() or {})[header])
            return {name: f.get_tensor(name) for name in f.keys()}, said  # noqa: SIM118
    except FileNotFoundError as error:
        raise ProfileError(
            f"there is no profile at {path}", fix="make one with `moestro profile MODEL DATA -o PROFILE`"
        ) from error
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise ProfileError(
            f"{path} is not a readable profile: {error}", expected="a file written by `moestro profile`", fix="profile again"
        ) from error


def is_profile(path: Path) -> bool:
    """Whether a file is a profile, finished or broken behind its header."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return f'"{HEADER}"'.encode() in f.read(min(length, 10_000_000))
