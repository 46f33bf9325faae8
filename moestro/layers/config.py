"""`MoEConfig`: everything that builds a model, as plain data with a JSON round trip. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro.core.errors import InputError
from moestro.core.method import card_of, load


@dataclass(frozen=True, slots=True)
class Part:
    """A method by name, with options. In JSON: "name", or {"name": "name", "option": value, ...}."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Part:
        """Read what JSON or a caller gave. Raises InputError."""
        if isinstance(value, Part):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], {k: v for k, v in value.items() if k != "name"})
        raise InputError(f"{value!r} does not name a method", expected='"name" or {"name": "name", "option": value}')

    def to_json(self) -> Any:
        return {"name": self.name, **self.options} if self.options else self.name

    def make(self, kind: str, *args: Any) -> Any:
        """Call the method of this kind and name. Raises InputError for an unknown name or option."""
        factory = load(self.name, kind)
        known = {option.name for option in card_of(factory).options}
        for option in self.options:
            if option not in known:
                raise InputError(
                    f"{self.name} has no option {option!r}",
                    expected=", ".join(sorted(known)) or "no options",
                    fix="correct the name",
                )
        return factory(*args, **self.options)


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """A small modern decoder with MoE layers. Widths in numbers of units; 0 means the default named beside it.

    vocabulary, d_model, layers (decoder layers), heads, kv_heads (0: heads), d_head (0: d_model / heads), context, rope_theta,
    norm_eps, qk_norm ('none', 'head': each head on its own, 'full': all heads together), tied (head = embedding).
    num_experts E, top_k K, d_expert F, activation, gated, bias: the routed experts. d_shared: width of an always-on expert (0: none);
    shared_gate: times a sigmoid gate. dense_layers: decoder layers with a dense feed-forward of width d_dense (0: as wide as what
    a token meets in an MoE layer).
    experts, router, mixer, block, architecture: methods by name. special: further experts, whose ids follow the E routed ones.
    losses and taps: added to what the router brings. init_std, seed: of the initial weights.
    """

    vocabulary: int = 256
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    d_head: int = 0
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: str = "none"
    tied: bool = False
    num_experts: int = 8
    top_k: int = 2
    d_expert: int = 128
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    d_shared: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    d_dense: int = 0
    experts: Part = Part("stacked")
    router: Part = Part("topk")
    mixer: Part = Part("attention")
    block: Part = Part("routed")
    architecture: Part = Part("decoder")
    special: tuple[Part, ...] = ()
    losses: tuple[Part, ...] = ()
    taps: tuple[Part, ...] = ()
    init_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("experts", "router", "mixer", "block", "architecture"):
            object.__setattr__(self, name, Part.of(getattr(self, name)))
        for name in ("special", "losses", "taps"):
            object.__setattr__(self, name, tuple(Part.of(part) for part in getattr(self, name)))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        self._check()

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> MoEConfig:
        """Read a mapping or a JSON text. Raises InputError for what cannot be read, unknown keys and values that cannot be."""
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except ValueError as error:
                raise InputError(f"not JSON: {error}", expected="a model configuration") from error
        if not isinstance(data, Mapping):
            raise InputError(f"a configuration of type {type(data).__name__}", expected="a JSON object")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                raise InputError(f"a model has no setting {key!r}", expected="one of " + ", ".join(fields))
        for key, value in data.items():
            _check_type(key, value, str(fields[key].type))
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back to an equal configuration."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def dense_width(self) -> int:
        return self.d_dense or self.top_k * self.d_expert + self.d_shared

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that have experts."""
        return tuple(i for i in range(self.layers) if i not in self.dense_layers)

    def _check(self) -> None:
        for name in ("vocabulary", "d_model", "layers", "heads", "context", "num_experts", "top_k", "d_expert"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "at least 1")
        _require(
            self.top_k <= self.num_experts or bool(self.special),
            f"top_k {self.top_k} with num_experts {self.num_experts}",
            "no more slots than experts",
        )
        _require(
            bool(self.d_head) or self.d_model % self.heads == 0, f"{self.heads} heads in d_model {self.d_model}", "a divisor"
        )
        _require(self.heads % self.key_heads == 0, f"{self.heads} heads over {self.key_heads} key heads", "a multiple")
        _require(self.head_width % 2 == 0, f"heads of width {self.head_width}", "an even width, for rotary positions")
        _require(self.qk_norm in ("none", "head", "full"), f"qk_norm {self.qk_norm!r}", "none, head or full")
        for i in self.dense_layers:
            _require(0 <= i < self.layers, f"dense layer {i} of {self.layers}", f"0 to {self.layers - 1}")


def _require(holds: bool, found: str, expected: str) -> None:
    if not holds:
        raise InputError(found, expected=expected, fix="correct the model's configuration")


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _check_type(key: str, value: Any, annotation: str) -> None:
    wanted = {"int": int, "float": (int, float), "str": str, "bool": bool}.get(annotation)
    if annotation.startswith("tuple"):
        wanted = (list, tuple)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and annotation != "bool")):
        raise InputError(f"{key} is {value!r}", expected=f"a value of type {annotation}")
