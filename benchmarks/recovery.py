"""What does a short training give back, and what do learned skipping and retrieval cost? On the model trained here, beside docs/compression.md.

    moestro train mixed --steps 500 -o RUN --export auto
    python benchmarks/recovery.py --trained RUN      stops and goes on: each finished cell is kept
    python benchmarks/recovery.py --reduced          under half a minute: a model of a few thousand parameters that it trains itself
    python benchmarks/recovery.py --list             what takes part

A cell starts from the original or from what a plan makes of it, trains it as `moestro train METHOD --model` does, on text that is not held
out, and reads the held-out text beside the original. Every training takes as many steps of as many tokens. A seed is a calibration text
and an order of the training text.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cells
import compression
import numpy as np
import shapes
from compression import SEEDS, Bench, Opened, Record, as_texts, of_training, probes_for
from compression_grid import Cell, Step, planned, share

from moestro.cli.arguments import method_choice
from moestro.cli.tune import USUAL, tune
from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.record import MANIFEST, read_plan_of, write_record
from moestro.compress.retrieval import retrieval
from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot
from moestro.core.plans.tasks import TaskPlan
from moestro.evaluate.comparison import compare
from moestro.models.checkpoint import Checkpoint
from moestro.models.open import Model, open_model
from moestro.profile.probe import make
from moestro.profile.profile import Profile
from moestro.profile.run import Recording
from moestro.train.config import TrainConfig
from moestro.train.data.stream import Stream
from moestro.train.data.tokens import open_tokens

QUESTION = "recovery"
STEPS, BATCH = 60, 4
SLOW = 1e-4  # the rate for whole models, tried where a method's own is another
TASK = "code"  # the domain that a task-specific model is made for
KINDS = ("criterion", "group", "sparsify", "skip")  # whose probes the profile needs
EVERYTHING = "plain training"  # every weight on the text's own loss
PRUNE, MERGE, ZEROS = "compress.criteria.reap", "compress.group.hierarchical", "compress.sparsify.moe_pruner"
QUERIES = (16, 64, 256)  # first tokens of a sequence by which its domain is looked up
RULED = 64  # the number of them that decides in the table
SOFTMAX = (("first", 2), ("threshold", -100.0))  # options of the probe: the two highest logits' softmax, whatever their signs


@dataclass(frozen=True, slots=True)
class Trial:
    """One cell. start: what is made of the original before the training. tuning: as `moestro train` takes it; '': none.

    kind: what it is an answer to. rate: of learning; None for the method's own. top_k: experts of a token, None for as many as it has.
    keep: of retrieval, experts of each layer that a task keeps; probe: how its profiles are made.
    """

    name: str
    level: str
    kind: str
    start: Step | None = None
    tuning: str = ""
    steps: int = 0
    rate: float | None = None
    top_k: int | None = None
    keep: int = 0
    probe: tuple[tuple[str, float], ...] = ()
    calibrated: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """What was trained, or retrieves; a learned tap comes with its training."""
        if self.keep:
            return ("compress.retrieval",)
        name = method_choice(self.tuning)[0]
        if not name or EVERYTHING in self.name or self.top_k:
            return ()
        taps = {"otp": "learned_mask", "compressed_experts": "compressed_experts"}
        return (f"train.tuning.{name}", *([f"layers.taps.{taps[name]}"] if name in taps else []))

    @property
    def key(self) -> str:
        """A digest of what is done."""
        start = self.start and [self.start.method, dict(self.start.wish)]
        said = asdict(replace(self, start=None)) | {"start": start, "batch": BATCH if self.steps else 0}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def trials(bench: str, experts: int, steps: int) -> list[Trial]:
    """What is tried with the text of `bench`, for layers of this many experts."""
    most, half = share(0.25), share(0.5)
    few, fewer = 3 * experts // 4, experts // 2
    plain = Trial(EVERYTHING, "", "plain", tuning=f"tsep:keep={experts}", steps=steps)  # as many as there are: none leaves
    if bench == "domains":
        ways = {"retrieval": (), "retrieval, softmax": SOFTMAX}
        return [Trial(n, f"keep {k}", "retrieval", keep=k, probe=way) for n, way in reversed(ways.items()) for k in (few, fewer)]
    tasks = [Trial("tsep", f"keep {keep}", "task", tuning=f"tsep:keep={keep}", steps=steps) for keep in (few, fewer)]
    patches = {"low_rank": "low_rank:rank=8", "low_rank of experts": "low_rank:rank=8,experts=true"}
    recovers = {"router_norms": "router_norms"} | patches

    recovers |= {EVERYTHING: f"tsep:keep={fewer}"}

    def pruned(ratio: float, level: str, names: Sequence[str]) -> list[Trial]:
        start = Step(PRUNE, {"ratio": ratio})
        trained = [Trial(f"reap + {name}", level, "pruned", start, recovers[name], steps) for name in names]
        return [Trial("reap", level, "pruned", start), *trained]

    if bench == TASK:
        return [*pruned(0.5, half, ("router_norms", "low_rank of experts", EVERYTHING)), *tasks, plain]
    found = [plain, *pruned(0.5, half, tuple(recovers))]
    for level, options in (("half zeros", {"ratio": 0.5}), ("2:4", {"pattern": "2:4"})):
        start = Step(ZEROS, {"options": options})
        found += [Trial("moe_pruner", level, "zeros", start)]
        found += [Trial("moe_pruner + expert_wise", level, "zeros", start, "expert_wise", steps)]
    for name, options in (("odp", {"share": 0.25}), ("odp", {"share": 0.5}), ("fewer", {"average": 1.0})):
        level = next(f"{key} {value:g}" for key, value in options.items())
        found.append(Trial(name, level, "skip", Step(f"compress.skip.{name}", {"options": options})))
    found += [Trial("otp", f"price {p:g}", "skip", tuning=f"otp:price={p}", steps=steps) for p in (0.02, 0.1)]
    found += [Trial("compressed_experts", "1 of 2", "skip", tuning="compressed_experts", steps=steps)]
    found += [Trial("top-1", "1 of 2", "skip", top_k=1, calibrated=False)]
    found += [replace(plain, name="top-1, trained", level="1 of 2", kind="skip", top_k=1)]
    start = Step(MERGE, {"ratio": 0.25, "fuse": "frequency"})
    found += [Trial("hierarchical", most, "merged", start)]
    found += [Trial("hierarchical + router_norms", most, "merged", start, "router_norms", steps)]
    found += [*pruned(0.25, most, ("router_norms", *patches)), *tasks]
    slow = [
        c
        for c in found
        if c.level in (half, "price 0.02") and c.tuning in ("router_norms", "low_rank:rank=8,experts=true", "otp:price=0.02")
    ]
    return [*found, *(replace(c, name=f"{c.name}, rate {SLOW:g}", rate=SLOW) for c in slow)]


class Taught(Opened):
    """A model, its held-out text, and the text that it is trained on: a run's tokens, its domains weighted.

    domains: the same of each domain, for retrieval.
    """

    def __init__(
        self, bench: Bench, work: Path, run: Path, weights: dict[str, float], domains: dict[str, Bench] | None = None
    ) -> None:
        super().__init__(bench, work)
        self.run, self.weights, self.domains = run, weights, domains or {}
        self.config = TrainConfig.from_json(shapes.read_json(run / "train.json"))
        self._profiles: dict[tuple[Any, ...], Profile] = {}

    def measure(self, cell: Any, seed: int) -> dict[str, Any]:
        """Make, train, judge."""
        if cell.keep:
            return self._retrieved(cell, seed)
        started = self._started(cell, seed)
        folder, told = self._trained(cell, started, seed) if cell.tuning else (started, {})
        model = open_model(folder, "float32")
        facts = model.facts
        told |= judged(model, folder, self) | {
            "expert_bytes": facts.expert_bytes,
            "bytes": facts.expert_bytes + facts.trunk_bytes,
        }
        if cell.kind == "zeros":
            told |= zeros(started, folder)
        if folder != started:
            shutil.rmtree(folder)
        return told

    def _started(self, cell: Trial, seed: int) -> Path:
        """The model before its training: written once."""
        if cell.start is None and cell.top_k is None:
            return self.bench.path
        key = replace(cell, name="", kind="", level="", tuning="", steps=0, rate=None).key
        folder = self.work / "started" / f"{self.layout.facts.fingerprint[:12]}-{self.bench.name}-{key}-{seed}"
        if (folder / "config.json").exists():
            return folder
        if cell.start is None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in self.bench.path.iterdir():
                if file.name != "config.json":
                    (folder / file.name).symlink_to(file.resolve())
            shapes.write_json(folder / "config.json", self.checkpoint.config | {"num_experts_per_tok": cell.top_k})
            return folder
        profile = self.profile(seed)
        plan = planned(Cell("", "", "", (cell.start,)), self.checkpoint, self.layout, profile, seed)
        encoder = Encoder(plan, self.layout.facts, profile)
        folder.parent.mkdir(parents=True, exist_ok=True)
        compress(plan, self.checkpoint, self.layout, folder, encoder=encoder, overwrite=True)
        write_record(plan, self.checkpoint, self.layout.facts, folder)
        return folder

    def _trained(self, cell: Trial, started: Path, seed: int) -> tuple[Path, dict[str, Any]]:
        """By the command's own function, on the tokens that are there. Returns its folder and what it cost."""
        out = self.work / "trained" / f"{self.bench.name}-{cell.key}-{seed}"
        training = out.with_name(out.name + ".training")
        for folder in (out, training):
            shutil.rmtree(folder, ignore_errors=True)
        training.mkdir(parents=True)
        (training / "tokens").symlink_to((self.run / "tokens").resolve())
        data, rate = self.config.data, [] if cell.rate is None else [f"optimiser.rate={cell.rate}"]
        said = {"data.length": data.length, "data.holdout": data.holdout, "data.weights": json.dumps(self.weights)}
        said |= {"batch": BATCH, "seed": 2000 + seed, "evaluate_sequences": 1}
        settings = [f"{name}={value}" for name, value in said.items()]
        teacher = str(self.bench.path) if cell.start is not None else None
        began, printed = time.process_time(), io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = tune(cell.tuning, str(started), teacher, [self.bench.name], out, cell.steps, settings + rate, 1, True, True)
        if code:
            raise SystemExit(code)
        report = json.loads(printed.getvalue())
        tokens = cell.steps * BATCH * data.length
        return out, {"tokens": tokens, "rate": report["rate"], "train_seconds": round(time.process_time() - began, 1)}

    def _retrieved(self, cell: Trial, seed: int) -> dict[str, Any]:
        """Each domain's text read with its own experts, with each other domain's, and with those that its beginning finds."""
        profiles = [(name, self._of_domain(bench, seed, cell.probe)) for name, bench in self.domains.items()]
        plan = retrieval(profiles, self.layout.facts, self.checkpoint.source, keep=cell.keep)
        size, trunk = (
            cell.keep * self.layout.facts.expert_bytes // self.layout.facts.layers[0].num_experts,
            self.layout.facts.trunk_bytes,
        )
        return read_by_task(plan, self) | {"expert_bytes": size, "bytes": size + trunk}

    def _of_domain(self, bench: Bench, seed: int, options: tuple[tuple[str, float], ...]) -> Profile:
        key = bench.name, seed, options
        if key not in self._profiles:
            probes = make(probes_for({"compress.criteria.premoe"}, None) | {"selection": {"first": 1} | dict(options)})
            recording = Recording(self.model, as_texts(bench.calibration(seed)), probes, trace_tokens=0)
            recording.run(self.model)
            self._profiles[key] = recording.profile()
        return self._profiles[key]


