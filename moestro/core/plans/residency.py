"""ResidencyPlan: what stays in memory, what is streamed, and what that should cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from moestro.core.errors import PlanError
from moestro.core.experts import ExpertKey
from moestro.core.layer import ModelFacts
from moestro.core.plan import Plan


@dataclass(frozen=True, slots=True)
class Memory:
    """How a budget is spent, in bytes. `experts` is slots x the size of a slot."""

    budget: int
    runtime: int
    trunk: int
    kv_cache: int
    buffers: int
    experts: int

    @property
    def total(self) -> int:
        return self.runtime + self.trunk + self.kv_cache + self.buffers + self.experts


@dataclass(frozen=True, slots=True)
class Forecast:
    """What decode should reach: a band of tokens/s, the hit rate and missed bytes per token it rests on, and the measured rates (bytes/s)."""

    tokens_per_second_low: float
    tokens_per_second_high: float
    hit_rate: float
    missed_bytes_per_token: float
    disk_rate: float
    memory_rate: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model with fewer bits does to a text, against the model as stored: perplexities and KL divergence in nats per token.

    error, kl_error: standard errors, of the logarithm of the perplexities' ratio and of the divergence.
    """

    tokens: int
    perplexity: float
    reference: float
    kl: float
    error: float
    kl_error: float

    @property
    def loss(self) -> float:
        """How much the perplexity grew, as a share."""
        return self.perplexity / self.reference - 1


@dataclass(frozen=True, slots=True)
class Precision:
    """How many bits each expert has.

    method: catalogue name of what chose. widths: codecs, the fewest bits first; experts_LE: for each expert an index into them.
    bound: what may be lost, such as 'ppl:1%'. chosen: measured on the text that it was chosen on; held_out: on text that it was not.
    """

    method: str
    widths: tuple[str, ...]
    experts_LE: tuple[tuple[int, ...], ...]
    bound: str = ""
    chosen: Measured | None = None
    held_out: Measured | None = None

    def width(self, key: ExpertKey) -> str:
        """The codec of one expert."""
        return self.widths[self.experts_LE[key.layer][key.expert]]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Precision:
        rows = tuple(tuple(int(i) for i in row) for row in data["experts_LE"])
        fields = {**data, "widths": tuple(data["widths"]), "experts_LE": rows}
        fields |= {name: Measured(**data[name]) for name in ("chosen", "held_out") if data.get(name)}
        return cls(**fields)

    def counts(self) -> list[int]:
        """How many experts have each width."""
        return [sum(row.count(i) for row in self.experts_LE) for i in range(len(self.widths))]

    def summary(self) -> str:
        """One line: how many experts have which width, what it may cost and what it costs."""
        counts = self.counts()
        text = "widths " + ", ".join(f"{n} experts {name}" for name, n in zip(self.widths, counts, strict=True) if n)
        if self.bound:
            text += f"; bound {self.bound}"
        for name, found in (("chosen on", self.chosen), ("held out", self.held_out)):
            if found is not None:
                text += f"; {name} {found.tokens} tokens: perplexity {found.perplexity:.3f}, stored {found.reference:.3f} ({100 * found.loss:+.2f} %, standard error {100 * found.error:.2f} %), KL {found.kl:.4f}"
        return text


