"""A Hugging Face MoE model opened with all its experts in memory: a transformers module seen as MoE layers. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey, Experts, ExpertWeights
from moestro.core.layer import LayerFacts, LayerRecord, ModelFacts, RunnerOutput
from moestro.core.plans.compression import TapUse
from moestro.core.routing import RouteContext, Router, Routing, Tap
from moestro.layers.taps.compressed_experts import CompressedExperts
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import Stacked, run_experts
from moestro.models.families import describe
from moestro.models.layout import Layout
from moestro.models.live import Seam, load_trunk, seams, skeleton
from moestro.models.reading import LiveReading
from moestro.models.router import LiveRouter, Wire, without_experts
from moestro.models.taps import make_taps, read_taps

if TYPE_CHECKING:
    import torch

Watcher = Callable[[int, Any, Routing, Any], None]


def open_model(model: str | Path | Checkpoint, dtype: str = "auto") -> Model:
    """Load a checkpoint whole. model: folder, Hub id or opened checkpoint. dtype: 'auto', 'float32', 'bfloat16', 'float16'.

    Raises:
        CheckpointError: files are missing, disagree with the configuration or hold NaN.
        UnsupportedModel: not a Mixture-of-Experts model that moestro can run with parity.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    layout = describe(checkpoint)
    module = skeleton(checkpoint, layout.facts.dtype if dtype == "auto" else dtype)
    found = seams(module, layout)
    for seam in found:
        Stacked(seam).fill(checkpoint, layout, seam.facts.ordinal)
    load_trunk(module, checkpoint, layout)
    opened = Model(checkpoint, layout, module, found)
    opened.tap(read_taps(checkpoint))
    return opened


