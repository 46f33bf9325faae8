"""`TrainConfig`: everything that decides a training run, as plain data with a JSON round trip. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig, Part

CHANGEABLE = (
    "steps",
    "evaluate_every",
    "save_every",
    "keep",
    "log_every",
)  # without touching the numbers of the steps already done
PRECISIONS = ("float32", "bfloat16")
RATES = ("cosine", "wsd", "constant")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Text and how it is cut.

    sources: `[DOMAIN=]WHERE` each, see `train.data.text.read`. text_field, domain_field: names in JSON lines and Parquet.
    tokenizer: 'bytes', or a folder or Hub id. length: inputs per sequence. holdout: share of each domain never trained on.
    weights: share of the training sequences by domain, {} by size. pure: every micro-batch is of one domain.
    mask_documents: attention, positions and what routers take for a sequence stay inside a document.
    """

    sources: tuple[str, ...] = ()
    text_field: str = "text"
    domain_field: str = ""
    tokenizer: str = "bytes"
    length: int = 128
    holdout: float = 0.05
    weights: Mapping[str, float] = field(default_factory=dict)
    pure: bool = False
    mask_documents: bool = False


@dataclass(frozen=True, slots=True)
class OptimiserConfig:
    """AdamW. decay applies to matrices only; clip is the largest norm of the whole gradient, 0 for no limit."""

    rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class RateConfig:
    """The learning rate over the run. shape: cosine, wsd (warm-up, stable, decay; arXiv 2404.06395) or constant.

    warmup: share of the steps in which it rises linearly. decay: share at the end in which wsd falls linearly. final: where it ends,
    as a share of the highest.
    """

    shape: str = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.1


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A training run.

    model: the architecture; its vocabulary and context may be left out, they then come from the data. batch: sequences per optimiser
    step, over all processes; micro_batch: sequences per forward pass (0: a process's whole part). precision: float32, or bfloat16 for
    autocast. objective: what is minimised; phases: what changes the model or its settings between steps. seed: of data order and
    of everything random in training (the model has its own). *_every: in steps; evaluate_every 0 evaluates at the ends only, save_every 0
    saves at the end only. evaluate_sequences: held-out sequences per domain. keep: checkpoints that stay.
    """

    model: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    steps: int = 1000
    batch: int = 16
    micro_batch: int = 0
    precision: str = "float32"
    objective: Part = field(default_factory=lambda: Part("next_token"))
    phases: tuple[Part, ...] = ()
    seed: int = 0
    evaluate_every: int = 0
    evaluate_sequences: int = 16
    save_every: int = 100
    keep: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "keep", "log_every", "evaluate_sequences"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "at least 1")
        for name in ("micro_batch", "seed", "evaluate_every", "save_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}", "0 or more")
        _require(self.precision in PRECISIONS, f"precision is {self.precision!r}", " or ".join(PRECISIONS))
        data, optimiser, rate = self.data, self.optimiser, self.rate
        _require(data.length >= 1, f"data.length is {data.length}", "at least 1")
        _require(0 <= data.holdout < 1, f"data.holdout is {data.holdout}", "a share below 1")
        _require(optimiser.rate > 0, f"optimiser.rate is {optimiser.rate}", "above 0")
        _require(
            len(optimiser.betas) == 2 and all(0 <= b < 1 for b in optimiser.betas),
            f"optimiser.betas is {optimiser.betas}",
            "two shares",
        )
        for name in ("eps", "decay", "clip"):
            _require(getattr(optimiser, name) >= 0, f"optimiser.{name} is {getattr(optimiser, name)}", "0 or more")
        _require(rate.shape in RATES, f"rate.shape is {rate.shape!r}", ", ".join(RATES))
        for name in ("warmup", "decay", "final"):
            _require(0 <= getattr(rate, name) <= 1, f"rate.{name} is {getattr(rate, name)}", "a share of 1")
        _require(
            rate.warmup + (rate.decay if rate.shape == "wsd" else 0) <= 1,
            "rate.warmup and rate.decay overlap",
            "1 in all at most",
        )
        _require(
            data.length <= self.model.context, f"data.length {data.length}", f"the model's context, {self.model.context}, at most"
        )

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read plain data. Raises InputError for unknown keys and values of the wrong type."""
        return _read(cls, data, "")

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back to an equal configuration."""
        return _plain(self)

    def micro(self, processes: int) -> tuple[int, int]:
        """(sequences per forward pass, forward passes per step and process). Raises InputError when the batch does not divide."""
        part, left = divmod(self.batch, processes)
        size = self.micro_batch or part
        if left or not part or part % size:
            raise InputError(
                f"a batch of {self.batch} over {processes} process{'es' * (processes > 1)} in micro-batches of {self.micro_batch or 'any size'}",
                expected="batch = processes x micro-batches x micro_batch",
                fix="--set batch=N or --set micro_batch=N",
            )
        return size, part // size


def read_config(source: str, settings: Iterable[str] = (), **given: Any) -> TrainConfig:
    """The configuration in a JSON file, or the recipe of that name, with `a.b=value` settings and keyword values put over it.

    given: dotted names with `.` written `__`, e.g. data__sources. Raises InputError.
    """
    path = Path(source).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    elif source in (names := recipes()):
        text = resources.files("moestro.train").joinpath("recipes", f"{source}.json").read_text(encoding="utf-8")
    else:
        raise InputError(
            f"there is no configuration {source}", expected=f"a JSON file, or one of {', '.join(names)}", fix=_near(source, names)
        )
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source} is not JSON: {error}", expected="a training configuration") from error
    return changed(data, settings, **given)


def changed(data: Any, settings: Iterable[str] = (), **given: Any) -> TrainConfig:
    """A configuration of plain data with settings put over it, as `read_config` does."""
    if not isinstance(data, dict):
        raise InputError(f"a configuration of type {type(data).__name__}", expected="a JSON object")
    usual = TrainConfig().to_json()
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"the setting {setting!r}", expected="NAME=VALUE, such as optimiser.rate=0.001")
        try:
            put = json.loads(value)
        except ValueError:
            put = value  # a text without quotes
        _put(data, name.split("."), put, usual)
    for name, value in given.items():
        if value is not None:
            _put(data, name.split("__"), value, usual)
    _complete(data)
    return TrainConfig.from_json(data)


def _complete(data: dict[str, Any]) -> None:
    """Take the model's vocabulary from the tokenizer and its context from the sequences' length where they are left out."""
    model, text = data.setdefault("model", {}), _read(DataConfig, data.get("data", {}), "data")
    if isinstance(model, dict):
        model.setdefault("context", text.length)
        if "vocabulary" not in model:
            from moestro.train.data.tokens import vocabulary_of

            model["vocabulary"] = vocabulary_of(text.tokenizer)


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("moestro.train").joinpath("recipes")
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Dotted names of the settings that differ, those that a resumed run may change left out."""
    return [name for name in _differences("", a.to_json(), b.to_json()) if name not in CHANGEABLE]


def _differences(at: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [name for key in sorted({*a, *b}) for name in _differences(f"{at}.{key}" if at else key, a.get(key), b.get(key))]
    return [] if a == b else [at]


def _put(data: dict[str, Any], names: list[str], value: Any, usual: Mapping[str, Any]) -> None:
    """Set data[a][b]... = value. usual: the defaults; where one is a method's name, its options can be set without naming it again."""
    for i, name in enumerate(names[:-1]):
        known = usual.get(name, {})
        inner = data.get(name, known if isinstance(known, str) else {})
        data[name] = {"name": inner} if isinstance(inner, str) else inner
        if not isinstance(data[name], dict):
            raise InputError(f"{'.'.join(names[: i + 1])} has no settings inside", expected="a name of the configuration")
        data, usual = data[name], known if isinstance(known, Mapping) else {}
    data[names[-1]] = value


def _read(cls: Any, data: Any, at: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{at or 'the configuration'} is {data!r}", expected="a JSON object")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise InputError(
                f"there is no setting {f'{at}.{key}' if at else key!s}",
                expected="one of " + ", ".join(names),
                fix=_near(str(key), names),
            )
    return cls(**{key: _value(hints[key], value, f"{at}.{key}" if at else key) for key, value in data.items()})


def _value(wanted: Any, value: Any, at: str) -> Any:
    """`value` as the type of a field. Raises InputError."""
    if wanted is MoEConfig:
        return MoEConfig.from_json(value)
    if wanted is Part:
        return Part.of(value)
    if dataclasses.is_dataclass(wanted):
        return _read(wanted, value, at)
    outer, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if outer is tuple and isinstance(value, list | tuple):
        return tuple(_value(inner[0], item, at) for item in value)
    if outer is not None and isinstance(outer, type) and issubclass(outer, Mapping) and isinstance(value, Mapping):
        return {str(k): _value(inner[1], v, f"{at}.{k}") for k, v in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and number:
        return float(value)
    if outer is None and not isinstance(wanted, types.UnionType) and type(value) is wanted:
        return value
    raise InputError(f"{at} is {value!r}", expected=getattr(wanted, "__name__", str(wanted)) if outer is None else str(wanted))


def _plain(value: Any) -> Any:
    if isinstance(value, MoEConfig | Part):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _require(holds: bool, found: str, expected: str) -> None:
    if not holds:
        raise InputError(found, expected=expected, fix="correct the configuration")
