"""The engine: a checkpoint larger than its memory budget, run exactly. It joins trunk, cache, dispatch and generation.

`Engine.open(model, memory=...)` makes a plan and loads the trunk; `generate` answers prompts; `run` makes it a core Runner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from moestro.core.errors import InputError, PlanError
from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.layer import LayerRecord, ModelFacts, RunnerOutput
from moestro.core.plans.residency import ResidencyPlan
from moestro.core.plans.tasks import TaskPlan
from moestro.core.routing import Routing
from moestro.core.trace import Trace
from moestro.engine import memory as accounting
from moestro.engine.cache import ExpertCache
from moestro.engine.dispatch import Dispatch, demanded
from moestro.engine.generate import Generation, Prompt
from moestro.engine.native import NativeTrunk, Resident, choose_trunk
from moestro.engine.prefetch import Glimpse, Prefetcher
from moestro.engine.reading import EngineReading
from moestro.engine.recorder import Recorder
from moestro.engine.replay import NONE, eviction_factory, make_predictor
from moestro.engine.sample import SamplingParams
from moestro.engine.store import ExpertStore, PackedStore, SourceStore, load
from moestro.engine.table import Moment, SlotTable
from moestro.engine.trunk import State, TransformersTrunk, Trunk, has_recurrent_states
from moestro.engine.widths import Widths, WidthTable, staying, table_of
from moestro.kernels.ffn import ExpertView
from moestro.kernels.native import available, cores
from moestro.kernels.reader import READERS, Reader
from moestro.kernels.step import Shelf
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import changes_said
from moestro.models.codecs.encode import PLANES, ROUNDED
from moestro.models.layout import Layout
from moestro.models.taps import RoutingTaps, made_by

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


class Engine:
    """A running model. Use it as a context manager, or call `close`. Not for several threads at once.

    plan: what it keeps where. facts: of the model. context: tokens a sequence may have, prompt and answer together.
    changes: what differs from the original's numbers; empty when the run is exact. packed: the folder of packed or compressed weights
    that the run is exact to, or ''.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        plan: ResidencyPlan,
        *,
        store: ExpertStore | None = None,
        threads: int | None = None,
        trace: bool = False,
        tasks: TaskPlan | None = None,
    ) -> None:
        plan.check(layout.facts)
        self.checkpoint, self.layout, self.plan = checkpoint, layout, plan
        self.facts: ModelFacts = layout.facts
        self.threads = threads or cores()
        self.context = min(plan.context, layout.facts.context)
        self.stop = threading.Event()
        self.store: ExpertStore = store or SourceStore(checkpoint, layout)
        self.store.check()
        if plan.precision is not None and isinstance(self.store, PackedStore):
            self.store.follow(plan.precision)
        if self.store.codec != plan.codec:
            raise PlanError(
                f"the plan keeps experts in codec {plan.codec!r}, the store holds {self.store.codec!r}",
                expected="a store packed by this plan",
                fix="run `moestro apply` with this plan, or plan again",
            )
        eviction = eviction_factory(plan.eviction, plan.eviction_options)
        widths = None
        if plan.scope == "width":
            assert plan.precision is not None and isinstance(self.store, PackedStore), "checked above"
            widths = Widths.of(plan.precision.experts_LE, self.store.sizes_LE)
        pinned = plan.pinned
        if (
            plan.predictor == NONE or not plan.prefetch
        ):  # what stays anyway is as good as pinned, but a wrong guess would no longer leave
            pinned = (*pinned, *staying(plan.slots, plan.scope, self.facts, pinned, widths))
        table = table_of(plan.slots, plan.scope, eviction, layers=len(self.facts.layers), pinned=pinned, widths=widths)
        prefetcher = self._prefetcher(table)
        self.taps = RoutingTaps.of(checkpoint)
        self.tasks, self.task = tasks, ""
        if tasks is not None:
            tasks.check(layout.facts)
        self.changes = self._changes()
        self.packed = self._packed()
        self.recorder = Recorder(self.facts, {"method": plan.method, "dtype": plan.dtype}) if trace else None
        self._step, self._prefilling, self._watched, self._inputs = 0, False, False, False
        self._records: list[tuple[np.ndarray, ...]] = []
        self._routers: list[tuple[np.ndarray, ...]] = []
        self._sequences = 0
        self._tokenizer: Any = None
        self.reader = Reader(READERS)
        try:
            self.store.attach(self.reader)
            widest = max(layer.num_experts for layer in self.facts.layers)
            shelf = Shelf(len(self.facts.layers), widest) if available() else None
            self.cache = ExpertCache(self.store, table, self.reader, shelf, None if widths is None else widths.slot_bytes_W)
            self.dispatch = Dispatch(self.cache, self.facts.layers, self.threads, prefetcher)
            self.trunk: Trunk = self._load_trunk()
            self.cache.preload()
        except BaseException:
            self.reader.close()
            raise

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        memory: int | None = None,
        plan: ResidencyPlan | None = None,
        store: str | Path | ExpertStore | None = None,
        threads: int | None = None,
        trace: bool = False,
        planes: int = 0,
        tasks: TaskPlan | None = None,
        **options: Any,
    ) -> Self:
        """Open a checkpoint and load its trunk.

        Args:
            model: a local folder, a Hub id, or `org/name@revision`.
            memory: bytes that the whole process may take; without it and without a plan, most of what is available.
            plan: what to keep where, instead of making a plan here.
            store: a folder of packed experts, or a store; by default the checkpoint itself.
            threads: of the arithmetic; by default the cores this process may use.
            trace: record what is routed; see `trace`.
            planes: at most so many bits of each nested expert; see `limit`.
            tasks: each prompt then runs with the experts of the nearest task alone; one prompt at a time.
            options: for `plan_residency` (context, batch, chunk, dtype, eviction, predictor, trunk, ...).

        Raises:
            InputError: both a memory budget and a plan, or options beside a plan. BudgetError: the budget cannot work.
            CheckpointError, UnsupportedModel, PlanError: as their names say.
        """
        from moestro.engine.residency import plan_residency
        from moestro.models.families import describe

        if plan is not None and (memory is not None or options):
            given = ["memory"] * (memory is not None) + sorted(options)
            raise InputError(
                f"a plan is given and also {', '.join(given)}", expected="one or the other", fix="leave out the plan"
            )
        accounting.settle()
        checkpoint = Checkpoint.open(model)
        layout = describe(checkpoint)
        if plan is not None and store is None and plan.codec != "stored":
            raise InputError(
                f"the plan keeps experts in codec {plan.codec}, and no packed experts are given",
                expected="the folder that `moestro apply` wrote",
                fix="run `moestro apply PLAN --output FOLDER` and give that folder as the store",
            )
        if isinstance(store, str | Path):
            packed = PackedStore(store, layout.facts)
            packed.made_from(checkpoint, layout)
            store = packed
        if plan is None:
            if store is not None:
                options.setdefault("codec", store.codec)
            options["trunk"] = choose_trunk(checkpoint, layout, options.get("trunk", "auto"), options.get("dtype", "auto"))
            if isinstance(store, PackedStore):
                if planes:
                    store.limit(store.cap(_checked(planes)))  # before the plan, whose slots it makes smaller
                options.setdefault("precision", store.precision())
                if options["trunk"] == "native":
                    options.setdefault("trunk_codec", store.trunk_codec)
            if options["trunk"] == "transformers" and has_recurrent_states(checkpoint):
                options.setdefault("chunk", min(options.get("context") or 2048, layout.facts.context))
            budget = memory if memory is not None else accounting.available() * 9 // 10 + accounting.usage().resident
            plan = plan_residency(checkpoint, layout, budget, **options)
        engine = cls(checkpoint, layout, plan, store=store, threads=threads, trace=trace, tasks=tasks)
        if planes:
            try:
                engine.limit(planes)
            except BaseException:
                engine.close()
                raise
        return engine

    def close(self) -> None:
        """Stop reading and close the experts' files. Idempotent. The memory goes with the engine itself."""
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # What the engine is made of

    def _prefetcher(self, table: SlotTable | WidthTable) -> Prefetcher | None:
        plan = self.plan
        experts = tuple(layer.num_experts for layer in self.facts.layers)
        predictor = make_predictor(plan.predictor, len(experts), experts, plan.predictor_options)
        return Prefetcher(predictor, table, plan.prefetch) if plan.prefetch and plan.predictor != NONE else None

    def _load_trunk(self) -> Trunk:
        trunk: Trunk
        if self.plan.trunk == "native":
            trunk = self._native_trunk()
        else:
            import torch

            torch.set_num_threads(self.threads)
            trunk = TransformersTrunk(self.checkpoint, self.layout, self._seam, self.plan.dtype)
        accounting.trim()
        return trunk

    def _native_trunk(self) -> NativeTrunk:
        """Its matrices as the plan says: from the packed folder if they lie there so, else quantised while they are read."""
        codec = self.plan.trunk_codec
        packed = self.store.trunk() if isinstance(self.store, PackedStore) and codec == self.store.trunk_codec else None
        options = {
            "codec": codec,
            "packed": packed,
            "threads": self.threads,
            "resident": Resident(self._resident, self._shelf, self._used),
        }
        return NativeTrunk(self.checkpoint, self.layout, self._seam, self.plan.dtype, **options)

    def _changes(self) -> tuple[str, ...]:
        out = [*self._own_changes(), *self.store.changes]
        own, used = self.facts.dtype, self.facts.dtype if self.plan.dtype == "auto" else self.plan.dtype
        if own != used and used != "float32" and self.plan.trunk == "transformers":
            out.append(f"the trunk's {own} weights are rounded to {used}")
        if self.plan.trunk_codec != "stored":
            out.append(f"the trunk's matrices are kept as {self.plan.trunk_codec}")
            out.append(ROUNDED)
        if self.plan.precision is not None and self.plan.precision.bound:
            out.append(self.plan.precision.summary())
        if self.task:
            out.append(f"routers choose among the experts of the task {self.task!r} alone")
        return tuple(dict.fromkeys(out))

    def _own_changes(self) -> list[str]:
        """How the folder differs from the model that it was made from."""
        made = made_by(self.checkpoint)
        origin = made[0].origin(made[1]) if made is not None else ""
        taps = [self.taps.said] if self.taps is not None else []
        return [*([origin] if origin else []), *changes_said(self.checkpoint.config), *taps]

    def _packed(self) -> str:
        """A packed folder is a model of its own: its experts with all their bits and the trunk beside them, or the checkpoint's. So is a
        folder that a compression plan made."""
        store = self.store
        if self.changes and self.changes == tuple(dict.fromkeys(self._own_changes())):
            return str(self.checkpoint.path)
        if (
            not isinstance(store, PackedStore)
            or self.taps is not None
            or self.task
            or self.plan.trunk_codec != store.trunk_codec
            or store.cut
        ):
            return ""
        return str(store.folder)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises CheckpointError when it has none."""
        if self._tokenizer is None:
            from moestro.models.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.open(self.checkpoint.path)
        return self._tokenizer

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer; of a checkpoint without a tokenizer those of its configuration."""
        if self._tokenizer is not None or (self.checkpoint.path / "tokenizer.json").exists():
            return frozenset(self.tokenizer.eos_ids)
        said = self.checkpoint.config.get("eos_token_id")
        return frozenset(said if isinstance(said, list) else [] if said is None else [said])

    # Passes

    def _seam(
        self,
        ordinal: int,
        x_TD: np.ndarray,
        experts_TK: np.ndarray,
        weights_TK: np.ndarray,
        valid_T: np.ndarray | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> np.ndarray:
        if self.stop.is_set():
            raise KeyboardInterrupt
        if valid_T is not None:
            y_TD = np.zeros_like(x_TD)
            if valid_T.any():
                y_TD[valid_T] = self._seam(ordinal, x_TD[valid_T], experts_TK[valid_T], weights_TK[valid_T], None)
            elif self.recorder is not None:
                self.recorder.layer(ordinal, experts_TK[:0], weights_TK[:0])
            return y_TD
        scales = None
        if self.taps is not None:
            experts_TK, weights_TK, scales = self.taps(ordinal, x_TD, experts_TK, weights_TK)
        experts_TK = demanded(experts_TK, weights_TK)
        moment = Moment(self._step, ordinal, self._prefilling)
        y_TD = self.dispatch.run(x_TD, experts_TK, weights_TK, moment, self._glimpse(ordinal, x_TD), meanwhile, scales)
        if self.recorder is not None:
            self.recorder.layer(ordinal, experts_TK, weights_TK)
        if self._watched:
            seen = (experts_TK.copy(), weights_TK.copy())
            self._records.append((*seen, x_TD.copy(), y_TD) if self._inputs else seen)
        return y_TD

    def _resident(
        self, ordinal: int, x_1D: np.ndarray, experts_1K: np.ndarray, weights_1K: np.ndarray
    ) -> list[ExpertView] | None:
        """One token's experts if all are in memory, with everything that the seam does but the arithmetic."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        if self._watched or self.taps is not None or not weights_1K.all():
            return None
        views = self.dispatch.resident(experts_1K, Moment(self._step, ordinal, self._prefilling), self._glimpse(ordinal, x_1D))
        if views is not None and self.recorder is not None:
            self.recorder.layer(ordinal, experts_1K, weights_1K)
        return views

    def _shelf(self) -> Shelf | None:
        """Where the trunk may find experts by itself; None when it has to ask layer by layer."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        if self._watched or self.taps is not None or self.dispatch.prefetcher is not None:
            return None
        return self.cache.shelf

    def _used(self, ordinals: Sequence[int], experts_LK: np.ndarray, weights_LK: np.ndarray) -> None:
        """Layers for which the trunk found its one token's experts by itself: what the seam does but the arithmetic."""
        self.cache.table.use_all(self._step, self._prefilling, ordinals, experts_LK)
        if self.recorder is not None:
            self.recorder.layers(ordinals, experts_LK, weights_LK)

    def _told(self, logits_TE: np.ndarray, residual_TD: np.ndarray) -> None:
        """What the native trunk knows beside the seam; the seam of the same layer is asked next."""
        self._routers.append((logits_TE.copy(), residual_TD.copy()) if self._inputs else (logits_TE.copy(),))

    def _glimpse(self, ordinal: int, x_TD: np.ndarray) -> Glimpse | None:
        if self.dispatch.prefetcher is None or ordinal + 1 == len(self.facts.layers):
            return None

        def router(x_TD: np.ndarray, width: int) -> np.ndarray:
            ids_TW = self.trunk.ahead(ordinal + 1, x_TD, width)
            if ids_TW is None:
                return np.zeros((len(x_TD), 0), np.int64)
            if self.recorder is not None:
                self.recorder.ahead(ordinal, ids_TW)
            return ids_TW

        return Glimpse(x_TD=x_TD, router=router)

    def _pass(
        self, tokens_BT: np.ndarray, state: State, valid_BT: np.ndarray | None, *, prefill: bool, every: bool = False
    ) -> np.ndarray:
        self._prefilling = prefill
        if self.recorder is not None and tokens_BT.shape == (1, 1) and valid_BT is None and state.valid_BT is None:
            self.recorder.step(self._step, prefill, tokens_BT[0], np.array([self._sequences - 1]), np.array([state.length]))
        elif self.recorder is not None:
            rows = np.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
            before_B = np.full(len(rows), state.length) if state.valid_BT is None else state.valid_BT.sum(1)
            positions_BT = before_B[:, None] + np.cumsum(rows, axis=1) - 1
            first = self._sequences - state.batch
            sequences_BT = np.broadcast_to(np.arange(first, self._sequences)[:, None], rows.shape)
            self.recorder.step(self._step, prefill, tokens_BT[rows], sequences_BT[rows], positions_BT[rows])
        try:
            return self.trunk.forward(tokens_BT, state, valid_BT, every=every)
        except BaseException:
            if self.recorder is not None:
                self.recorder.undo()
            raise
        finally:
            self._step += 1

    def limit(self, planes: int) -> None:
        """From now on use at most this many bits (2, 3 or 4) of each nested expert: fewer bytes are read, and what is in memory is read anew.

        Between generations only. Raises InputError when the experts are not packed as nested.
        """
        if not isinstance(self.store, PackedStore):
            raise InputError(
                "the experts are not packed", expected="experts packed as nested:G", fix="pack them with `moestro apply`"
            )
        if self.plan.precision is not None:
            self.store.follow(self.plan.precision)
        else:
            self.store.limit([[0] * len(row) for row in self.store.planes_LE])
        self.store.limit(self.store.cap(_checked(planes)))
        self.cache.forget()
        self.cache.preload()
        self.changes = self._changes()
        self.packed = self._packed()

    def begin(self) -> None:
        """Before a generation: the files must still be the ones that were opened, and counts start anew. Raises CheckpointError."""
        self.checkpoint.unchanged()
        self.store.check()
        self.cache.reset()
        if self.taps is not None:
            self.taps.reset()
        self.stop.clear()

    def pieces(self, length: int, batch: int) -> list[slice]:
        """A prompt's passes: plan.chunk tokens of all sequences together, or all at once where the trunk cannot continue."""
        width = max(1, self.plan.chunk // batch)
        if length <= width or not self.trunk.continues:
            return [slice(0, length)]
        return [slice(at, min(at + width, length)) for at in range(0, length, width)]

    def prefill(self, tokens_BT: np.ndarray, state: State, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Read prompts into a new state; logits_BV after the last token. valid_BT: False for padding, which is on the left."""
        self._sequences += state.batch
        logits_BV = np.zeros((0, 0), np.float32)
        for piece in self.pieces(tokens_BT.shape[1], state.batch):
            valid = None if valid_BT is None else valid_BT[:, piece]
            logits_BV = self._pass(tokens_BT[:, piece], state, valid, prefill=True)
        return logits_BV

    def decode(self, tokens_B1: np.ndarray, state: State, valid_B1: np.ndarray | None = None) -> np.ndarray:
        """One token more of each sequence; logits_BV. valid_B1: False for sequences that have ended."""
        return self._pass(tokens_B1, state, valid_B1, prefill=False)

    def follow(self, tokens_1T: np.ndarray, state: State, *, every: bool) -> np.ndarray:
        """One pass of one sequence: logits after the last token, [1, V], or after each, [T, V]."""
        logits = self._pass(tokens_1T, state, None, prefill=tokens_1T.shape[1] > 1, every=every)
        return logits[0] if every else logits

    # What callers use

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, text: bool = True
    ) -> Generation:
        """Answer prompts: a text, token ids, a chat (list of messages), or several of them. Iterate over the result for events.

        Args:
            text: False gives tokens only and needs no tokenizer.

        Raises:
            InputError: at once, for an empty prompt or one that does not fit the context.
        """
        several = _several(prompts)
        params = params or SamplingParams()
        if self.tasks is not None:
            if len(several) > 1:
                raise InputError(
                    f"{len(several)} prompts and tasks", expected="one prompt at a time", fix="ask one after another"
                )
            self._retrieve(self._ids(several[0]))
        if params.stop and not text:
            raise InputError("stop strings are given, but no text is made", fix="leave out text=False")
        return Generation(self, [self._ids(prompt) for prompt in several], params, text=text)

    def _retrieve(self, ids: list[int]) -> None:
        """Open the experts of the task that is nearest to a prompt, and no others."""
        assert self.tasks is not None
        if not ids or not 0 <= min(ids) <= max(ids) < self.facts.vocabulary:
            return  # the generation says what is wrong with it
        found = self.tasks.nearest(self.trunk.glance(np.asarray(ids, np.int64)[None]))
        self.trunk.restrict(found.kept)
        self.task = found.name
        self.changes = self._changes()
        self.packed = self._packed()

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        if prompt and isinstance(prompt[0], dict):
            return list(self.tokenizer.chat(prompt))
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        """Logits after every token and one record per MoE layer, a sequence at a time (core Runner)."""
        for tokens in tokens_BT:
            if not tokens or len(tokens) > self.facts.context:
                raise InputError(f"a sequence has {len(tokens)} tokens", expected=f"1 to {self.facts.context}", fix="cut it")
        for tokens in tokens_BT:
            array = np.asarray(tokens, np.int64)[None]
            state = self.trunk.start(1, len(tokens))
            self._sequences += 1
            self._watched, self._inputs, self._records, self._routers = True, inputs, [], []
            if isinstance(self.trunk, NativeTrunk):
                self.trunk.watch = self._told
            try:
                pieces = self.pieces(len(tokens), 1)
                logits = [self._pass(array[:, piece], state, None, prefill=True, every=True)[0] for piece in pieces]
                records = self._records
            finally:
                self._watched, self._records = False, []
                if isinstance(self.trunk, NativeTrunk):
                    self.trunk.watch = None
            layers, routers = len(self.facts.layers), self._routers
            found = []
            for ordinal in range(layers):
                experts, weights, *xy = (np.concatenate(part) for part in zip(*records[ordinal::layers], strict=True))
                told = [np.concatenate(part) for part in zip(*routers[ordinal::layers], strict=True)]
                found.append(LayerRecord(ordinal, Routing(experts, weights, *told[:1]), *xy, *told[1:]))
            yield RunnerOutput(np.concatenate(logits), tuple(found))

    def reading(self, capacity: int) -> EngineReading:
        """A sequence to be read forwards and back (core ReadingAccess). Raises CheckpointError when the files have changed."""
        self.begin()
        self._sequences += 1
        return EngineReading(self, capacity)

    def weights(self, key: ExpertKey) -> ExpertWeights:
        """One expert as it is computed with, float32 (core ExpertAccess). Read anew when it is not in memory; counts as no demand."""
        view = self.cache.views.get(key)
        if view is None:
            view, _ = load(self.store, self.reader, key)
        dense = (None if m is None else np.array(m.dequantise()) for m in (view.gate, view.up, view.down))
        biases = (None if b is None else b.copy() for b in (view.gate_bias, view.up_bias, view.down_bias))
        return ExpertWeights(*dense, *biases)  # type: ignore[arg-type]

    def trace(self) -> Trace:
        """What has been routed since the engine was opened. Raises InputError when it was opened without trace=True."""
        if self.recorder is None:
            raise InputError("nothing was recorded", fix="open the engine with trace=True, or run with --trace FILE")
        return self.recorder.trace()


def _checked(planes: int) -> int:
    if planes not in PLANES:
        raise InputError(f"quality is {planes}", expected=f"{', '.join(map(str, PLANES))} bits")
    return planes


def _several(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list: a text, a list of ids and a list of messages are one."""
    if isinstance(prompts, str) or not len(prompts) or isinstance(prompts[0], int | np.integer | dict):
        return [prompts]
    return list(prompts)