def judged(model: Model, folder: Path, opened: Opened) -> dict[str, Any]:
    """Of a trained or changed model, beside the original."""
    whole = [[(e,) for e in range(la.num_experts)] for la in model.facts.layers]
    made = (folder / MANIFEST).exists()
    origins = [[la.slots[r.slot].sources for r in la.routed] for la in read_plan_of(folder).layers] if made else whole
    found = compare(model, opened.original, opened.bench.held_out, origins)
    return {
        "perplexity": found.quality.perplexity,
        "ratio": found.quality.perplexity / found.reference.perplexity,
        "kl": found.quality.kl,
        "kl_error": found.kl_error,
        "agreement": found.agreement,
        "skipped": found.skipped,
    }


def zeros(before: Path, after: Path) -> dict[str, Any]:
    """Of the experts' weights: the share that was 0 before the training, and how many of those are not 0 any more."""
    one, other = Checkpoint.open(before), Checkpoint.open(after)
    count = empty = gone = 0
    for name in (n for n in one.tensors if ".experts." in n):
        was, now = one.read(name), other.read(name)
        count, empty, gone = count + was.size, empty + int((was == 0).sum()), gone + int(((was == 0) & (now != 0)).sum())
    return {"zeros": empty / max(1, count), "zeros_lost": gone}


