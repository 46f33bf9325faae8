"""Everything in the decoder but the routed experts. `TransformersTrunk` is transformers' own model with its experts cut out;
the trunk without torch is in `engine.native`.

Shapes: B sequences, T tokens of one pass (B x T rows at the seam, sequence by sequence), V vocabulary, D model width, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from moestro.core.errors import UnsupportedModel
from moestro.core.layer import ModelFacts
from moestro.kernels.topk import topk
from moestro.models.checkpoint import Checkpoint
from moestro.models.layout import Layout
from moestro.models.reading import crop

if TYPE_CHECKING:
    import torch

# fn(ordinal, x_TD float32, experts_TK int64, weights_TK float32, valid_T bool or None, meanwhile) -> y_TD float32. The native
# trunk gives `meanwhile`, what else the layer computes: it is called once, when reads of missing experts are on their way.
Seam = Callable[..., np.ndarray]


Kept = Sequence[Sequence[int]]  # of each MoE layer the experts that are open


class Enough(Exception):
    """Ends a pass when what was wanted is known."""


@dataclass(slots=True)
class State:
    """What sequences have seen. valid_BT: bool, False for padding; None when there is none. cache: the trunk's own."""

    cache: Any
    batch: int
    length: int = 0
    valid_BT: np.ndarray | None = None


@runtime_checkable
class Trunk(Protocol):
    """A decoder whose experts are somewhere else."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        ...

    @property
    def continues(self) -> bool:
        """Whether a prompt may be given in several passes. One token at a time can always follow."""
        ...

    def start(self, batch: int, capacity: int) -> State:
        """New sequences with room for `capacity` tokens each."""
        ...

    def back(self, state: State, length: int) -> bool:
        """Forget what came after the first `length` tokens of one sequence; False where the state cannot, and is spoilt."""
        ...

    def forward(
        self, tokens_BT: np.ndarray, state: State, valid_BT: np.ndarray | None = None, *, every: bool = False
    ) -> np.ndarray:
        """Logits after the last token, float32 [B, V]; with `every` after each, [B, T, V]. The state moves on."""
        ...

    def ahead(self, ordinal: int, x_TD: np.ndarray, width: int) -> np.ndarray | None:
        """ids_TW: the `width` experts that layer `ordinal`'s router likes best for x_TD, best first; None without such a router."""
        ...

    def restrict(self, kept: Kept | None) -> None:
        """From now on the routers choose among these experts alone: their logits are -inf outside. None: among all."""
        ...

    def glance(self, tokens_1T: np.ndarray) -> np.ndarray:
        """logits_TE of the first MoE layer's router, before any restriction; nothing beyond is computed and no expert is asked for."""
        ...


