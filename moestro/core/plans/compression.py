"""CompressionPlan: a smaller or cheaper version of one checkpoint: experts kept, merged, slimmed and encoded; routers edited to fit.

Ids: a `slot` is an expert of the new layer; sources are experts of the old one. Shapes: E old experts, F neurons of an expert.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from moestro.core.errors import PlanError
from moestro.core.experts import ExpertKey
from moestro.core.layer import LayerFacts, ModelFacts
from moestro.core.plan import Plan

STORED = "stored"


@dataclass(frozen=True, slots=True)
class Encoding:
    """One change of weights after keeping and merging. method: catalogue name; options: its options.

    codec: the number format whose grid the new values lie on ('int4:64', ...), or 'stored' when they stay plain numbers.
    chained: of methods that read inputs: an expert's last matrix is fitted to what its others give it after they were encoded, and to
    the output that they would have had.
    """

    method: str
    codec: str = STORED
    options: dict[str, Any] = field(default_factory=dict)
    chained: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """One expert of the new layer: sum of coefficient x aligned source, then its `neurons`, then its `encodings` in turn.

    sources: old expert ids. coefficients: one each; () means 1 for a single source. alignments: one each or (): neuron f of the sum is
    neuron alignment[f] of that source, () leaves it as it is. neurons: those kept, ascending; () keeps all.
    encodings: numbers of the plan's encodings.
    """

    sources: tuple[int, ...]
    coefficients: tuple[float, ...] = ()
    alignments: tuple[tuple[int, ...], ...] = ()
    neurons: tuple[int, ...] = ()
    encodings: tuple[int, ...] = ()

    @property
    def copied(self) -> bool:
        """Whether the slot is its source, bit for bit, encodings left aside."""
        return len(self.sources) == 1 and self.weight(0) == 1 and not any(self.alignments) and not self.neurons

    def weight(self, i: int) -> float:
        """The coefficient of source number i."""
        return self.coefficients[i] if self.coefficients else 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the new router: the weighted sum of old rows (weights, biases and correction biases alike), and the slot it leads to."""

    slot: int
    sources: tuple[int, ...]
    coefficients: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TapUse:
    """A tap on a layer's routing when the model runs: it skips experts. tap: catalogue name; settings: its options."""

    tap: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One MoE layer. ordinal: its place among the MoE layers. rows: of the new router; () means slot i keeps the row of its first source.

    Several rows may lead to one slot: the file then holds the slot once for each of them, as transformers has no other form.
    loss: what the method expects to lose here, in the unit that the plan's `loss_unit` names; None when it says nothing.
    taps: what skips experts when the model runs, in turn; moestro's runners obey them, other readers of the folder run every expert.
    """

    ordinal: int
    slots: tuple[Slot, ...]
    rows: tuple[Row, ...] = ()
    loss: float | None = None
    taps: tuple[TapUse, ...] = ()

    @property
    def routed(self) -> tuple[Row, ...]:
        """The new router's rows, written out."""
        return self.rows or tuple(Row(i, slot.sources[:1]) for i, slot in enumerate(self.slots))


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task: of the result, and `reference`, of the original on the same documents, None where it is no finite number;
    their standard errors, None where there are none.

    lost, gained: documents that the original had right and the result has wrong, and the other way round; None where a document is not
    simply right or wrong. limited: only the task's first documents were asked. fewshot: examples before each question.
    higher_is_better: None where the task does not say.
    """

    task: str
    metric: str
    value: float | None
    reference: float | None
    error: float | None
    reference_error: float | None
    documents: int
    limited: bool = False
    fewshot: int = 0
    version: str = ""
    higher_is_better: bool | None = None
    lost: int | None = None
    gained: int | None = None

    @property
    def chance(self) -> float | None:
        """How likely so uneven a change is if the result is as good as the original: the sign test over documents that changed, both ways."""
        if self.lost is None or self.gained is None:
            return None
        changed = self.lost + self.gained
        tail = ways = 1
        for k in range(min(self.lost, self.gained)):
            ways = ways * (changed - k) // (k + 1)
            tail += ways
        return min(1.0, 2 * tail / 2**changed)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the result does to a text, against the original: perplexities, KL divergence in nats per token with its standard error,
    and how many of the original's expert choices the result makes too (kept experts under their old names; 0 to 1). All of these are
    None, and `data` is empty, where only tasks were asked.
    skipped: the share of a token's experts that did not run. tasks: scores on tasks."""

    data: str = ""
    tokens: int = 0
    perplexity: float | None = None
    reference: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None
    skipped: float = 0.0
    tasks: tuple[TaskScore, ...] = ()

    @property
    def loss(self) -> float | None:
        """How much the perplexity grew, as a share."""
        return None if self.perplexity is None or self.reference is None else self.perplexity / self.reference - 1

    def summary(self) -> list[str]:
        """A line for the text and one for each score."""
        lines = []
        if self.loss is not None:
            lines.append(
                f"measured on {self.tokens} tokens of {self.data}: perplexity {self.perplexity:.4f}, original {self.reference:.4f} "
                f"({100 * self.loss:+.2f} %), KL {self.kl:.4f} (standard error {self.kl_error:.4f}), routing agreement {100 * self.agreement:.1f} %"  # type: ignore[operator]
                + (f", {100 * self.skipped:.1f} % of the experts skipped" if self.skipped else "")
            )
        for t in self.tasks:
            line = f"measured on {t.documents}{' (the first)' if t.limited else ''} documents of {t.task}: {t.metric} {written(t.value, t.error)}, original {written(t.reference, t.reference_error)}"
            if t.chance is not None:
                line += f", {t.lost} from right to wrong and {t.gained} from wrong to right (sign test p = {t.chance:.2g})"
            lines.append(line)
        return lines