def read_by_task(plan: TaskPlan, taught: Taught) -> dict[str, Any]:
    """Perplexities over the original's, and how often a sequence's first tokens find its own domain."""
    more, kl, reached = {}, {}, []
    for task in plan.tasks:
        layers = tuple(LayerChange(i, tuple(Slot((e,)) for e in ids)) for i, ids in enumerate(task.kept))
        model = compress_live(CompressionPlan(subjects=plan.subjects, method=plan.method, layers=layers), taught.model)
        origins = [[slot.sources for slot in la.slots] for la in layers]
        for name, bench in taught.domains.items():
            judged = compare(model, taught.original, bench.held_out, origins)
            assert judged.quality.kl_N is not None
            rows = len(bench.held_out)
            more[task.name, name] = (judged.quality.nll_N - judged.reference.nll_N).reshape(rows, -1).mean(1)
            kl[task.name, name] = judged.quality.kl_N.reshape(rows, -1).mean(1)
            reached += [judged.agreement] if task.name == name else []
    domains: dict[str, dict[str, Any]] = {}
    for name, bench in taught.domains.items():
        logits = [np.asarray(out.records[0].routing.logits_TE) for out in taught.original.run(bench.held_out)]
        found = {n: [plan.nearest(logits_TE[:n]).name for logits_TE in logits] for n in QUERIES}
        domains[name] = {
            "own": math.exp(more[name, name].mean()),
            "worst": max(math.exp(more[t.name, name].mean()) for t in plan.tasks if t.name != name),
            "found": math.exp(float(np.mean([more[task, name][i] for i, task in enumerate(found[RULED])]))),
            "kl": float(np.mean([kl[task, name][i] for i, task in enumerate(found[RULED])])),
            "accuracy": {str(n): sum(task == name for task in tasks) / len(tasks) for n, tasks in found.items()},
        }

    def over(key: str) -> float:
        return math.exp(statistics.fmean(math.log(d[key]) for d in domains.values()))

    return {
        **{key: over(key) for key in ("own", "worst")},
        "ratio": over("found"),
        "kl": statistics.fmean(d["kl"] for d in domains.values()),
        "agreement": statistics.fmean(reached),
        "accuracy": {str(n): statistics.fmean(d["accuracy"][str(n)] for d in domains.values()) for n in QUERIES},
        "domains": domains,
    }