@dataclass(frozen=True, kw_only=True)
class ResidencyPlan(Plan):
    """Which experts are kept where.

    slots: number of expert slots; with scope 'layer' one number per MoE layer, with 'global' a single shared one, with 'width' one
    number per width of `precision`, each slot as large as that width needs.
    pinned: experts never evicted. eviction, predictor: catalogue names with options. codec: how a packed store keeps
    experts ('stored' keeps the checkpoint's own bytes; 'mixed': each as `precision` says). precision: bits expert by expert, or
    None. context: tokens of KV cache; batch: sequences; chunk: tokens per prefill pass.
    trunk: 'native' (without torch) or 'transformers'. trunk_codec: how its matrices are kept; see models.native.weights.
    """

    kind: ClassVar[str] = "residency"
    memory: Memory
    scope: str
    slots: tuple[int, ...]
    eviction: str
    predictor: str
    eviction_options: dict[str, Any] = field(default_factory=dict)
    predictor_options: dict[str, Any] = field(default_factory=dict)
    pinned: tuple[ExpertKey, ...] = ()
    codec: str = "stored"
    dtype: str = "auto"
    context: int = 2048
    batch: int = 1
    chunk: int = 512
    prefetch: int = 0
    trunk: str = "transformers"
    trunk_codec: str = "stored"
    precision: Precision | None = None
    forecast: Forecast | None = None

    @classmethod
    def decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        data["memory"] = Memory(**data["memory"])
        data["slots"] = tuple(int(n) for n in data["slots"])
        for name in ("context", "batch", "chunk", "prefetch"):
            if not isinstance(data.get(name, 1), int):
                raise ValueError(f"{name} is {data[name]!r}, no whole number")
        data["pinned"] = tuple(ExpertKey(int(layer), int(e)) for layer, e in data.get("pinned", ()))
        if data.get("forecast") is not None:
            data["forecast"] = Forecast(**data["forecast"])
        if data.get("precision") is not None:
            data["precision"] = Precision.from_json(data["precision"])
        return data

    def check(self, facts: ModelFacts) -> None:
        """As Plan.check, and the slots must fit the model: enough for one token, no more than there are experts."""
        super().check(facts)
        if self.trunk not in ("native", "transformers"):
            raise PlanError(f"the trunk is {self.trunk!r}", expected="'native' or 'transformers'")
        if self.trunk_codec != "stored" and self.trunk != "native":
            raise PlanError(
                f"the {self.trunk} trunk is to be kept as {self.trunk_codec}", expected="the native trunk, or 'stored'"
            )
        for name in ("context", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}", expected="at least 1", fix="make the plan again")
        if self.scope not in ("global", "layer", "width"):
            raise PlanError(f"scope is {self.scope!r}", expected="'global', 'layer' or 'width'")
        self._check_precision(facts)
        total, need = sum(la.num_experts for la in facts.layers), [la.top_k for la in facts.layers]
        if self.scope == "global":
            if len(self.slots) != 1 or not max(need) <= self.slots[0] <= total:
                raise PlanError(f"slots are {list(self.slots)}", expected=f"one number from {max(need)} to {total}")
        elif self.scope == "width":
            held = [] if self.precision is None else self.precision.counts()
            if len(self.slots) != len(held) or any(not 1 <= n <= most for n, most in zip(self.slots, held)):
                raise PlanError(
                    f"slots per width are {list(self.slots)}", expected=f"for each width from 1 to its experts: {held}"
                )
        elif len(self.slots) != len(facts.layers) or any(
            not la.top_k <= n <= la.num_experts for n, la in zip(self.slots, facts.layers, strict=True)
        ):
            raise PlanError(
                f"slots per layer are {list(self.slots)}",
                expected=f"{len(facts.layers)} numbers, each from the layer's top-k to its number of experts",
            )
        for key in self.pinned:
            if not (0 <= key.layer < len(facts.layers) and 0 <= key.expert < facts.layers[key.layer].num_experts):
                raise PlanError(f"pinned expert {tuple(key)} does not exist in this model")

    def _check_precision(self, facts: ModelFacts) -> None:
        if self.precision is None:
            if self.codec == "mixed":
                raise PlanError("the codec is 'mixed' and no widths are given", expected="the width of each expert")
            return
        rows, widths = self.precision.experts_LE, range(len(self.precision.widths))
        if [len(row) for row in rows] != [la.num_experts for la in facts.layers]:
            raise PlanError("the plan's widths are not of this model's experts", expected="one for each expert of each layer")
        if any(i not in widths for row in rows for i in row):
            raise PlanError(
                f"an expert has a width that is none of {', '.join(self.precision.widths)}", fix="make the plan again"
            )

    def summary(self) -> str:
        m = self.memory
        gib = 1024**3
        lines = [
            f"budget {m.budget / gib:.2f} GiB: runtime {m.runtime / gib:.2f}, trunk {m.trunk / gib:.2f}, KV cache {m.kv_cache / gib:.2f}, "
            f"buffers {m.buffers / gib:.2f}, experts {m.experts / gib:.2f}",
            f"slots {sum(self.slots)} ({self.scope}), pinned {len(self.pinned)}, eviction {self.eviction}, predictor {self.predictor}, codec {self.codec}, {self.trunk} trunk"
            + (f" as {self.trunk_codec}" if self.trunk_codec != "stored" else ""),
        ]
        if self.precision is not None:
            lines.append(self.precision.summary())
        if f := self.forecast:
            lines.append(
                f"expected decode {f.tokens_per_second_low:.1f}-{f.tokens_per_second_high:.1f} tokens/s at {100 * f.hit_rate:.0f} % hits, "
                f"{f.missed_bytes_per_token / 1e6:.0f} MB read per token, disk {f.disk_rate / 1e9:.2f} GB/s"
            )
        return "\n".join(lines)
