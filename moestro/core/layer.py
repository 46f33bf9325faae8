"""What is known of a model without running it (`ModelFacts`, `LayerFacts`) and the protocols of a layer and a runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from moestro.core.experts import ExpertKey, Experts, ExpertSpec, ExpertWeights
from moestro.core.routing import Array, RouteContext, Router, Routing


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """A router's arithmetic in words, for people and plans; the model's own code stays the authority.

    score: 'softmax', 'sigmoid', 'logits' or 'sparsemixer'. weights: 'probs', 'softmax_after', 'sigmoid_after', 'masked_softmax'.
    selection_bias: a bias that changes the choice but not the weights.
    """

    score: str
    weights: str = "probs"
    renormalised: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    selection_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One MoE layer. ordinal: 0..L-1 among MoE layers; index: its decoder layer; shared: width of the always-on expert (0: none)."""

    ordinal: int
    index: int
    num_experts: int
    top_k: int
    spec: ExpertSpec
    router: RouterFacts
    shared: int = 0
    expert_bytes: int = 0  # on disk, one expert


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint as MoE layers plus a trunk (everything that is not a routed expert). Sizes in bytes, on disk.

    fingerprint: digest of the configuration and of every tensor's name, dtype, shape and place; it changes when the files do.
    kv_values_per_token: numbers a sequence stores per token over all layers (keys and values, or a compressed form).
    """

    family: str
    dtype: str
    vocabulary: int
    d_model: int
    decoder_layers: int
    context: int
    layers: tuple[LayerFacts, ...]
    trunk_bytes: int
    expert_bytes: int
    kv_values_per_token: int
    fingerprint: str
    tied_embeddings: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def active_expert_bytes(self) -> int:
        """Bytes of routed experts that one token touches."""
        return sum(layer.top_k * layer.expert_bytes for layer in self.layers)


@runtime_checkable
class MoELayer(Protocol):
    """A layer cut between routing and experts. Law: run(x, route(x)) equals the Hugging Face block."""

    @property
    def facts(self) -> LayerFacts: ...

    @property
    def router(self) -> Router: ...

    @property
    def experts(self) -> Experts: ...

    @property
    def shared(self) -> Callable[[Array], Array] | None: ...

    def route(self, x_TD: Array, ctx: RouteContext | None = None) -> Routing: ...

    def run(self, x_TD: Array, routing: Routing) -> Array: ...

    def replace(self, *, router: Router | None = None, experts: Experts | None = None) -> None:
        """Use another router or other experts from now on."""
        ...

    def watch(self, fn: Callable[[int, Array, Routing, Array], None]) -> Callable[[], None]:
        """Call fn(ordinal, x_TD, routing, y_TD) at each pass; returns a function that stops it."""
        ...


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What one MoE layer did in one forward pass, for probes: the routing at the seam, and input/output if asked for.

    y_TD: the routed experts' weighted sum. residual_TD: the residual stream that x_TD was normalised from. sink_TH: what each token's
    query gives the sequence's first token in the attention of this decoder layer, by head. None where the runner does not know it.
    """

    ordinal: int
    routing: Routing
    x_TD: Array | None = None
    y_TD: Array | None = None
    residual_TD: Array | None = None
    sink_TH: Array | None = None


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """logits_TV of the tokens asked for, and one record per MoE layer."""

    logits_TV: Array
    records: tuple[LayerRecord, ...]


@runtime_checkable
class Runner(Protocol):
    """Anything that turns tokens into logits and per-layer records: a loaded transformers model, the engine."""

    @property
    def facts(self) -> ModelFacts: ...

    def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        """One output per sequence; with `inputs` the records hold each layer's x_TD and y_TD."""
        ...


class Reading(Protocol):
    """One sequence that a runner is reading; what has been read is not read again."""

    def read(self, tokens: Sequence[int], *, every: bool = False) -> Array:
        """Go on with these tokens: logits_TV float32 after each with `every`, else after the last alone, [1, V]."""
        ...

    def back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


@runtime_checkable
class ReadingAccess(Protocol):
    """A runner that goes on with what it has read: for answers, and for texts that begin alike."""

    def reading(self, capacity: int) -> Reading:
        """A new sequence with room for `capacity` tokens."""
        ...


@runtime_checkable
class ExpertAccess(Protocol):
    """A runner that also hands out its experts' weights, for probes that look inside them."""

    def weights(self, key: ExpertKey) -> ExpertWeights:
        """One expert as the runner computes with it: float arrays, output rows first. They are only to be read."""
        ...


@runtime_checkable
class AttentionAccess(Protocol):
    """A runner that can say what its attention gives to the first token."""

    def show_attention(self) -> None:
        """From now on records with inputs hold `sink_TH`, at the price of a plainer and slower attention."""
        ...