class LiveLayer:
    """One MoE layer of a live module. Changes made here change what the module computes."""

    def __init__(self, seam: Seam) -> None:
        self._seam = seam
        self._wire = Wire(seam)
        self._own = LiveRouter(seam, self._wire)
        self._router: Router = self._own
        self._experts: Experts = Stacked(seam)
        self._watchers: dict[object, Watcher] = {}
        self.scaling: CompressedExperts | None = None  # what changes the experts that run by those that do not
        self.context = RouteContext(layer=seam.facts.ordinal)
        seam.connect(self._answer)

    @property
    def facts(self) -> LayerFacts:
        return self._seam.facts

    @property
    def router(self) -> Router:
        return self._router

    @property
    def experts(self) -> Experts:
        return self._experts

    @property
    def shared(self) -> Callable[[Any], Any] | None:
        """x_TD -> y_TD of the experts that see every token, with their gate if they have one; None without."""
        if any("shared" in name for name, _ in self._seam.block.named_children()):
            return lambda x_TD: without_experts(self._seam, x_TD)
        beside = [m for name, m in self._seam.decoder.named_children() if "shared" in name and m is not None]
        return beside[0] if beside else None

    def route(self, x_TD: torch.Tensor, ctx: RouteContext | None = None) -> Routing:
        return self._router(x_TD, ctx or self.context)

    def run(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """y_TD: the routed experts' weighted sum, plus the shared experts."""
        (_, y_TD), shared = self._routed(x_TD, routing), self.shared
        return y_TD if shared is None else y_TD + shared(x_TD)

    def replace(self, *, router: Router | None = None, experts: Experts | None = None) -> None:
        """Use another router or other experts from now on, also inside the module's forward."""
        self._router = router or self._router
        self._experts = experts or self._experts

    def watch(self, fn: Watcher) -> Callable[[], None]:
        """Call fn(ordinal, x_TD, routing, y_TD) at each pass; y_TD is the routed experts' sum, without shared experts."""
        token = object()
        self._watchers[token] = fn
        return lambda: self._watchers.pop(token, None) and None

    def _routed(self, x_TD: torch.Tensor, routing: Routing) -> tuple[Routing, torch.Tensor]:
        """The experts that run, and their weighted sum."""
        if self.scaling is None:
            return routing, self._experts.run(x_TD, routing)
        main, scales = self.scaling.split(routing)
        return main, run_experts(x_TD, main, self._experts.weights, self.facts.spec, self._experts.num, scales)

    def _answer(self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The module's own call of its experts."""
        if self._router is self._own:
            routing = Routing(index_TK, weights_TK, self._wire.logits_TE, self._wire.probs() if self._watchers else None)
        else:
            routing = self._router(x_TD, replace(self.context, training=bool(self._seam.block.training)))
        routing, y_TD = self._routed(x_TD, routing)
        for fn in list(self._watchers.values()):
            fn(self.facts.ordinal, x_TD, routing, y_TD)
        return y_TD


class Stream:
    """Finds the residual stream before a layer's experts: what the norm took in whose result they are given. Stop it after the pass."""

    def __init__(self, seam: Seam) -> None:
        self._seen: list[tuple[Any, Any]] = []
        norms = [m for m in seam.decoder.modules() if "norm" in type(m).__name__.lower()]
        self._hooks = [m.register_forward_hook(lambda module, args, out: self._seen.append((args[0], out))) for m in norms]

    def before(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The norm's input, as wide as x_TD; x_TD itself in a family that normalises after its experts."""
        for taken, made in reversed(self._seen):
            if made.data_ptr() == x_TD.data_ptr() and taken.numel() == x_TD.numel():
                return taken.reshape(x_TD.shape)
        return x_TD

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Sinks:
    """Takes from a decoder layer's attention what it gives the first token, where it tells its weights. Stop it after the pass."""

    def __init__(self, seam: Seam) -> None:
        self.sink_TH: torch.Tensor | None = None
        found = [m for m in seam.decoder.modules() if "attention" in type(m).__name__.lower()]
        self._hooks = [m.register_forward_hook(self._see) for m in found]

    def _see(self, module: Any, args: Any, out: Any) -> None:
        weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        if weights is not None and getattr(weights, "ndim", 0) == 4:  # [B, H, queries, keys]
            self.sink_TH = weights[0, :, :, 0].T

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Model:
    """A live transformers `module` with its MoE `layers`; a core Runner with ExpertAccess."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, module: Any, found: tuple[Seam, ...]) -> None:
        self.checkpoint, self.layout, self.module = checkpoint, layout, module
        self.layers = tuple(LiveLayer(seam) for seam in found)
        self._attends = False

    @property
    def facts(self) -> ModelFacts:
        return self.layout.facts

    def weights(self, key: ExpertKey) -> ExpertWeights:
        """One expert as it is used now, also after `replace`."""
        return self.layers[key.layer].experts.weights(key.expert)

    def tap(self, uses: Sequence[tuple[TapUse, ...]]) -> None:
        """From now on each layer's routing passes these taps too; none for (). Learned ones read the checkpoint's folder."""
        for layer, taps in zip(self.layers, uses):
            for tap in make_taps(taps, self.checkpoint.path):
                if tap.point == "experts":
                    layer.scaling = tap
                else:
                    layer.replace(router=layer.router.tapped(Tap(tap.point, tap)))

    def show_attention(self) -> None:
        """From now on attention is computed with its weights at hand, plainly and slower, and records with inputs hold `sink_TH`."""
        self.module.set_attn_implementation("eager")
        self._attends = True

    def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        """Logits and records of each sequence, one forward pass each, without gradients. Raises InputError on bad token ids."""
        for number, tokens in enumerate(tokens_BT):
            self.check(tokens)
            yield self._one(tokens, number, inputs)

    def reading(self, capacity: int) -> LiveReading:
        """A sequence to be read forwards and back (core ReadingAccess); its cache grows by itself, whatever the capacity."""
        return LiveReading(self)

    def check(self, tokens: list[int]) -> None:
        """Raises InputError unless there are tokens, all of the vocabulary."""
        if not tokens:
            raise InputError("a sequence has no tokens", expected="at least one")
        if worst := [t for t in tokens if not 0 <= t < self.facts.vocabulary]:
            raise InputError(f"token id {worst[0]} is not in the vocabulary", expected=f"0 to {self.facts.vocabulary - 1}")

    def _one(self, tokens: list[int], number: int, inputs: bool) -> RunnerOutput:
        import torch

        ids_T = torch.tensor(tokens, dtype=torch.int64)
        records: dict[int, LayerRecord] = {}
        streams = {layer.facts.ordinal: Stream(layer._seam) for layer in self.layers} if inputs else {}
        sinks = {layer.facts.ordinal: Sinks(layer._seam) for layer in self.layers} if inputs and self._attends else {}

        def record(ordinal: int, x_TD: Any, routing: Routing, y_TD: Any) -> None:
            given = (x_TD, y_TD, streams[ordinal].before(x_TD)) if inputs else ()
            sink_TH = sinks[ordinal].sink_TH if sinks else None
            records[ordinal] = LayerRecord(ordinal, routing, *given, sink_TH=sink_TH)

        stops = [layer.watch(record) for layer in self.layers] + [hooks.stop for hooks in (*streams.values(), *sinks.values())]
        try:
            with self.told(ids_T, torch.arange(len(tokens)), number), torch.no_grad():
                logits_TV = self.module(input_ids=ids_T[None], use_cache=False).logits[0]
        finally:
            for stop in stops:
                stop()
        return RunnerOutput(logits_TV, tuple(records[i] for i in sorted(records)))

    @contextmanager
    def told(self, ids_T: torch.Tensor, position_T: torch.Tensor, number: int) -> Iterator[None]:
        """Within, routers know which tokens of which sequence they see."""
        import torch

        before = [layer.context for layer in self.layers]
        sequence_T = torch.full_like(ids_T, number)
        for layer in self.layers:
            layer.context = replace(layer.context, token_ids_T=ids_T, sequence_T=sequence_T, position_T=position_T)
        try:
            yield
        finally:
            for layer, context in zip(self.layers, before):
                layer.context = context
