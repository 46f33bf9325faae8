"""Typed reading of a model's config.json, with the defaults of the transformers class for keys that a file may leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestro.core.errors import CheckpointError, UnsupportedModel

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Settings:
    """The text model's part of config.json. where: the file, for messages."""

    data: Mapping[str, Any]
    where: str

    @property
    def model_type(self) -> str:
        return str(self.data.get("model_type", ""))

    def value(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of `names` that is there and not null, else the default. Raises CheckpointError without one."""
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        if default is _REQUIRED:
            raise CheckpointError(
                f"{self.where} lacks {' or '.join(names)}", expected="the model's whole configuration", fix="download it again"
            )
        return default

    def integer(self, *names: str, default: Any = _REQUIRED) -> int:
        """A whole number. A list of equal numbers counts as that number. Raises CheckpointError, UnsupportedModel."""
        found = self.value(*names, default=default)
        if isinstance(found, list) and found:
            if any(item != found[0] for item in found):
                raise UnsupportedModel(
                    f"{names[0]} differs between layers: {found}", expected="one number for all layers", fix="use another model"
                )
            found = found[0]
        if isinstance(found, bool) or not isinstance(found, int):
            raise CheckpointError(f"{names[0]} in {self.where} is {found!r}", expected="a whole number")
        return found

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        found = self.value(name, default=default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise CheckpointError(f"{name} in {self.where} is {found!r}", expected="a number")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.value(name, default=default))

    def layer_list(self, name: str) -> tuple[int, ...] | None:
        """Layer numbers, or None when the key is missing or null."""
        found = self.data.get(name)
        return None if found is None else tuple(int(i) for i in found)

    def activation(self) -> str:
        """The gate's activation by moestro's name. Raises UnsupportedModel."""
        name = self.value("hidden_act", default="silu")
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"the experts' activation is {name!r}", expected=", ".join(ACTIVATIONS))
        return ACTIVATIONS[name]

    def kv_heads(self, default: int | None = None) -> int:
        """Key/value heads; missing: the class default if it has one; null: as many as query heads."""
        if default is not None and "num_key_value_heads" not in self.data:
            return default
        return self.integer("num_key_value_heads", default=self.data.get("num_attention_heads"))

    def head_dim(self, default: int | None = None) -> int:
        """Width of a head; missing: the class default if it has one; null: model width over query heads."""
        if default is not None and "head_dim" not in self.data:
            return default
        return self.integer("head_dim", default=self.integer("hidden_size") // self.integer("num_attention_heads"))


def plain(data: Any) -> Any:
    """The data with transformers' {"__float__": "Infinity"} replaced by the number."""
    if isinstance(data, dict):
        if set(data) == {"__float__"} and data["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(data["__float__"])
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, list) else data
