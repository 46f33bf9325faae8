"""What does profiling cost: time beside the forward pass, memory of the statistics, bytes of the trace, and how fast it is replayed?

    python benchmarks/profiles.py [--quick] [--parts recording reading statistics trace] [--model FOLDER ...] [--output FILE]

recording  a model (the embedded one, or each --model) reads text with nothing watching and with every cheap probe, sequence by
           sequence in turn, through transformers and through the engine with half of its experts in memory
reading    what is read from disk for each token of the embedded model with a quarter of its experts in memory, by length of a pass
statistics every cheap probe on a million tokens of drawn routing, 16 layers of 64 experts, 8 active: memory, and time per token
trace      the same routing as a file: bytes per routed slot, time to open, and time to replay four policies at ten budgets, as
           a profile keeps it (sequences read whole) and as a decoder makes it (token by token), in one pool of slots and in one per layer
(This file is not called profile.py: Python's own module of that name would be hidden from programs started in this folder.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.experts import ExpertSpec
from moestro.core.layer import LayerFacts, LayerRecord, ModelFacts, RouterFacts, RunnerOutput
from moestro.core.routing import Routing
from moestro.core.trace import Trace
from moestro.engine.replay import sweep
from moestro.kernels import native
from moestro.profile.data import Piece, Texts, cut
from moestro.profile.probe import make, standard
from moestro.profile.run import Recording, available
from moestro.profile.sources import Document

LAYERS, EXPERTS, SLOTS, VOCABULARY, LENGTH = 16, 64, 8, 50304, 512
PARTS = ("recording", "reading", "statistics", "trace")
POLICIES = ["engine.evict.lru", "engine.evict.lfu", "engine.evict.arc", "engine.evict.belady"]


class Drawn:
    """A runner that has drawn its routing in advance: no model, so that what is measured is the recording alone."""

    def __init__(self, variety: int = 8) -> None:
        router, spec = RouterFacts("softmax"), ExpertSpec(2048, 1024)
        layers = tuple(LayerFacts(i, i, EXPERTS, SLOTS, spec, router) for i in range(LAYERS))
        self.facts = ModelFacts("drawn", "float32", VOCABULARY, 2048, LAYERS, 4096, layers, 0, 0, 0, "drawn")
        rng = np.random.default_rng(0)
        self._outputs = [self._output(rng) for _ in range(variety)]
        self._turn = 0

    def _output(self, rng: np.random.Generator) -> RunnerOutput:
        records = []
        for ordinal in range(LAYERS):
            logits = rng.standard_normal((LENGTH, EXPERTS)).astype(np.float32)
            ids = np.argsort(-logits, axis=1)[:, :SLOTS]
            weights = np.exp(np.take_along_axis(logits, ids, 1))
            records.append(LayerRecord(ordinal, Routing(ids, weights / weights.sum(1, keepdims=True), logits)))
        return RunnerOutput(np.zeros((LENGTH, 2), np.float32), tuple(records))

    def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        for _ in tokens_BT:
            self._turn += 1
            yield self._outputs[self._turn % len(self._outputs)]


def recording(sequences: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds of reading with and without probes, in turn."""
    from moestro.engine.engine import Engine
    from moestro.engine.memory import usage
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe
    from moestro.models.open import open_model
    from moestro.models.tokenizer import Tokenizer
    from moestro.testing.corpora import text

    length = min(LENGTH, describe(Checkpoint.open(folder)).facts.context)
    documents = [Document(domain, domain, text=text(domain, 30000)) for domain in ("documentation", "code")]
    texts = cut(documents, Tokenizer.open(folder), length=length, tokens=(sequences + 1) * length)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found = []
    for name in ("engine", "transformers"):
        budget = usage().resident + whole // 2  # what this process holds already is not the engine's
        runner: Any = open_model(folder) if name == "transformers" else Engine.open(folder, memory=budget, context=length)
        probes = make({probe: {} for probe in standard(available(runner, texts))})
        watched = Recording(runner, texts, probes)
        bare, full = [], []
        for i in range(len(texts.sequences)):
            tokens = texts.sequences[i].tokens_T.tolist()
            if len(tokens) < length:
                continue
            began = time.perf_counter()
            list(runner.run([tokens]))
            middle = time.perf_counter()
            watched.run(runner, [i])
            ended = time.perf_counter()
            bare.append(middle - began)
            full.append(ended - middle)
        bare, full = bare[1:], full[1:]  # the first warms up
        cost = [f / b - 1 for b, f in zip(bare, full)]
        alone = probes_alone(runner, texts, probes, length)
        row = {"what": "recording", "model": folder.name, "runner": name, "probes": len(probes), "sequences": len(bare)}
        row |= {"forward_s": statistics.median(bare), "watched_s": statistics.median(full), "cost": statistics.median(cost)}
        low, _, high = statistics.quantiles(cost, n=4)
        row |= {"cost_low": low, "cost_high": high, "probes_s": alone, "probes_share": alone / statistics.median(bare)}
        found.append(row)
        print(
            f"{folder.name} {name:13} {row['forward_s']:.3f} s per sequence of {length}, with {len(probes)} probes {100 * row['cost']:+.1f} %"
            f" (middle half {100 * low:+.1f} to {100 * high:+.1f}); the probes alone take {100 * row['probes_share']:.1f} %",
            flush=True,
        )
        if name == "engine":
            runner.close()
    return found