class TransformersTrunk:
    """transformers' model of the checkpoint's family, its experts replaced by a call of `seam`.

    dtype: of its weights and of what flows through it, 'auto' for the checkpoint's own.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, seam: Seam, dtype: str = "auto") -> None:
        from moestro.models.live import build_trunk

        self.seam, self.layout = seam, layout
        self._valid_T: np.ndarray | None = None
        self._continues: bool | None = None
        self._open = ExitStack()
        self._closed: list[np.ndarray] = []
        self.module = build_trunk(checkpoint, layout, dtype, self._experts)
        self.module.eval()
        if getattr(self.module.config, "output_router_logits", False):
            self.module.config.output_router_logits = False

    @property
    def nbytes(self) -> int:
        tensors = {t.data_ptr(): t.nbytes for t in (*self.module.parameters(), *self.module.buffers()) if t.device.type != "meta"}
        return sum(tensors.values())

    @property
    def continues(self) -> bool:
        """Tried out on a few tokens, with silent experts, when its cache has recurrent states; caches of keys and values can."""
        from transformers.cache_utils import DynamicLayer

        if self._continues is None:
            layers = self.start(1, 16).cache.layers
            plain = all(isinstance(layer, DynamicLayer) and not hasattr(layer, "recurrent_states") for layer in layers)
            self._continues = plain or self._try_to_continue()
        return self._continues

    def _try_to_continue(self) -> bool:
        vocabulary = int(self.module.get_input_embeddings().weight.shape[0])
        tokens = np.arange(3, 15, dtype=np.int64)[None] % vocabulary
        with self._silent():
            whole = self.forward(tokens, self.start(1, 16))
            state = self.start(1, 16)
            self.forward(tokens[:, :7], state)
            pieces = self.forward(tokens[:, 7:], state)
        scale = float(np.abs(whole).max()) or 1.0
        tolerance = 1e-4 if str(self.module.dtype) == "torch.float32" else 3e-2
        return bool(np.abs(whole - pieces).max() <= tolerance * scale)

    @contextmanager
    def _silent(self) -> Iterator[None]:
        seam, self.seam = self.seam, lambda ordinal, x_TD, experts_TK, weights_TK, valid_T: np.zeros_like(x_TD)
        try:
            yield
        finally:
            self.seam = seam

    def start(self, batch: int, capacity: int) -> State:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache(config=self.module.config)
        room = _room_layer()
        cache.layers = [room(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return State(cache, batch)

    def back(self, state: State, length: int) -> bool:
        assert state.batch == 1 and state.valid_BT is None, "one sequence without padding"
        if length < state.length and not crop(state.cache, state.length - length):
            return False
        state.length = length
        return True

    def forward(
        self, tokens_BT: np.ndarray, state: State, valid_BT: np.ndarray | None = None, *, every: bool = False
    ) -> np.ndarray:
        import torch

        batch, width = tokens_BT.shape
        assert batch == state.batch, "the state is of another number of sequences"
        if valid_BT is None and state.valid_BT is not None:
            valid_BT = np.ones((batch, width), bool)
        more: dict[str, Any] = {}
        if valid_BT is not None:
            before = state.valid_BT if state.valid_BT is not None else np.ones((batch, state.length), bool)
            all_BT = np.concatenate([before, valid_BT], axis=1)
            positions = np.maximum(np.cumsum(all_BT, axis=1) - 1, 0)[:, state.length :]
            more = {"attention_mask": torch.from_numpy(all_BT.astype(np.int64)), "position_ids": torch.from_numpy(positions)}
        else:
            all_BT = None
            more = {"position_ids": torch.arange(state.length, state.length + width).expand(batch, width)}
        self._valid_T = None if valid_BT is None or valid_BT.all() else valid_BT.reshape(-1)
        try:
            with torch.inference_mode():
                out = self.module(
                    input_ids=torch.from_numpy(np.ascontiguousarray(tokens_BT, np.int64)),
                    past_key_values=state.cache,
                    use_cache=True,
                    logits_to_keep=0 if every else 1,
                    **more,
                )
                logits = out.logits.float().numpy()
        finally:
            self._valid_T = None
        state.length += width
        state.valid_BT = all_BT
        return logits if every else logits[:, -1]

    def _experts(
        self, ordinal: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The seam: torch to numpy and back. float32 for x and weights whatever the trunk's dtype, which loses nothing."""
        import torch

        with torch.inference_mode():
            y_TD = self.seam(
                ordinal,
                hidden.detach().to(torch.float32).contiguous().numpy(),
                top_k_index.detach().to(torch.int64).contiguous().numpy(),
                top_k_weights.detach().to(torch.float32).contiguous().numpy(),
                self._valid_T,
            )
            return torch.from_numpy(y_TD).to(hidden.dtype)

    def ahead(self, ordinal: int, x_TD: np.ndarray, width: int) -> np.ndarray | None:
        import torch

        found = self._routers[ordinal]
        if found is None:
            return None
        weight_ED, bias_E, choice_E = found
        with torch.inference_mode():
            scores_TE = torch.nn.functional.linear(torch.from_numpy(x_TD).to(weight_ED.dtype), weight_ED, bias_E).float()
            if choice_E is not None:
                sigmoid = self.layout.facts.layers[ordinal].router.score == "sigmoid"
                scores_TE = (scores_TE.sigmoid() if sigmoid else scores_TE.softmax(-1)) + choice_E
            if self._closed:
                scores_TE[:, self._closed[ordinal]] = float("-inf")
            ids_TW, _ = topk(scores_TE.numpy(), min(width, scores_TE.shape[1]))
        return ids_TW

    def restrict(self, kept: Kept | None) -> None:
        import torch

        from moestro.core.routing import RouteContext, Tap

        self._open.close()
        self._closed = [] if kept is None else closed(self.layout.facts, kept)
        for wire, shut_E in zip(self._wires, self._closed):
            mask_E = torch.from_numpy(shut_E)
            taps = (Tap("logits", lambda logits, ctx, mask_E=mask_E: logits.masked_fill(mask_E, float("-inf"))),)
            self._open.enter_context(wire.tapped(taps, RouteContext()))

    def glance(self, tokens_1T: np.ndarray) -> np.ndarray:
        def enough(*args: Any) -> np.ndarray:
            raise Enough

        seam, self.seam, wires = self.seam, enough, self._wires
        self.restrict(None)
        try:
            self.forward(tokens_1T, self.start(1, tokens_1T.shape[1]))
        except Enough:
            pass
        finally:
            self.seam = seam
        logits_TE = wires[0].logits_TE
        if logits_TE is None:
            raise UnsupportedModel("the first router's logits cannot be seen", expected="a router with a linear map")
        return logits_TE.float().numpy()

    @cached_property
    def _wires(self) -> list[Any]:
        from moestro.models.live import seams
        from moestro.models.router import Wire

        return [Wire(seam) for seam in seams(self.module, self.layout)]

    @cached_property
    def _routers(self) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None]:
        """Per MoE layer the router's weight, its bias, and a bias on the choice alone; recognised by their shapes."""
        from moestro.models.live import seams

        out: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None] = []
        for seam in seams(self.module, self.layout):
            shape = (seam.facts.num_experts, seam.facts.spec.d_model)
            own = dict(seam.router.named_parameters()) if seam.router is not None else {}
            weight = next((p for p in own.values() if tuple(p.shape) == shape), None)
            bias = next((p for name, p in own.items() if name.endswith("bias") and p.shape == shape[:1]), None)
            near = {**dict(seam.block.named_buffers()), **dict(seam.block.named_parameters())}
            choice = next((t for name, t in near.items() if name.endswith(("correction_bias", "expert_bias"))), None)
            if choice is bias:
                bias = None
            out.append(None if weight is None else (weight, bias, None if choice is None else choice.reshape(-1).float()))
        return out


