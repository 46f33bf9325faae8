"""Turns prompts into streams of text: prefill in chunks, decode, sampling, stop strings, and an account of what it took.

Shapes: B sequences, T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import InputError
from moestro.engine import memory
from moestro.engine.sample import Sampler, SamplingParams

if TYPE_CHECKING:
    from moestro.core.plans.residency import Forecast
    from moestro.engine.engine import Engine

Chat = list[dict[str, Any]]
Prompt = str | list[int] | Chat


@dataclass(frozen=True, slots=True)
class Event:
    """New text of one sequence. finish: None while it goes on, else 'eos', 'stop', 'length', 'context' or 'interrupted'."""

    sequence: int
    text: str
    tokens: tuple[int, ...] = ()
    finish: str | None = None


@dataclass(slots=True)
class Result:
    """One sequence's answer. tokens: all that were drawn, an end token included. text: without it and without the stop string."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a generation took. Rates in tokens/s over all sequences; bytes as asked of the disk; memory as the kernel counts it.

    decode_tokens: tokens that came from decode passes (each sequence's first token comes from prefill).
    exact: every number is the checkpoint's; else `changes` says what is not. packed: the folder of packed or compressed weights whose numbers
    all were used as they are, '' without one. routed, skipped: chosen experts, and how many of them taps on the routing left out.
    """

    prompt_tokens: int
    generated_tokens: int
    decode_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefill_hit_rate: float
    decode_hit_rate: float
    prefill_bytes: int
    decode_bytes: int
    peak_memory: int
    cgroup_peak: int | None
    budget: int | None
    exact: bool
    changes: tuple[str, ...]
    forecast: Forecast | None
    packed: str = ""
    routed: int = 0
    skipped: int = 0

    @classmethod
    def total(cls, several: Sequence[Statistics]) -> Statistics:
        """One account of several generations of one engine, in their order. Hit rates are means over tokens."""
        counts = ("prompt_tokens", "generated_tokens", "decode_tokens", "routed", "skipped")
        sums = (*counts, "prefill_seconds", "decode_seconds", "prefill_bytes", "decode_bytes")
        summed: dict[str, float] = {name: sum(getattr(one, name) for one in several) for name in sums}
        for rate, tokens in (("prefill_hit_rate", "prompt_tokens"), ("decode_hit_rate", "decode_tokens")):
            summed[rate] = sum(getattr(one, rate) * getattr(one, tokens) for one in several) / max(1, summed[tokens])
        return replace(several[-1], **summed)  # type: ignore[arg-type]  # peaks and changes are the engine's own, the last ones are of all

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per decoded token."""
        return self.decode_bytes / self.decode_tokens if self.decode_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the rates."""
        rates = {name: getattr(self, name) for name in ("prefill_rate", "decode_rate", "bytes_per_token")}
        return asdict(self) | {"changes": list(self.changes)} | rates

    def summary(self) -> str:
        """A few lines for people."""
        mib = 1024**2
        lines = [
            f"prompt {self.prompt_tokens} tokens at {self.prefill_rate:.1f}/s, answer {self.generated_tokens} tokens at {self.decode_rate:.2f}/s",
            f"decode: {100 * self.decode_hit_rate:.1f} % of experts were in memory, {self.bytes_per_token / 1e6:.2f} MB read per token",
        ]
        at_most = f" of {self.budget / mib:.0f} allowed" if self.budget else ""
        charged = f", {self.cgroup_peak / mib:.0f} MiB charged to the cgroup" if self.cgroup_peak is not None else ""
        lines.append(f"peak memory {self.peak_memory / mib:.0f} MiB{at_most}{charged}")
        if (f := self.forecast) is not None and self.decode_tokens:
            lines.append(
                f"predicted {f.tokens_per_second_low:.1f}-{f.tokens_per_second_high:.1f} tokens/s at {100 * f.hit_rate:.0f} % hits, "
                f"measured {self.decode_rate:.1f} at {100 * self.decode_hit_rate:.0f} %"
            )
        if self.routed:
            lines.append(
                f"{self.skipped} of {self.routed} chosen experts were skipped ({100 * self.skipped / self.routed:.1f} %)"
            )
        lines.append("EXACT: every number is the checkpoint's" if self.exact else "SHRUNK: " + "; ".join(self.changes))
        if self.packed and not self.exact:
            lines.append(f"EXACT to the packed model: every number is that of {self.packed}")
        return "\n".join(lines)


class StopText:
    """Finds stop strings in a stream, holding back text that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now; sets `stopped` when a stop string is complete, which is never shown."""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@contextmanager
def interruptible(flag: threading.Event) -> Iterator[None]:
    """Within, the first Ctrl-C sets `flag`, for the engine to stop between two layers; the second raises at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield  # someone else has decided what Ctrl-C means
        return

    def once(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Sequence:
    """One sequence on its way."""

    def __init__(self, number: int, prompt: list[int], params: SamplingParams, engine: Engine, room: int, text: bool) -> None:
        self.number, self.prompt, self.params = number, prompt, params
        self.sampler = Sampler(params, prompt)
        self.result = Result(len(prompt))
        self.limit = min(params.max_tokens, room)
        self.stop = StopText((*params.stop, *(() if params.ignore_eos or not text else engine.tokenizer.stops)))
        self.eos = () if params.ignore_eos else engine.eos_ids
        self.decoder = engine.tokenizer.stream(prompt) if text else None

    def take(self, logits_V: np.ndarray) -> Event:
        """Draw the next token and say what is new."""
        result = self.result
        token = self.sampler(logits_V)
        result.tokens.append(token)
        if token in self.eos:
            result.finish = "eos"
        shown = ""
        if self.decoder is not None and result.finish is None:
            shown = self.stop.feed(self.decoder.add(token))
            if self.stop.stopped:
                result.finish = "stop"
        if result.finish is None and len(result.tokens) >= self.limit:
            result.finish = "length" if self.limit == self.params.max_tokens else "context"
        if result.finish is not None:
            shown += self._rest()
        result.text += shown
        return Event(self.number, shown, (token,), result.finish)

    def interrupt(self) -> Event:
        """End it where it is."""
        self.result.finish = "interrupted"
        shown = self._rest()
        self.result.text += shown
        return Event(self.number, shown, (), "interrupted")

    def _rest(self) -> str:
        if self.decoder is None or self.stop.stopped:
            return ""
        shown = self.stop.feed(self.decoder.finish())
        return shown if self.stop.stopped else shown + self.stop.flush()


class Generation:
    """A running generation: iterate over it for events; afterwards `results` and `statistics` are complete.

    Ctrl-C ends it between two layers: the sequences get finish 'interrupted', `interrupted` is set, nothing is raised and the
    engine can go on with something else.
    """

    def __init__(self, engine: Engine, prompts: list[list[int]], params: SamplingParams, *, text: bool = True) -> None:
        self.engine, self.params = engine, params
        self.interrupted = False
        room = engine.context
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {number} is empty", expected="at least one token", fix="give it some text")
            if len(prompt) >= room:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens",
                    expected=f"fewer than {room}, the context",
                    fix="shorten it" + (" or raise --context" if room < engine.facts.context else ""),
                )
            if max(prompt) >= engine.facts.vocabulary or min(prompt) < 0:
                raise InputError(
                    f"prompt {number} has a token outside 0..{engine.facts.vocabulary - 1}", fix="use this model's tokenizer"
                )
        self._sequences = [_Sequence(n, p, params, engine, room - len(p), text) for n, p in enumerate(prompts)]
        self.results = [s.result for s in self._sequences]
        self.statistics: Statistics | None = None
        self._spent = {True: 0.0, False: 0.0}
        self._decoded = 0

    def __iter__(self) -> Iterator[Event]:
        engine = self.engine
        engine.begin()
        batch = engine.plan.batch
        try:
            with interruptible(engine.stop):
                for start in range(0, len(self._sequences), batch):
                    yield from self._group(self._sequences[start : start + batch])
        except KeyboardInterrupt:
            self.interrupted = True
            for sequence in self._sequences:
                if sequence.result.finish is None:
                    yield sequence.interrupt()
        finally:
            engine.stop.clear()
            self.statistics = self._account()

    def run(self) -> list[Result]:
        """Generate everything and return the results."""
        for _ in self:
            pass
        return self.results

    def _group(self, group: list[_Sequence]) -> Iterator[Event]:
        engine = self.engine
        longest = max(len(s.prompt) for s in group)
        tokens_BT = np.zeros((len(group), longest), np.int64)
        valid_BT = np.zeros((len(group), longest), bool)
        for row, sequence in enumerate(group):
            tokens_BT[row, longest - len(sequence.prompt) :] = sequence.prompt
            valid_BT[row, longest - len(sequence.prompt) :] = True
        began = time.perf_counter()
        capacity = longest + max(min(s.limit, engine.context - longest) for s in group)
        state = engine.trunk.start(len(group), capacity)
        try:
            logits_BV = engine.prefill(tokens_BT, state, None if valid_BT.all() else valid_BT)
        finally:
            self._spent[True] += time.perf_counter() - began
        for row, sequence in enumerate(group):
            yield sequence.take(logits_BV[row])
        while any(s.result.finish is None for s in group):
            going_B = np.array([s.result.finish is None for s in group])
            last_B1 = np.array([[s.result.tokens[-1]] for s in group], np.int64)
            began = time.perf_counter()
            try:
                logits_BV = engine.decode(last_B1, state, None if going_B.all() and state.valid_BT is None else going_B[:, None])
            finally:
                self._spent[False] += time.perf_counter() - began
            self._decoded += int(going_B.sum())
            for row, sequence in enumerate(group):
                if going_B[row]:
                    yield sequence.take(logits_BV[row])

    def _account(self) -> Statistics:
        engine = self.engine
        used = memory.usage()
        table, cache = engine.cache.table, engine.cache
        changes = engine.changes
        return Statistics(
            prompt_tokens=sum(r.prompt_tokens for r in self.results if r.tokens),
            generated_tokens=sum(len(r.tokens) for r in self.results),
            decode_tokens=self._decoded,
            prefill_seconds=self._spent[True],
            decode_seconds=self._spent[False],
            prefill_hit_rate=table.counts(prefill=True).hit_rate,
            decode_hit_rate=table.counts(prefill=False).hit_rate,
            prefill_bytes=cache.bytes_read(prefill=True),
            decode_bytes=cache.bytes_read(prefill=False),
            peak_memory=used.peak,
            cgroup_peak=used.charged_peak if used.limit is not None else None,
            budget=engine.plan.memory.budget or None,
            exact=not changes,
            changes=changes,
            forecast=engine.plan.forecast,
            packed=engine.packed,
            routed=engine.taps.shown if engine.taps is not None else 0,
            skipped=engine.taps.shown - engine.taps.left if engine.taps is not None else 0,
        )