def reading(chunks: tuple[int, ...]) -> list[dict[str, Any]]:
    """What the engine reads from disk for each token, a quarter of the experts in memory, by the length of its passes."""
    from moestro.build.upcycle.default import ensure_default_model
    from moestro.engine.engine import Engine
    from moestro.engine.memory import usage
    from moestro.models.tokenizer import Tokenizer
    from moestro.testing.corpora import text

    folder = ensure_default_model()
    texts = cut([Document("code", "code", text=text("code", 10000))], Tokenizer.open(folder), length=LENGTH, tokens=2 * LENGTH)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with Engine.open(folder, memory=usage().resident + 2 * whole, context=LENGTH, chunk=max(chunks)) as engine:
        quarter = replace(engine.plan, slots=(sum(layer.num_experts for layer in engine.facts.layers) // 4,), scope="global")
    found, first = [], {}
    for chunk in chunks:
        with Engine.open(folder, plan=replace(quarter, chunk=chunk, predictor="engine.predict.none", pinned=())) as engine:
            made = Recording(engine, texts, make({probe: {} for probe in standard(available(engine, texts))}))
            engine.cache.table.reset_counts()
            made.run(engine)
            counts, size = engine.cache.table.counts(), engine.facts.layers[0].expert_bytes
            passes = sum(len(engine.pieces(len(s.tokens_T), 1)) for s in texts.sequences)
        arrays = made.profile().arrays
        first = first or arrays
        row = {"what": "reading", "chunk": chunk, "slots": quarter.slots[0], "tokens": texts.tokens, "passes": passes}
        row |= {"demands": counts.demands, "loads": counts.loads, "bytes_per_token": counts.loads * size / texts.tokens}
        row |= {"statistics": len(arrays), "equal_to_first": sum(np.array_equal(a, first[n]) for n, a in arrays.items())}
        found.append(row)
        print(
            f"reading       passes of {chunk}: {row['bytes_per_token'] / 1e6:.2f} MB per token,"
            f" {counts.loads / passes:.0f} of {counts.demands / passes:.0f} demanded experts read in a pass;"
            f" {row['equal_to_first']} of {len(arrays)} statistics as at first, bit for bit",
            flush=True,
        )
    return found


def probes_alone(runner: Any, texts: Texts, probes: Any, length: int) -> float:
    """Median seconds that recording one sequence takes when its forward pass has been done already."""
    i = next(i for i, s in enumerate(texts.sequences) if len(s.tokens_T) == length)
    (output,) = runner.run([texts.sequences[i].tokens_T.tolist()])

    class Done:
        facts = runner.facts

        def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
            yield output

    spent = []
    for _ in range(6):
        again = Recording(Done(), texts, probes)
        began = time.perf_counter()
        again.run(Done(), [i])
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def drawn_texts(tokens: int) -> Texts:
    rng = np.random.default_rng(1)
    zipf = 1 / np.arange(1, VOCABULARY + 1)
    pieces = []
    for i in range(max(1, tokens // LENGTH)):
        ids = rng.choice(VOCABULARY, LENGTH, p=zipf / zipf.sum()).astype(np.int32)
        ids[0] = 0  # the drawn runner has logits for two ids only; nothing of them is measured
        pieces.append(Piece(ids, np.full(LENGTH, i % 8, np.int16), np.ones(LENGTH, bool), i, 0))
    return Texts(tuple(pieces), tuple("abcdefgh"), (0,) * 8, "drawn")


def statistics_cost(tokens: int) -> tuple[list[dict[str, Any]], Trace]:
    """Memory and time of the statistics; and the trace of all tokens."""
    runner, texts = Drawn(), drawn_texts(tokens)
    names = [
        name for name in standard(frozenset({"logits"})) if not name.endswith(".loss")
    ]  # there is no vocabulary of logits here
    made = Recording(runner, texts, make({name: {} for name in names}), trace_tokens=10**9)
    began = time.perf_counter()
    made.run(runner)
    seconds = time.perf_counter() - began
    row = {
        "what": "statistics",
        "tokens": texts.tokens,
        "layers": LAYERS,
        "experts": EXPERTS,
        "slots": SLOTS,
        "probes": len(names),
    }
    row |= {"mb": made.nbytes / 1e6, "us_per_token": 1e6 * seconds / texts.tokens}
    print(f"statistics    {row['mb']:.0f} MB for {texts.tokens} tokens, {row['us_per_token']:.0f} us per token", flush=True)
    trace = made.trace()
    assert trace is not None
    return [row], trace


def trace_cost(trace: Trace) -> list[dict[str, Any]]:
    """Bytes, opening, and replays in both forms."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.trace"
        trace.save(path)
        slots = int(np.prod(trace.experts_LTK.shape))
        opened = []
        for _ in range(5):
            began = time.perf_counter()
            read = Trace.open(path)
            opened.append(time.perf_counter() - began)
        row = {
            "what": "trace",
            "tokens": trace.tokens,
            "bytes_per_slot": path.stat().st_size / slots,
            "open_s": statistics.median(opened),
        }
        found.append(row)
        print(f"trace         {row['bytes_per_slot']:.2f} bytes per slot, opens in {row['open_s']:.2f} s", flush=True)
        for scope, budgets in (("global", [i / 10 for i in range(1, 11)]), ("layer", [i / 16 for i in range(2, 12)])):
            for form, which in (("sequences read whole", read), ("token by token", by_token(read))):
                began, cpu = time.perf_counter(), time.process_time()
                sweep(which, None, budgets, POLICIES, scope=scope, null=False)
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                row = {"what": "replay", "form": form, "scope": scope, "tokens": which.tokens, "policies": POLICIES}
                row |= {"budgets": len(budgets), "s": seconds, "cpu_s": cpu}
                found.append(row)
                print(
                    f"replay        {form}, {scope}: {which.tokens} tokens in {seconds:.1f} s ({cpu:.1f} s of processor)",
                    flush=True,
                )
    return found


def by_token(trace: Trace) -> Trace:
    """The tokens as a decoder would make them: each a pass of its own."""
    steps, prefill = np.arange(trace.tokens, dtype=np.int32), np.zeros(trace.tokens, np.uint8)
    return replace(trace, steps_T=steps, prefill_T=prefill)


def machine() -> str:
    """The processor's name as the kernel knows it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens, few sequences")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--model", type=Path, action="append", help="read this one instead of the embedded model; may be repeated"
    )
    parser.add_argument("--sequences", type=int, default=12, help="how many of them are read")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    from moestro.build.upcycle.default import ensure_default_model

    rows: list[dict[str, Any]] = []
    if "recording" in options.parts:
        for folder in options.model or [ensure_default_model()]:
            rows += recording(4 if options.quick else options.sequences, folder)
    if "reading" in options.parts:
        rows += reading((512, 32) if options.quick else (512, 256, 128, 64, 32))
    if {"statistics", "trace"} & set(options.parts):
        found, trace = statistics_cost(100_000 if options.quick else 1_000_000)
        rows += found
        if "trace" in options.parts:
            rows += trace_cost(trace)
    if options.output:
        facts = {"machine": machine(), "cores": native.cores(), "level": native.level(), "date": str(date.today())}
        temporary = options.output.with_suffix(".partial")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(options.output)


if __name__ == "__main__":
    main()
