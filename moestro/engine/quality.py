"""Plans with as few bits as a bound on quality allows: candidates are run through the engine itself, on text, against the model as stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.core.method import card_of, load
from moestro.core.plans.residency import Measured, Precision, ResidencyPlan
from moestro.engine import memory as accounting
from moestro.engine.native import choose_trunk
from moestro.engine.residency import plan_residency
from moestro.engine.store import MIXED
from moestro.engine.trial import Candidate, Trials
from moestro.evaluate.perplexity import cut
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.encode import PLANES, Codec, check_expert, parse_codec
from moestro.models.codecs.packed import Record
from moestro.models.layout import Layout

GROUP = 32
WIDTHS = tuple(f"{kind}:{GROUP}" for kind in ("int2", "int3", "int4", "uint4", "int8"))
NESTED = tuple(f"nested:{GROUP}/{planes}" for planes in PLANES)
LENGTH, MOST = 256, 4096  # tokens of a sequence; of each of the two parts of the text
LEAST = 4  # sequences in each part
SURE = 1.645  # standard errors above the mean that cover 95 %
DOUBT, LOOKS = (
    0.05,
    4,
)  # of the text held out: how likely it may deceive in all, and how often it is asked, each time half as trusting
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bound:
    """What may be lost. kind: 'ppl', the share by which perplexity may grow; 'kl', nats per token from the stored model's predictions."""

    kind: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """'ppl:1%', 'ppl:0.01' or 'kl:0.02'. Raises InputError."""
        kind, _, number = text.partition(":")
        try:
            limit = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            limit = math.nan
        if kind not in ("ppl", "kl") or not 0 < limit < math.inf or (kind == "kl" and number.endswith("%")):
            raise InputError(
                f"{text!r} is no bound on quality", expected="such as ppl:1% (perplexity) or kl:0.02 (nats per token)"
            )
        return cls(kind, limit)

    def __str__(self) -> str:
        return f"ppl:{100 * self.limit:g}%" if self.kind == "ppl" else f"kl:{self.limit:g}"

    def loss(self, found: Measured) -> float:
        """What was lost, in the bound's own measure."""
        return found.loss if self.kind == "ppl" else found.kl

    def surely(self, found: Measured, sure: float = SURE) -> float:
        """What was lost at most for text of this kind: `sure` standard errors above the mean, by default 95 % confidence."""
        if self.kind == "kl":
            return found.kl + sure * found.kl_error
        return (1 + found.loss) * math.exp(sure * found.error) - 1

    def words(self, found: Measured, sure: float = SURE) -> str:
        loss, most = self.loss(found), self.surely(found, sure)
        if self.kind == "kl":
            return f"KL {loss:.4f} nats per token, surely below {most:.4f}"
        return f"perplexity {100 * loss:+.2f} %, surely below {100 * most:+.2f} %"