def written(value: float | None, error: float | None) -> str:
    """A score with its standard error."""
    if value is None:
        return "no number"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


@dataclass(frozen=True, kw_only=True)
class CompressionPlan(Plan):
    """What becomes of every expert, router and trunk tensor.

    layers: every MoE layer, in order. encodings: what slots and `tensors` refer to by number. tensors: trunk tensors that are encoded,
    by name; all others are copied. dropped: patterns (fnmatch) of tensors that may be left out of the result.
    protected: experts that a guard kept whatever the method said. stated: things the reader has to know, such as experts that were
    never seen. sizes: bytes of routed experts before and after, as stored. profile: the statistics' file; encodings may read it again.
    """

    kind: ClassVar[str] = "compression"
    layers: tuple[LayerChange, ...]
    encodings: tuple[Encoding, ...] = ()
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    protected: tuple[ExpertKey, ...] = ()
    stated: tuple[str, ...] = ()
    sizes: tuple[int, int] = (0, 0)
    loss_unit: str = ""
    profile: str = ""
    judged: tuple[Judged, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As every plan; slots, rows and encodings are written without the fields that have their usual value, to be read and edited."""
        data = Plan.to_json(self)
        data["layers"] = [
            {**_brief(la), "slots": [_brief(s) for s in la.slots]} | ({"rows": [_brief(r) for r in la.rows]} if la.rows else {})
            for la in self.layers
        ]
        data["encodings"] = [_brief(e) for e in self.encodings]
        data["protected"] = [list(key) for key in self.protected]
        data["tensors"] = {name: list(numbers) for name, numbers in self.tensors.items()}
        return data

    @classmethod
    def decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        data["layers"] = tuple(_layer(la) for la in data["layers"])
        data["encodings"] = tuple(_encoding(e) for e in data.get("encodings", ()))
        data["tensors"] = {str(name): _whole(numbers) for name, numbers in data.get("tensors", {}).items()}
        data["protected"] = tuple(ExpertKey(*_whole(key)) for key in data.get("protected", ()))
        for name in ("dropped", "stated"):
            data[name] = tuple(map(str, data.get(name, ())))
        before, after = _whole(data.get("sizes", (0, 0)))
        data["sizes"] = (before, after)
        data["judged"] = tuple(_judged(found) for found in data.get("judged", ()))
        return data

    @property
    def experts(self) -> int:
        """Rows of every new router: what the new configuration says."""
        return len(self.layers[0].routed)

    def width(self, facts: ModelFacts) -> int:
        """F of the new model: of the slot that keeps most neurons."""
        return max(len(slot.neurons) or facts.layers[la.ordinal].spec.d_expert for la in self.layers for slot in la.slots)

    def check(self, facts: ModelFacts) -> None:
        """As Plan.check, and every layer must be there and describe a layer that the family can hold. Raises PlanError."""
        super().check(facts)
        if [la.ordinal for la in self.layers] != list(range(len(facts.layers))):
            raise PlanError(
                f"the plan speaks of the MoE layers {[la.ordinal for la in self.layers]}",
                expected=f"each of the model's {len(facts.layers)} once, in order",
                fix="make the plan again",
            )
        for la in self.layers:
            check_layer(la, facts.layers[la.ordinal], len(self.encodings))
        counts = [len(la.routed) for la in self.layers]
        if len(set(counts)) > 1:
            raise PlanError(
                f"the layers would have {min(counts)} to {max(counts)} experts",
                expected=f"one number for all layers: a {facts.family} configuration has a single count",
                fix="keep as many everywhere, or merge with --router repoint, which keeps every router as wide as it was",
            )
        for name, numbers in self.tensors.items():
            if bad := [i for i in numbers if not 0 <= i < len(self.encodings)]:
                raise PlanError(f"{name} has the encoding {bad[0]}, the plan has {len(self.encodings)}")

    def origin(self, before: int) -> str:
        """What the weights were made of and how, in words; '' when they are the original's, number formats and taps left aside.

        before: experts of each layer of the original.
        """
        few, merged = min(len(la.slots) for la in self.layers), sum(len(s.sources) > 1 for la in self.layers for s in la.slots)
        narrow = {len(s.neurons) for la in self.layers for s in la.slots if s.neurons}
        changed = {n for la in self.layers for s in la.slots for n in s.encodings if self.encodings[n].codec == STORED}
        said = [f"{few} of {before} experts in a layer"] if few < before else []
        said += [f"{merged} experts merged from several"] if merged else []
        said += [f"experts of {max(narrow)} neurons"] if narrow else []
        said += [f"weights changed by {self.encodings[n].method}" for n in sorted(changed)]
        said += ["trained"] if any(step.startswith("train.") for step in self.method.split(" > ")) else []
        return f"made from {self.subjects[0].path} by {self.method}: {', '.join(said)}" if said else ""

    def summary(self) -> str:
        slots = [len(la.slots) for la in self.layers]
        merged = sum(len(s.sources) > 1 for la in self.layers for s in la.slots)
        few = f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
        text = f"{len(self.layers)} MoE layers of {few} experts"
        lines = [text + (f", {merged} of them merged from several" if merged else "")]
        if slimmed := [len(s.neurons) for la in self.layers for s in la.slots if s.neurons]:
            lines.append(f"{len(slimmed)} experts keep {min(slimmed)} to {max(slimmed)} neurons")
        before, after = self.sizes
        if before:
            lines.append(
                f"expert weights {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({100 * after / before:.1f} %)"
            )
        for i, e in enumerate(self.encodings):
            at = sum(i in s.encodings for la in self.layers for s in la.slots)
            trunk = sum(i in numbers for numbers in self.tensors.values())
            lines.append(f"{e.method} ({e.codec}) on {at} experts and {trunk} other tensors")
        for name in dict.fromkeys(tap.tap for la in self.layers for tap in la.taps):
            at = sum(any(tap.tap == name for tap in la.taps) for la in self.layers)
            lines.append(f"{name} skips experts when the model runs, in {at} layers; only moestro obeys it")
        if self.protected:
            lines.append("protected: " + ", ".join(f"layer {k.layer} expert {k.expert}" for k in self.protected))
        losses = [la.loss for la in self.layers if la.loss is not None]
        if losses:
            lines.append(f"expected loss {min(losses):.4g} to {max(losses):.4g} per layer ({self.loss_unit})")
        lines += self.stated
        lines += [line for j in self.judged for line in j.summary()]
        return "\n".join(lines)


def check_layer(change: LayerChange, facts: LayerFacts, encodings: int = 0) -> None:
    """Raises PlanError unless the slots are made of this layer's experts and the rows make a router that the layer can have."""
    where, known, width = f"layer {facts.ordinal}", range(facts.num_experts), facts.spec.d_expert
    for i, slot in enumerate(change.slots):
        what = f"{where}, slot {i}"
        if not slot.sources or any(e not in known for e in slot.sources):
            raise PlanError(f"{what} is made of {list(slot.sources)}", expected=f"experts 0 to {facts.num_experts - 1}")
        _check_numbers(what, slot.sources, slot.coefficients)
        if slot.alignments and len(slot.alignments) != len(slot.sources):
            raise PlanError(f"{what} has {len(slot.alignments)} alignments of {len(slot.sources)} sources")
        if any(a and sorted(a) != list(range(width)) for a in slot.alignments):
            raise PlanError(f"{what} has an alignment that is no order of its neurons", expected=f"0 to {width - 1}, each once")
        if slot.neurons and (
            sorted(set(slot.neurons)) != list(slot.neurons) or not 0 <= slot.neurons[0] <= slot.neurons[-1] < width
        ):
            raise PlanError(f"{what} keeps neurons that are not there or out of order", expected=f"ascending, 0 to {width - 1}")
        if bad := [n for n in slot.encodings if not 0 <= n < encodings]:
            raise PlanError(f"{what} has the encoding {bad[0]}, the plan has {encodings}")
    if not change.rows:
        named: dict[int, int] = {}
        for i, slot in enumerate(change.slots):
            if (other := named.setdefault(slot.sources[0], i)) != i:
                raise PlanError(
                    f"{where}: slots {other} and {i} would both keep the router's row of expert {slot.sources[0]}, so tokens would use both",
                    expected="each expert first in one slot, or rows that say what leads to each slot",
                    fix="name another expert, or write the layer's rows",
                )
    rows = change.routed
    for i, row in enumerate(rows):
        if not 0 <= row.slot < len(change.slots) or not row.sources or any(e not in known for e in row.sources):
            raise PlanError(
                f"{where}: row {i} of the router leads to slot {row.slot} and is made of the rows {list(row.sources)}"
            )
        _check_numbers(f"{where}, row {i} of the router", row.sources, row.coefficients)
    if unused := sorted(set(range(len(change.slots))) - {row.slot for row in rows}):
        raise PlanError(f"{where}: no row of the router leads to slot {unused[0]}")
    _check_router(where, rows, facts)


def _check_numbers(what: str, sources: tuple[int, ...], coefficients: tuple[float, ...]) -> None:
    if coefficients and len(coefficients) != len(sources):
        raise PlanError(f"{what} has {len(coefficients)} coefficients of {len(sources)} sources")
    if len(sources) > 1 and not coefficients:
        raise PlanError(f"{what} has several sources and no coefficients")
    if not all(math.isfinite(c) for c in coefficients):
        raise PlanError(f"{what} has coefficients that are not numbers")


def _check_router(where: str, rows: tuple[Row, ...], facts: LayerFacts) -> None:
    router, count = facts.router, len(rows)
    if count < facts.top_k:
        raise PlanError(
            f"{where} would have {count} experts and {facts.top_k} are used per token",
            expected=f"at least {facts.top_k}",
            fix="keep more experts",
        )
    if router.groups > 1:
        old, new = facts.num_experts // router.groups, count // router.groups
        if count % router.groups or (router.selection_bias and new < 2):
            raise PlanError(
                f"{where} would have {count} experts in {router.groups} groups",
                expected=f"a multiple of {router.groups}" + (", at least two in each group" if router.selection_bias else ""),
                fix="keep as many experts of each group",
            )
        if new * router.groups_kept < facts.top_k:
            raise PlanError(
                f"{where}: {router.groups_kept} groups of {new} experts are open to a token, which uses {facts.top_k}",
                expected="no fewer experts in the open groups than are used",
                fix="keep more experts",
            )
        if any(row.sources[0] // old != i // new for i, row in enumerate(rows)):
            raise PlanError(
                f"{where}: experts would change their group", expected="each group's experts together, the groups in their order"
            )


def _layer(data: dict[str, Any]) -> LayerChange:
    known = {f.name for f in fields(LayerChange)}
    if unknown := set(data) - known:
        raise ValueError(f"a layer has the unknown field {sorted(unknown)[0]}")
    rows = tuple(Row(**row | _numbers(row)) for row in data.get("rows", ()))
    loss = data.get("loss")
    slots = tuple(
        Slot(**slot | _numbers(slot) | {"alignments": tuple(map(_whole, slot.get("alignments", ())))}) for slot in data["slots"]
    )
    taps = tuple(TapUse(str(tap["tap"]), dict(tap.get("settings", {}))) for tap in data.get("taps", ()))
    return LayerChange(int(data["ordinal"]), slots, rows, None if loss is None else float(loss), taps)


def _judged(data: dict[str, Any]) -> Judged:
    tasks = tuple(TaskScore(**score) for score in data.get("tasks", ()))
    return Judged(**{name: value for name, value in data.items() if name != "tasks"}, tasks=tasks)


def _encoding(data: dict[str, Any]) -> Encoding:
    if not isinstance(data.get("chained", False), bool):
        raise ValueError(f"chained is {data['chained']!r}, not true or false")
    return Encoding(**data)


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    """The lists of numbers of a slot or a row as tuples."""
    found = {name: _whole(data[name]) for name in ("sources", "neurons", "encodings") if name in data}
    return found | {"coefficients": tuple(map(float, data.get("coefficients", ())))}


def _whole(values: Any) -> tuple[int, ...]:
    if not all(type(v) is int for v in values):
        raise ValueError(f"{values!r} are not whole numbers")
    return tuple(values)


def _brief(value: Any) -> dict[str, Any]:
    """A value's fields without those that are empty or as usual."""
    usual = {"codec": STORED, "chained": False}
    return {name: v for name, v in asdict(value).items() if v not in ((), {}, None) and v != usual.get(name)}