def closed(facts: ModelFacts, kept: Kept) -> list[np.ndarray]:
    """bool_E of each layer: the experts that are not kept. Raises UnsupportedModel for routers that would choose them all the same."""
    for la in facts.layers:
        if la.router.score not in ("softmax", "logits") or la.router.groups > 1 or la.router.selection_bias:
            raise UnsupportedModel(
                f"the routers of this {facts.family} choose by more than their logits",
                expected="a softmax without groups and bias",
                fix="write a model of the task's experts: moestro plan premoe",
            )
    return [~np.isin(np.arange(la.num_experts), ids) for la, ids in zip(facts.layers, kept, strict=True)]


def has_recurrent_states(checkpoint: Checkpoint) -> bool:
    """Whether sequences keep more than keys and values, so that a prompt may have to be read at once. Loads no weight."""
    from transformers.cache_utils import DynamicCache

    from moestro.models.live import model_class

    return any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=model_class(checkpoint)[1]).layers)


def _room_layer() -> Any:
    """A cache layer of keys and values that reserves its room at once: transformers' own copies everything at every token.

    Reserved pages cost nothing until they are written, and nothing is ever held twice.
    """
    import torch
    from transformers.cache_utils import DynamicLayer

    class RoomLayer(DynamicLayer):
        def __init__(self, capacity: int) -> None:
            super().__init__()
            self.capacity = capacity
            self._keys: Any = None
            self._values: Any = None

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.is_initialized = True
                self._keys = self._values = None
            had = self.get_seq_length()
            length = had + key_states.shape[-2]
            self._keys = self._put(self._keys, key_states, had, length)
            self._values = self._put(self._values, value_states, had, length)
            self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]
            return self.keys, self.values

        def _put(self, room: Any, states: Any, had: int, length: int) -> Any:
            if room is None or length > room.shape[2]:
                batch, heads, _, width = states.shape
                larger = torch.empty((batch, heads, max(self.capacity, length), width), dtype=states.dtype, device=states.device)
                if room is not None and had:
                    larger[:, :, :had] = room[:, :, :had]
                room = larger
            room[:, :, had:length] = states
            return room

    return RoomLayer