def plan_quality(
    checkpoint: Checkpoint,
    layout: Layout,
    memory: int | str,
    *,
    quality: str,
    tokens: Sequence[int],
    precision: str = "edgemoe",
    widths: Sequence[str] | None = None,
    length: int = LENGTH,
    report: Report | None = None,
    **options: Any,
) -> ResidencyPlan:
    """The plan of `plan_residency` with as few bits for each expert as the bound allows.

    The first half of the text chooses, and a candidate must be within the bound with 95 % confidence, so that little text allows
    little. What is chosen must then be surely within the bound on the second half, which had no say; if it is not, it is chosen again
    with half as much to lose. Look k at the second half takes 1 - 0.05 / 2^k confidence, so that all looks together are wrong
    once in twenty. The model runs as stored and in each candidate, in memory that is available now, whatever `memory` the plan is for.

    Args:
        quality: the bound; see `Bound.parse`. tokens: of a text. precision: the method.
        widths: codecs to choose from, the fewest bits first; few-bit ones, or planes of one nested codec.
        length: tokens of a sequence. report: told what is found. options: for `plan_residency`.

    Raises: InputError for a bound that no width keeps, too little text, or widths that do not fit; else as `plan_residency`.
    """
    bound, tell = Bound.parse(quality), report or (lambda text: None)
    choose = load(precision, "precision")
    card = card_of(choose)
    nested = "nested" in card.needs
    codecs = _codecs(layout, tuple(widths or (NESTED if nested else WIDTHS)), nested)
    length = min(length, layout.facts.context)
    chosen_on, held_out = parts(tokens, length)
    names = tuple(codec.name for codec in codecs)
    whole = codecs[0].name.partition("/")[0] if nested else MIXED
    options["runtime_bytes"] = options.get("runtime_bytes") or accounting.runtime_bytes(torch=_torch(checkpoint, layout, options))
    plan_residency(
        checkpoint, layout, memory, codec=codecs[0].name.partition("/")[0], precision=_uniform(layout, names[0]), **options
    )  # or BudgetError
    trial_options = {name: options[name] for name in ("dtype", "trunk", "trunk_codec") if name in options}
    with Trials(checkpoint, layout, length, trial_options) as trials:
        evidence = trials.evidence(chosen_on, codecs)
        unseen = sum(
            int((row[: la.num_experts] == 0).sum()) for row, la in zip(evidence.counts_LE, layout.facts.layers, strict=True)
        )
        if unseen:
            tell(f"{unseen} experts are never chosen in this text: nothing is known of what they lose")

        def candidate(widths_LE: np.ndarray) -> Candidate:
            return {
                ExpertKey(la.ordinal, e): codecs[widths_LE[la.ordinal, e]]
                for la in layout.facts.layers
                for e in range(la.num_experts)
            }

        known: dict[bytes, Measured] = {}

        def within(asked: Bound, widths_LE: np.ndarray) -> bool:
            name = widths_LE.tobytes()
            if name not in known:
                trial = candidate(widths_LE)
                known[name] = trials.measured(trial, chosen_on, kl=bound.kind == "kl")
                kept = "within" if asked.surely(known[name]) <= asked.limit else "outside"
                tell(f"{_counted(trial, names)}: {bound.words(known[name])}: {kept} {asked}")
            return asked.surely(known[name]) <= asked.limit

        look = 1
        while True:
            asked, sure = Bound(bound.kind, bound.limit / 2 ** (look - 1)), NormalDist().inv_cdf(1 - DOUBT / 2**look)
            widths_LE = choose(evidence, partial(within, asked))
            if widths_LE is None and look == 1:
                raise _none(names, bound, f"the best has {bound.words(min(known.values(), key=bound.surely))}")
            widest = widths_LE is None  # it is within the bound, though not surely within this part of it
            found = candidate(np.full(evidence.counts_LE.shape, len(codecs) - 1) if widths_LE is None else widths_LE)
            other = trials.measured(found, held_out, kl=True)
            if bound.surely(other, sure) <= bound.limit:
                break
            words = f"on the text that was held out {_counted(found, names)} have {bound.words(other, sure)}"
            if widest or look == LOOKS:
                raise _none(names, bound, words)
            tell(f"{words}: outside {bound}, so more bits are chosen")
            look += 1
        measured = [trials.measured(found, chosen_on, kl=True), other]
    used = [codec for codec in codecs if codec in found.values()]
    rows = tuple(tuple(used.index(found[ExpertKey(la.ordinal, e)]) for e in range(la.num_experts)) for la in layout.facts.layers)
    chosen = Precision(card.name, tuple(codec.name for codec in used), rows, str(bound), *measured)
    if len(used) == 1 and not nested:
        whole = used[0].name
    return plan_residency(checkpoint, layout, memory, codec=whole, precision=chosen, **options)


def _none(names: Sequence[str], bound: Bound, found: str) -> InputError:
    return InputError(
        f"no choice of {', '.join(names)} keeps the model within {bound}: {found}",
        expected="a width that does",
        fix="give more text, allow more, offer wider --widths, leave the trunk as stored, or stay EXACT: plan without --quality",
    )


def parts(tokens: Sequence[int], length: int) -> tuple[list[list[int]], list[list[int]]]:
    """(sequences to choose on, sequences held out): from the two halves of a text, at most MOST tokens of each. Raises InputError."""
    half = len(tokens) // 2
    found = [cut(some, length)[: max(LEAST, MOST // length)] for some in (tokens[:half], tokens[half:])]
    if min(map(len, found)) < LEAST:
        raise InputError(
            f"the text has {len(tokens)} tokens",
            expected=f"at least {2 * LEAST * length}: half of them to choose on, half to measure on",
            fix="give more text with --data",
        )
    return found[0], found[1]


def _uniform(layout: Layout, name: str) -> Precision:
    return Precision("", (name,), tuple((0,) * la.num_experts for la in layout.facts.layers))


def _torch(checkpoint: Checkpoint, layout: Layout, options: dict[str, Any]) -> bool:
    return choose_trunk(checkpoint, layout, options.get("trunk", "auto"), options.get("dtype", "auto")) == "transformers"


def _codecs(layout: Layout, widths: tuple[str, ...], nested: bool) -> list[Codec]:
    """The widths by their names, once each. Raises InputError."""
    codecs = [parse_codec(name) for name in widths]
    kinds = {codec[:2] for codec in codecs}
    if any(not codec.tiled or (codec.format == "nested") != nested for codec in codecs) or (nested and len(kinds) > 1):
        raise InputError(
            f"the widths are {', '.join(widths)}",
            expected="planes of one nested codec, such as nested:32/2,nested:32/3,nested:32"
            if nested
            else "such as int2:32,int4:32,int8:32",
        )
    for layer in layout.facts.layers:
        for codec in codecs:
            check_expert(codec, layer.spec)
    sized = {codec: sum(Record.of(la.spec, codec).size(codec.planes) for la in layout.facts.layers) for codec in codecs}
    if list(sized) != sorted(sized, key=sized.__getitem__) or len(sized) < len(codecs):
        raise InputError(f"the widths are {', '.join(widths)}", expected="each once, the fewest bytes first")
    return codecs


def _counted(candidate: Candidate, names: Sequence[str]) -> str:
    """'120 experts int4:32, 120 int8:32'."""
    held = [codec.name for codec in candidate.values()]
    return ", ".join(f"{held.count(name)} experts {name}" for name in names if name in held)