class Trials(Record):
    """The results file."""

    question = QUESTION

    def write(self, **more: Any) -> None:
        """With the summary of the cells that are there, so that a stopped run can be shown."""
        rows = summary(self.report["cells"])
        super().write(**more, versions=cells.versions(), summary=rows, methods=by_method(rows))

    def line(self, found: dict[str, Any]) -> str:
        return "ratio {ratio:.4f}  KL {kl:.4f}  ".format(**found) + f"({found.get('train_seconds', 0)} s)"


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each text, name and level: means over seeds, and the share that the training gave back of what the start had lost.

    lost: log perplexity over the original's before the training, of those starts that lost something, paired by seed. A model that was
    trained on the text can become better than the original, so `against_plain` is the perplexity over that of the original after as
    long a training of everything on the same text, where there is one.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in found.values():
        groups.setdefault((cell["model"], cell["name"], cell["level"]), []).append(cell)
    rows = []
    for (model, name, level), some in groups.items():
        row = {"model": model, "name": name, "level": level, "kind": some[0]["kind"], "methods": some[0]["methods"]}
        if broken := [c["error"] for c in some if "error" in c]:
            rows.append(row | {"error": broken[0]})
            continue
        row |= {"seeds": sorted(c["seed"] for c in some), "ratio": geometric([c["ratio"] for c in some])}
        row |= {"low": min(c["ratio"] for c in some), "high": max(c["ratio"] for c in some)}
        for key in (
            "kl",
            "agreement",
            "skipped",
            "bytes",
            "expert_bytes",
            "tokens",
            "rate",
            "train_seconds",
            "zeros",
            "zeros_lost",
        ):
            if all(key in c for c in some):
                row[key] = statistics.fmean(c[key] for c in some)
        for key in ("own", "worst"):
            if key in some[0]:
                row[key] = geometric([c[key] for c in some])
        if "accuracy" in some[0]:
            row["accuracy"] = {n: statistics.fmean(c["accuracy"][n] for c in some) for n in some[0]["accuracy"]}
        starts, plain = of(groups, (model, name.partition(" + ")[0], level)), of(groups, (model, EVERYTHING, ""))
        if " + " in name and starts.keys() >= set(row["seeds"]):
            row["started"] = geometric([starts[s]["ratio"] for s in row["seeds"]])
            row["started_kl"] = statistics.fmean(starts[s]["kl"] for s in row["seeds"])
            row["given_back"] = 1 - math.log(row["ratio"]) / math.log(row["started"])
        if row.get("tokens") and plain.keys() >= set(row["seeds"]):
            row["against_plain"] = row["ratio"] / geometric([plain[s]["ratio"] for s in row["seeds"]])
        rows.append(row)
    return rows


