"""Where a part of a model is being built: the one thing that every factory of `layers` gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from moestro.core.errors import InputError

if TYPE_CHECKING:
    from moestro.layers.config import MoEConfig
    from moestro.layers.experts import ExpertBank


@dataclass(frozen=True, slots=True)
class Site:
    """One routing decision's place in a model.

    num_experts: E, all ids the router may give, special experts included. layer: the ordinal of the routing, 0..layers-1, also its
    place in `Output.routings`. experts: the bank (None while it is being built). config: the whole model's configuration, None in
    tests of a part alone. pool: modules that several sites share, by name.
    """

    d_model: int
    num_experts: int
    top_k: int
    d_expert: int = 0
    layer: int = 0
    layers: int = 1
    vocabulary: int = 0
    init_std: float = 0.02
    experts: ExpertBank | None = None
    config: MoEConfig | None = None
    pool: dict[str, nn.Module] = field(default_factory=dict)

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """The module called `name` that all sites of the model share; the first that asks makes it."""
        if name not in self.pool:
            self.pool[name] = make()
        return self.pool[name]

    def bank(self) -> ExpertBank:
        """The experts, for methods that read their weights or kinds. Building such a part without them is a programmer's error."""
        assert self.experts is not None, "this part reads the experts: the site has none"
        return self.experts

    def linear(self, outputs: int, inputs: int = 0, *, bias: bool = False) -> nn.Linear:
        """A linear map from `inputs` (default: the model's width) with the model's initial standard deviation, bias zero."""
        made = nn.Linear(inputs or self.d_model, outputs, bias=bias)
        nn.init.normal_(made.weight, std=self.init_std)
        if bias:
            nn.init.zeros_(made.bias)
        return made


def require(holds: bool, found: str, expected: str, fix: str = "") -> None:
    """Raise InputError unless `holds`: for options that cannot be."""
    if not holds:
        raise InputError(found, expected=expected, fix=fix)
