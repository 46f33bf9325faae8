"""What a probe is, and which probes a run gets: by name, or from what methods say they need.

A probe is a class with a card of kind 'probe'. The card's `needs` name what the runner must give beyond ids and weights:
'logits' (of the router), 'inputs' (each layer's input and output), 'residual', 'attention' (what goes to the first token), 'experts' (their weights).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moestro.core.errors import InputError
from moestro.core.layer import ModelFacts
from moestro.core.method import card_of, catalogue, check_options, load
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Statistic

Statistics = Mapping[str, Statistic]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a probe knows before the run. labels: their names. frequent: token ids, most frequent first.

    sequences: how many there are. longest: tokens of the longest. width: E of the widest layer; slots: K of the widest.
    """

    facts: ModelFacts
    labels: tuple[str, ...]
    frequent: np.ndarray
    sequences: int
    longest: int

    @property
    def layers(self) -> int:
        return len(self.facts.layers)

    @property
    def width(self) -> int:
        return max(layer.num_experts for layer in self.facts.layers)

    @property
    def slots(self) -> int:
        return max(layer.top_k for layer in self.facts.layers)

    @property
    def d_model(self) -> int:
        return self.facts.d_model

    @property
    def d_expert(self) -> int:
        return max(layer.spec.d_expert for layer in self.facts.layers)


class Probe(Protocol):
    """Streams over a run. Its statistics merge in any order, see `Statistic`; options are keyword arguments of the constructor.

    gives: names of its statistics, unique among all probes.
    """

    gives: tuple[str, ...]

    def start(self, setting: Setting) -> Statistics:
        """Empty statistics, one for each name in `gives`."""
        ...

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        """One layer of one sequence. Layers come in order; `seen.layers` holds those up to this one."""
        ...


def standard(available: frozenset[str]) -> list[str]:
    """The cheap probes (those that need no inputs) that a runner giving `available` can feed."""
    rows = [row for row in catalogue() if row["kind"] == "probe"]
    return [row["name"] for row in rows if set(row["needs"]) <= (available & {"logits"})]


def needed_by(methods: Iterable[str]) -> list[str]:
    """The probes that these methods of the catalogue need, as 'name' or 'name:option=value,...' like the card says.

    Raises InputError for a method that needs no profile.
    """
    known = {row["name"].rsplit(".", 1)[-1] for row in catalogue() if row["kind"] == "probe"}
    out: dict[str, None] = {}
    for method in methods:
        card = card_of(load(method))
        found = [need for need in card.needs if need.partition(":")[0] in known]
        if not found and "trace" not in card.needs:  # a trace is kept in any case
            raise InputError(
                f"{card.name} reads no statistics" + (f" (it needs {', '.join(card.needs)})" if card.needs else ""),
                expected="a method that needs a profile",
                fix="leave --for out: the standard probes are run without it",
            )
        out |= dict.fromkeys(found)
    return list(out)


def make(choices: Mapping[str, Mapping[str, Any]]) -> dict[str, Probe]:
    """Probes by their full name from names and options. Raises InputError for an unknown name or option, or for two that clash."""
    out: dict[str, Probe] = {}
    for name, options in choices.items():
        cls = load(name, "probe")
        card = card_of(cls)
        check_options(card, options)
        out[card.name] = cls(**options)
    return out


def requires(probes: Mapping[str, Probe]) -> frozenset[str]:
    """Everything these probes need of a runner."""
    return frozenset(need for probe in probes.values() for need in card_of(probe).needs)


def settings_of(probe: Probe) -> dict[str, Any]:
    """The options a probe was made with: each is kept as an attribute of the same name."""
    names: Sequence[str] = [p.name for p in inspect.signature(type(probe)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: getattr(probe, name) for name in names}