def of(groups: dict[tuple[str, str, str], list[dict[str, Any]]], which: tuple[str, str, str]) -> dict[int, dict[str, Any]]:
    """The cells of a row that were measured, by seed."""
    return {c["seed"]: c for c in groups.get(which, []) if "error" not in c}


def geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def by_method(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For the pages of the methods: their rows, with what the model had lost before."""
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        if "error" in row or row["model"] not in SHOWN:
            continue
        some = f" ({row['low']:.4f} to {row['high']:.4f})" if len(row["seeds"]) > 1 else ""
        before = f"{row['started']:.4f}" if "started" in row else "1"
        told = [SHOWN[row["model"]], row["name"], row["level"], before, f"{row['ratio']:.4f}{some}", f"{row['kl']:.4f}"]
        for method in row["methods"]:
            tables.setdefault(method, []).append(told)
    head = ["text", "what", "level", "perplexity before, original = 1", "after (range of seeds)", "KL after"]
    return {"page": "compression.md#what-training-gives-back", "head": head, "tables": tables}


SHOWN = {"mixed": "all domains", TASK: "code alone", "domains": "each domain"}


def texts(run: Path, domain: str, held_out: int, calibration: int) -> tuple[list[list[int]], Callable[[int], list[list[int]]]]:
    """Of one domain of a training run's text: sequences that it never saw, and others of what it was trained on."""
    tokens, data = open_tokens(run / "tokens"), TrainConfig.from_json(shapes.read_json(run / "train.json")).data

    def stream(seed: int) -> Stream:
        return Stream(tokens, length=data.length, holdout=data.holdout, weights={domain: 1.0}, seed=seed)

    places = stream(0).held_out_places(held_out)[[d.name for d in tokens.domains].index(domain)]
    rows = stream(0).gather(places).tokens_BT.tolist()
    return rows, lambda seed: stream(1000 + seed).batch(0, calibration).tokens_BT.tolist()


def taught(run: Path, work: Path, name: str, held_out: int, calibration: int, seeds: Sequence[int]) -> Taught:
    """The model of a training run with the text of this name."""
    weights = dict(TrainConfig.from_json(shapes.read_json(run / "train.json")).data.weights)
    own = tuple(seeds)
    if name == "mixed":
        return Taught(Bench(name, run / "auto", KINDS, *of_training(run, held_out, calibration), own), work, run, weights)
    if name == TASK:
        return Taught(Bench(name, run / "auto", KINDS, *texts(run, TASK, held_out, calibration), own), work, run, {TASK: 1.0})
    names = [d.name for d in open_tokens(run / "tokens").domains]
    each = {d: Bench(d, run / "auto", KINDS, *texts(run, d, held_out, calibration), own) for d in names}
    whole = Bench(
        name, run / "auto", KINDS, [row for b in each.values() for row in b.held_out],
        lambda seed: [row for b in each.values() for row in b.calibration(seed)], own,
    )  # fmt: skip
    return Taught(whole, work, run, weights, each)


def tiny(work: Path) -> Path:
    """A run of a model of a few thousand parameters on text of two kinds."""
    from moestro.train.config import changed
    from moestro.train.parallel import Group
    from moestro.train.session import keep, start

    run = work / "run"
    if (run / "auto").exists():
        return run
    rng = np.random.default_rng(0)
    kinds = {
        "words": ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"),
        TASK: ("def", "f(x):", "return", "x + 1"),
    }
    files = []
    for name, words in kinds.items():
        files.append(f"{name}={work / name}.txt")
        (work / f"{name}.txt").write_text(" ".join(rng.choice(words, 4000)), encoding="utf-8")
    model = {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "num_experts": 8, "top_k": 2, "d_expert": 32}
    given = {"steps": 60, "batch": 8, "save_every": 0, "optimiser": {"rate": 0.01}}
    weights = dict.fromkeys(kinds, 1.0)
    config = changed({**given, "data": {"sources": files, "length": 32, "weights": weights}, "model": model})
    loop = start(config, run, Group())
    loop.run()
    keep(loop, ("auto",))
    return run


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trained", type=Path, metavar="RUN", help="folder of `moestro train mixed --export auto`")
    p.add_argument("--texts", nargs="+", choices=tuple(SHOWN), default=list(SHOWN))
    p.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="cells whose name begins so")
    p.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    p.add_argument("--steps", type=int, default=STEPS, help=f"of each training, {BATCH} sequences each")
    p.add_argument("--reduced", action="store_true", help="one seed, a model of a few thousand parameters")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so long; the same command goes on")
    p.add_argument("--work", type=Path, default=cells.default_work() / QUESTION, help="folder for profiles and models")
    p.add_argument("--fresh", action="store_true", help="measure the chosen cells again")
    p.add_argument("--out", type=Path, help="results file; by default in benchmarks/results/, reduced in the work folder")
    p.add_argument("--list", action="store_true", help="only say what takes part")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args, began = arguments(argv), time.monotonic()
    only = tuple(args.only)
    if args.list:
        for name in args.texts:
            for cell in trials(name, 16, args.steps):
                if cell.name.startswith(only):
                    print(f"{SHOWN[name]:12} {cell.name:32} {cell.level:12} {cell.tuning:32} {', '.join(cell.methods)}")
        return 0
    import torch

    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    run = tiny(args.work) if args.reduced else args.trained
    if run is None or not (run / "train.json").exists():
        raise SystemExit("--trained names no run; make it with: moestro train mixed --steps 500 -o RUN --export auto")
    sizes = (4, 8) if args.reduced else (16, 32)
    steps, seeds = (4, SEEDS[:1]) if args.reduced else (args.steps, args.seeds)
    length = TrainConfig.from_json(shapes.read_json(run / "train.json")).data.length
    record = Trials(args.out or compression.path_of(args, QUESTION), fresh=args.fresh)
    record.report["settings"] = {"steps": steps, "batch": BATCH, "length": length, **{k: USUAL[k] for k in ("optimiser", "rate")}}
    for seed in seeds:  # seed by seed: what was stopped has every method
        for name in args.texts:
            opened = taught(run, args.work, name, *sizes, seeds)
            digest = record.describe(opened)
            for cell in trials(name, opened.layout.facts.layers[0].num_experts, steps):
                if not cell.name.startswith(only) or not (cell.calibrated or seed == SEEDS[0]):
                    continue
                if time.monotonic() - began > 60 * args.minutes:
                    cells.say("stopped, as --minutes says; the same command goes on")
                    return 0
                record.measure(opened, digest, cell, seed)
    cells.say(str(record.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
