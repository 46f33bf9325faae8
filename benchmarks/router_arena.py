"""Which router, balance loss or architecture, at equal size and equal tokens? A small-scale arena.

Every method of the catalogue that can be a causal language model trains the same small model (see `arena_contenders.py`) from the same seeds on
the same text in the same order: the domains of the recipe `mixed`, byte by byte. Then, on text that was held out: the loss, how even and how
settled the routing is, and what it knows of the domain. Last, in a pass of its own, the time of a step.

    python benchmarks/router_arena.py                    # about an hour of one core; stop and start it as you like
    python benchmarks/router_arena.py --reduced          # 10 minutes: one seed, a quarter of the steps
    python benchmarks/router_arena.py --only Switch hash # cells of some contenders

A cell (contender, seed) is trained once and kept while its configuration, the text and torch stay the same; the commit that trained it stands beside it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import arena_summary
import cells
import limits
import numpy as np
import shapes
import torch
from arena_contenders import BASELINE, Contender, Shape, contenders
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.errors import MoestroError
from moestro.core.routing import EMPTY, RouteContext, Routing
from moestro.layers.block import BlockOutput, MoEBlock
from moestro.layers.decoder import build
from moestro.layers.dispatch import order_of
from moestro.layers.experts import ExpertBank
from moestro.layers.stages import mask_of
from moestro.profile.measures.domain_specialisation import information
from moestro.train.config import DataConfig, TrainConfig, read_config
from moestro.train.data.stream import Stream, drawn
from moestro.train.data.text import read
from moestro.train.data.tokens import Tokens, open_tokens, prepare
from moestro.train.loop import Loop
from moestro.train.measure import Meter
from moestro.train.objective import make, run
from moestro.train.parallel import Group

QUESTION = "router_arena"
SEEDS = (0, 1, 2)
LATE = 0.8  # churn is what changes between here and the end
SHUFFLES = 50
REDUCED = {"steps": 100, "held_out": 16}


@dataclass(frozen=True, slots=True)
class Arena:
    """What all cells have in common."""

    shape: Shape
    data: DataConfig
    tokens: Tokens

    @property
    def settings(self) -> dict[str, Any]:
        text = {domain.name: domain.tokens for domain in self.tokens.domains}
        return {
            "shape": asdict(self.shape),
            "text": text,
            "weights": dict(self.data.weights),
            "digest": self.tokens.digest,
            "torch": torch.__version__,
        }

    def loop(self, contender: Contender, seed: int) -> Loop:
        """A run at its start."""
        config = self.config(contender, seed)
        size = config.micro(1)[0]
        stream = Stream(
            self.tokens,
            length=config.data.length,
            holdout=config.data.holdout,
            weights=config.data.weights,
            seed=seed,
            group=size if config.data.pure else 1,
        )
        return Loop(
            config,
            build(config.model),
            stream,
            self.tokens.folder,
            objective=make(config.objective, "objective"),
            phases=[make(part, "training schedule") for part in config.phases],
        )

    def config(self, contender: Contender, seed: int) -> TrainConfig:
        return contender.config(self.shape, self.data, self.tokens.vocabulary, seed)


@dataclass(frozen=True, slots=True)
class Held:
    """Held-out text read once: nats per token by domain, the chosen experts mask_RTE of each routing, and the spread over experts."""

    losses: dict[str, float]
    chosen: list[Tensor]
    domain_S: np.ndarray
    figures: dict[str, float]


@torch.no_grad()
def held_out(loop: Loop) -> Held:
    """Every domain's held-out sequences, the domains in turn as capacities and batches meet them in training, as the model is now."""
    stream, meter = loop.stream, Meter(loop.module)
    loop.module.eval()
    by_domain = stream.held_out_places(loop.config.evaluate_sequences)
    places = [row for turn in zip_longest(*by_domain) for row in turn if row is not None]
    losses: list[Tensor] = []
    chosen: list[list[Tensor]] = []
    with meter.watching():
        for i in range(0, len(places), 16):
            batch = stream.gather(places[i : i + 16])
            rng = torch.Generator().manual_seed(drawn(loop.config.seed, 3, i))
            output = run(loop.module, batch, loop.step, rng)
            each = functional.cross_entropy(output.logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
            losses.append(each.view(batch.targets_BT.shape).mean(1))
            if output.routings:
                meter.add(output.routings)
            chosen.append([mask_of(r.experts_TK, _experts(r)) for r in output.routings])
    loss_S, domain_S = torch.cat(losses).double().numpy(), np.array([domain for domain, _ in places])
    means = {name: float(loss_S[domain_S == i].mean()) for i, name in enumerate(stream.names)}
    return Held(means, [torch.cat(parts) for parts in zip(*chosen, strict=True)], domain_S, meter.figures(Group()))


def _experts(routing: Routing) -> int:
    assert routing.logits_TE is not None
    return routing.logits_TE.shape[1]


def train(arena: Arena, contender: Contender, seed: int) -> dict[str, Any]:
    """One cell: train, and read the held-out text at LATE and at the end."""
    loop = arena.loop(contender, seed)
    steps, early, late = arena.shape.steps, None, []
    began = time.process_time()
    while loop.step < steps:
        entry = loop.train_step()
        if loop.step == round(LATE * steps):
            early = held_out(loop)
        if loop.step > 0.9 * steps:
            late.append(entry)
    seconds = time.process_time() - began
    end = held_out(loop)
    assert early is not None
    counted = any(isinstance(m, MoEBlock) for m in loop.module.modules())
    found: dict[str, Any] = {
        "losses": end.losses,
        "loss": statistics.fmean(end.losses.values()),
        "train_loss": statistics.fmean(e["task"] if "task" in e else e["loss"] for e in late),
        "parameters": sum(p.numel() for p in loop.parameters),
        "multiply_adds": multiply_adds(loop),
        "cpu_seconds": round(seconds, 1),
    }
    if end.chosen:
        found["churn"] = churn(early.chosen, end.chosen)
        found["information"], found["information_null"] = domain_information(end.chosen, end.domain_S, seed)
        found["maxvio"] = end.figures["maxvio"]
        found["maxvio_step"] = statistics.fmean(e["maxvio"] for e in late)
        found["dropped"] = statistics.fmean(e["dropped"] for e in late)
        found["dropped_held_out"] = end.figures["dropped"]
        found["unrouted"] = end.figures["unrouted"]
        if counted:
            found["active"], found["active_step"] = end.figures["active"], statistics.fmean(e["active"] for e in late)
    return found


def churn(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Share of held-out tokens whose chosen set is another one, the mean over routings."""
    return statistics.fmean(float((a != b).any(1).float().mean()) for a, b in zip(before, after, strict=True))


def domain_information(chosen: Sequence[Tensor], domain_S: np.ndarray, seed: int) -> tuple[float, float]:
    """I(domain; expert of a slot) / H(domain), the mean over routings less its mean under shuffled domains of sequences; and that mean."""
    counts_SLE = [mask.view(len(domain_S), -1, mask.shape[1]).sum(1).double().numpy() for mask in chosen]
    rng = np.random.default_rng(seed)

    def over(domains_S: np.ndarray) -> float:
        member_GS = (domains_S[None] == np.unique(domain_S)[:, None]).astype(np.float64)
        return float(np.nanmean([information(member_GS @ counts_SE) for counts_SE in counts_SLE]))

    null = statistics.fmean(over(rng.permutation(domain_S)) for _ in range(SHUFFLES))
    return over(domain_S) - null, null


@torch.no_grad()
def multiply_adds(loop: Loop) -> float:
    """Per token of a held-out pass, in its matrix products; attention over the context is not counted."""
    places = [row for rows in loop.stream.held_out_places(2) for row in rows]
    batch = loop.stream.gather(places)
    loop.module.eval()
    with FlopCounterMode(display=False) as counter:
        run(loop.module, batch, loop.step, torch.Generator().manual_seed(0))
    spent = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    return sum(v for k, v in spent.items() if "attention" not in k) / 2 / batch.tokens_BT.numel()


def timing(arena: Arena, contender: Contender, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step beside the baseline's, taken in turns, and the share of routing and dispatch."""
    mine, base, bare = (arena.loop(c, 0) for c in (contender, contenders(arena.shape)[0], contender))
    for loop in (mine, base, bare):
        loop.step = round(LATE * arena.shape.steps)  # where schedules and phases are in their last stage
    for _ in range(3):
        mine.train_step()
        base.train_step()
    jobs: dict[str, Callable[[], Any]] = {"step": mine.train_step, "baseline": base.train_step}
    if any(isinstance(m, MoEBlock) for m in bare.module.modules()):
        bare.train_step()
        bare.train_step()
        without_routing(bare.module)
        bare.train_step()
        jobs["bare"] = bare.train_step
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            spent[name].append(1e3 * (time.perf_counter() - began))
    times = cells.spread(a / b for a, b in zip(spent["step"], spent["baseline"], strict=True))
    found: dict[str, Any] = {"ms": cells.spread(spent["step"]), "times_baseline": times}
    if "bare" in spent:
        found["dispatch_share"] = cells.spread(1 - b / a for a, b in zip(spent["step"], spent["bare"], strict=True))
    return found


def without_routing(module: nn.Module) -> None:
    """Let every block repeat the decision of its next pass for ever, its experts working on rows that nobody gathers or weighs."""
    for block in [m for m in module.modules() if isinstance(m, MoEBlock)]:
        block.forward = _repeating(block)  # type: ignore[method-assign]


def _repeating(block: MoEBlock) -> Callable[[Tensor, RouteContext], BlockOutput]:
    kept: list[tuple[Routing, list[int]]] = []
    names = (*block.router.losses, *block.losses)

    def forward(x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        if not kept:
            made = block.router.decide(x_TD, ctx).routing
            logits_TE = None if made.logits_TE is None else made.logits_TE.detach()
            kept.append((Routing(made.experts_TK, made.weights_TK.detach(), logits_TE, None), _starts(block.experts, made)))
        routing, starts = kept[0]
        y_TD = _rows(block.experts, x_TD, starts)
        if block.shared is not None:
            y_TD = y_TD + block.shared(x_TD)
        return BlockOutput(y_TD, (routing,), {name: x_TD.new_zeros(()) for name in names})

    return forward


def _starts(bank: ExpertBank, routing: Routing) -> list[int]:
    idle = torch.tensor([*(kind == "zero" for kind in bank.kinds), False])  # -1 reads the last
    return order_of(routing.experts_TK.masked_fill(idle[routing.experts_TK], EMPTY), bank.num).starts


def _rows(bank: ExpertBank, x_TD: Tensor, starts: list[int]) -> Tensor:
    """The experts on as many rows as they had, x over and over; their outputs added up."""
    laps = -(-starts[-1] // len(x_TD))
    y_ND = bank.on_pairs(x_TD.repeat(laps, 1)[: starts[-1]], starts)
    y_ND = functional.pad(y_ND, (0, 0, 0, laps * len(x_TD) - starts[-1]))
    return y_ND.view(laps, *x_TD.shape).sum(0)


class Record:
    """The results file. A cell is kept while it says the same configuration; cells of contenders that are gone stay until --fresh."""

    def __init__(self, path: Path, settings: dict[str, Any], *, fresh: bool) -> None:
        self.path, self.commit = path, cells.versions()["commit"]
        self.report: dict[str, Any] = {
            "question": QUESTION,
            "machine": limits.machine(path.parent),
            "settings": settings,
            "cells": {},
        }
        if path.exists() and not fresh:
            before = shapes.read_json(path)
            if before["settings"] == settings:
                self.report["cells"] = before["cells"]

    def measure(self, name: str, config: TrainConfig, job: Callable[..., dict[str, Any]], *arguments: Any) -> bool:
        """job(*arguments) as the cell of this name, unless it is there. Training that breaks is a result too."""
        key = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:16]
        if self.report["cells"].get(name, {}).get("config") == key:
            return False
        began = time.perf_counter()
        try:
            found = job(*arguments)
        except MoestroError as error:
            found = {"error": str(error)}
        self.report["cells"][name] = {"config": key, "commit": self.commit, **found}
        self.write()
        said = found.get("error") or " ".join(f"{k} {found[k]:.4f}" for k in ("loss", "maxvio", "active", "churn") if k in found)
        cells.say(f"{name:44} {time.perf_counter() - began:6.1f} s  {said}")
        return True

    def write(self, **more: Any) -> None:
        self.report |= {"date": datetime.date.today().isoformat(), **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shapes.write_json(self.path, self.report)


def prepared(folder: Path) -> tuple[DataConfig, Tokens]:
    """The text of the recipe `mixed`, tokenised into `folder` unless it is there."""
    data = read_config("mixed").data
    if not (folder / "index.json").exists():
        prepare((row for spec in data.sources for row in read(spec)), data.tokenizer, folder)
    return data, open_tokens(folder)


def frequencies(tokens: Tokens, data: DataConfig) -> list[float]:
    """How often each token is met in training, the domains weighted as there."""
    weights = data.weights or {d.name: d.tokens for d in tokens.domains}
    found = np.zeros(tokens.vocabulary)
    for domain, ids in zip(tokens.domains, tokens.ids, strict=True):
        found += weights.get(domain.name, 0) / sum(weights.values()) * np.bincount(ids, minlength=tokens.vocabulary) / len(ids)
    return [round(float(f), 8) for f in found]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reduced", action="store_true", help="one seed, a quarter of the steps and of the held-out text")
    p.add_argument("--only", nargs="+", metavar="CONTENDER", help="names of contenders; the baseline is always there")
    p.add_argument("--seeds", nargs="+", type=int, help=f"default {' '.join(map(str, SEEDS))}")
    p.add_argument("--parts", nargs="+", choices=("train", "time"), default=("train", "time"))
    p.add_argument("--rounds", type=int, default=15, help="timed steps")
    p.add_argument("--set", nargs="+", default=(), metavar="NAME=NUMBER", help="of the shape, such as steps=800 or d_model=96")
    p.add_argument("--work", type=Path, default=cells.default_work() / "arena", help="folder for the tokenised text")
    p.add_argument("--fresh", action="store_true", help="measure every cell again")
    p.add_argument("--out", type=Path, help="results file; of the full arena benchmarks/results/, else the work folder")
    p.add_argument("--list", action="store_true", help="only say who takes part")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    changes = dict(REDUCED) if args.reduced else {}
    usual = Shape()
    for text in args.set:
        name, _, value = text.partition("=")
        changes[name] = type(getattr(usual, name))(float(value))
    shape = Shape(**changes)
    data, tokens = prepared(args.work / "tokens")
    arena = Arena(shape, DataConfig(sources=data.sources, weights=data.weights, length=shape.length), tokens)
    everyone = contenders(shape, frequencies(tokens, data))
    if args.only and (unknown := set(args.only) - {c.name for c in everyone}):
        raise SystemExit(f"no contender {', '.join(sorted(unknown))}; they are: {', '.join(c.name for c in everyone)}")
    chosen = [c for c in everyone if not args.only or c.name in (BASELINE, *args.only)]
    if args.list:
        print("\n".join(f"{c.kind:12} {c.name:24} {', '.join(c.methods)}" for c in chosen))
        return 0
    out = args.out or path_of(args, shape == usual)
    record = Record(out, arena.settings, fresh=args.fresh)
    seeds = args.seeds or (SEEDS[:1] if args.reduced else SEEDS)
    if "train" in args.parts:
        for seed in seeds:  # seed by seed: a stopped arena has everybody
            for contender in chosen:
                record.measure(f"{contender.name} / {seed}", arena.config(contender, seed), train, arena, contender, seed)
    if "time" in args.parts:
        for contender in chosen:
            record.measure(f"{contender.name} / time", arena.config(contender, 0), timing, arena, contender, args.rounds)
    known = {
        c.name: {"kind": c.kind, "methods": c.methods, "note": c.note, "config": dict(c.model) | dict(c.train)} for c in everyone
    }
    for parts in known.values():
        if isinstance(parts["config"].get("router"), dict):
            parts["config"]["router"] = {k: v for k, v in parts["config"]["router"].items() if k != "frequencies"}
    record.write(contenders=known, versions=cells.versions())
    record.write(summary=arena_summary.summary(record.report))
    print(arena_summary.table(record.report["summary"]))
    cells.say(str(out))
    return 0


def path_of(args: argparse.Namespace, full: bool) -> Path:
    """Where the answer goes."""
    info = limits.machine(args.work)
    hardware = "-".join("".join(c if c.isalnum() else " " for c in f"{info['cpu']} {info['cores']}c".lower()).split())
    name = f"{QUESTION}_{hardware}_{datetime.date.today().isoformat()}.json"
    if full:
        return cells.HERE / "results" / name
    return args.work / f"{QUESTION}{'-reduced' if args.reduced else '-changed'}.json"


if __name__ == "__main__":
    sys.exit(main())
