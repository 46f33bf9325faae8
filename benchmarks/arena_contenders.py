"""Who takes part in the router arena: every router, balance loss, block and architecture of the catalogue that can be a causal language model.

All have the base model's trunk and, as far as their form allows, its experts' parameters, in all and per token. A method that chooses one
expert by design gets half as many experts of twice the width; others are sized in closed form below. What comes out is counted, not trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moestro.layers.config import MoEConfig
from moestro.train.config import DataConfig, OptimiserConfig, RateConfig, TrainConfig

BASELINE = "top-k + balance"
LEFT_OUT = {  # methods of the catalogue that are no contender, and why
    "layers.architectures.encoder": "reads later tokens",
    "layers.architectures.dit": "image diffusion; reads later tokens",
    "layers.routers.moiie": "routes images and text apart; there are no images here",
    "layers.architectures.modality": "routes images and text apart; there are no images here",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The base model and the run. d_expert: of each of `experts`; the held-out sequences are per domain."""

    d_model: int = 64
    layers: int = 2
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    d_expert: int = 32
    length: int = 128
    batch: int = 4
    steps: int = 600
    rate: float = 3e-3
    init_std: float = 0.06
    held_out: int = 64

    @property
    def total(self) -> int:
        """Parameters of a layer's experts."""
        return self.experts * 3 * self.d_model * self.d_expert

    @property
    def active(self) -> int:
        """Of those, what a token meets."""
        return self.top_k * 3 * self.d_model * self.d_expert


@dataclass(frozen=True, slots=True)
class Contender:
    """name: as shown. kind: what it varies. methods: of the catalogue, that it stands for. model, train: changes to the base configuration.

    micro: sequences per micro-batch, each of one domain; 0 for whole mixed batches. note: what a reader must know to compare it.
    """

    name: str
    kind: str
    methods: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    micro: int = 0
    note: str = ""

    def config(self, shape: Shape, data: DataConfig, vocabulary: int, seed: int) -> TrainConfig:
        """The whole run."""
        base: dict[str, Any] = {
            "vocabulary": vocabulary,
            "context": shape.length,
            "d_model": shape.d_model,
            "layers": shape.layers,
            "heads": shape.heads,
            "num_experts": shape.experts,
            "top_k": shape.top_k,
            "d_expert": shape.d_expert,
            "init_std": shape.init_std,
            "seed": seed,
        }
        return TrainConfig(
            model=MoEConfig.from_json(base | dict(self.model)),
            data=replace(data, pure=bool(self.micro)),
            optimiser=OptimiserConfig(rate=shape.rate),
            rate=RateConfig(warmup=0.05),
            steps=shape.steps,
            batch=shape.batch,
            micro_batch=self.micro,
            evaluate_sequences=shape.held_out,
            seed=seed,
            **self.train_parts(),
        )

    def train_parts(self) -> dict[str, Any]:
        from moestro.layers.config import Part

        found = {k: v for k, v in self.train.items() if k != "phases"}
        parts: dict[str, Any] = {k: Part.of(v) for k, v in found.items()}
        return parts | {"phases": tuple(Part.of(p) for p in self.train.get("phases", ()))}


def contenders(shape: Shape, frequencies: Sequence[float] = ()) -> tuple[Contender, ...]:
    """All of them, the baseline first. frequencies: how often each token occurs in training, for the hash table."""
    return (*_baselines(shape, frequencies), *_losses(shape), *_routers(shape), *_blocks(shape), *_architectures(shape))


def _topk(**options: Any) -> dict[str, Any]:
    return {"router": {"name": "topk", **options}}


def _wide(shape: Shape) -> dict[str, int]:
    """One expert per token: half as many, twice as wide."""
    return {"num_experts": shape.experts // shape.top_k, "top_k": 1, "d_expert": shape.top_k * shape.d_expert}


def _router(name: str, **options: Any) -> dict[str, Any]:
    return {"router": {"name": name, **options}}


def _baselines(s: Shape, frequencies: Sequence[float]) -> list[Contender]:
    every = list(range(s.layers))
    hashed = "by the byte alone"
    return [
        Contender(BASELINE, "baseline", ("layers.routers.topk", "layers.losses.balance"), _topk()),
        Contender("top-k, no loss", "baseline", ("layers.routers.topk",), _topk(balance=0.0)),
        Contender("dense, equal active", "baseline", (), {"dense_layers": every, "d_dense": s.top_k * s.d_expert}, note="no experts"),
        Contender("dense, equal total", "baseline", (), {"dense_layers": every, "d_dense": s.experts * s.d_expert}, note="no experts"),
        Contender("Switch", "baseline", ("layers.routers.switch",), _wide(s) | _router("switch")),
        Contender("GShard", "baseline", ("layers.routers.gshard",), _router("gshard")),
        Contender("hash", "baseline", ("layers.routers.hash",), _wide(s) | _router("hash", frequencies=list(frequencies)), note=hashed),
        Contender("hash, bigrams", "baseline", ("layers.routers.hash",), _wide(s) | _router("hash", bigrams=True, buckets=4096),
                  note="by a byte and the one before"),
    ]  # fmt: skip


def _losses(s: Shape) -> list[Contender]:
    off = _topk(balance=0.0)
    return [
        Contender("top-k + z", "loss", ("layers.losses.z",), _topk() | {"losses": ["z"]}),
        Contender("importance", "loss", ("layers.losses.importance",), off | {"losses": ["importance"]}),
        Contender("loss-free bias", "loss", ("layers.taps.loss_free",), off | {"taps": [{"name": "loss_free", "rate": 0.02}]}),
        Contender("balance per micro-batch", "loss", ("layers.losses.balance",), _topk(), micro=2,
                  note="micro-batches of two sequences of one domain"),
        Contender("balance over the batch", "loss", ("layers.losses.global_balance",), off | {"losses": ["global_balance"]}, micro=2,
                  note="the same micro-batches"),
        Contender("ERC", "loss", ("layers.losses.erc",), _topk() | {"losses": ["erc"]}),
        Contender("entropy", "loss", ("layers.losses.entropy",), _topk() | {"losses": [{"name": "entropy", "weight": 0.01}]}),
        Contender("locality", "loss", ("layers.losses.locality",), _topk() | {"losses": ["locality"]}),
        Contender("chunk sparsity", "loss", ("layers.losses.chunk_sparsity",), _topk() | {"losses": ["chunk_sparsity"]}),
        Contender("capacity 1.25", "loss", ("layers.taps.capacity",), _topk() | {"taps": ["capacity"]}, note="drops, no other change"),
    ]  # fmt: skip


def _routers(s: Shape) -> list[Contender]:
    wide, run = _wide(s), s.steps
    falls = {"start": 1.0, "end": 0.1, "steps": max(1, run * 3 // 4), "shape": "exponential"}
    halves = {"start": 0.01, "end": 0.005, "steps": max(1, run // 2), "shape": "step"}
    small = {"num_experts": 3 * s.experts, "d_expert": s.d_expert // 2, "gated": False}
    adaptive = {"objective": {"name": "adaptive", "warmup": run // 4, "every": max(1, run // 25)}}

    def one(name: str, method: str, more: Mapping[str, Any] | None = None, note: str = "", train: Mapping[str, Any] | None = None,
            **options: Any) -> Contender:  # fmt: skip
        model = dict(more or {}) | _router(method, **options)
        return Contender(name, "router", (f"layers.routers.{method}",), model, train or {}, note=note)

    return [
        one("raw weights", "topk", combine="raw"),
        one("sigmoid gate", "topk", score="sigmoid", combine="renormalised"),
        one("noisy top-k", "noisy_topk"),
        one("ST-MoE", "st_moe"),
        one("BASE", "base", wide),
        one("Expert Choice", "expert_choice", capacity=float(s.top_k), note="thresholds in evaluation"),
        one("top-p", "top_p", p=0.5, entropy=0.01, note="as many experts as a token asks for"),
        one("DynaMoE", "dynamoe", least=2, most=2 * s.top_k, percentile=100.0 * (1 - 1.25 * s.top_k / s.experts),
            note="4 to 2 experts at most, falling with depth"),
        one("MoGE", "moge"),
        one("DeepSeek-V3", "deepseek_v3", groups=4, kept=2, rate=0.02),
        one("THOR", "thor", wide, train={"objective": {"name": "consistency", "smoothing": 0.0}}, note="two passes per step: twice the compute"),
        one("decoupled weights", "decoupled", balance=halves),
        one("RMoE", "rmoe", width=max(1, s.d_model // 8)),
        one("EvoMoE", "evomoe", wide, temperature=falls, train={"phases": [{"name": "diversify", "at": 0.1}]},
            note="many experts per token at first"),
        one("SMoE-Dropout", "smoe_dropout", least=1, most=2 * s.top_k - 1, inference=s.top_k, steps=run,
            note="frozen router; 1 to 3 experts in training"),
        one("StableMoE", "stable_moe", wide, bigrams=True, width=max(1, s.d_model // 4), train={"phases": [{"name": "freeze_routing", "at": 0.1}]}),
        one("Selective Sinkhorn", "selective_sinkhorn", q=0.05),
        one("MoEC", "moec", wide, width=max(1, s.d_model // 4), interval=max(1, run // 10)),
        one("GW-MoE", "gw_moe", slots=2, note="made for fine-tuning"),
        one("LocMoE", "locmoe", wide),
        one("BlockFFN", "blockffn", small, train=adaptive, note="experts that a ReLU leaves on; no limit"),
        one("MoE-X", "moe_x", {"activation": "relu", "gated": False, "d_expert": s.d_expert * 3 // 2}),
        one("AdaMoE", "adamoe", {"special": [{"name": "zero", "count": s.experts}], "top_k": 2 * s.top_k}, balance=0.01),
        one("MoE++", "moe_plus_plus", {"top_k": s.top_k + 1, "special": [
            {"name": "constant", "count": s.experts // 4}, {"name": "copy"}, {"name": "zero"}]}, note="cheap experts among the chosen"),
        one("HMoE", "hmoe", {"experts": "widths"}, select="top_k", note="experts of 16 widths"),
        one("OpenMoE", "openmoe"),
        one("norm router", "norm"),
        one("prototypes", "prototypes", {"num_experts": s.experts + 1}, note="one further expert is never used"),
        one("task routers", "tasks", tasks=4, note="is told the domain"),
        one("union router", "union", note="unweighted slices"),
        one("language experts", "languages", {"num_experts": 5}, note="four domains and one for all; told the domain in training"),
    ]  # fmt: skip


def _blocks(s: Shape) -> list[Contender]:
    d, f, total, active = s.d_model, s.d_expert, s.total, s.active
    heads, k = 4, 8
    read = heads * k * 2 * d
    keys = round(math.sqrt((total - active + read) / (2 * d)))
    memory = 16
    rows = math.isqrt(s.layers * (total - active) // (4 * memory))
    dense = max(1, (active - 4 * d * memory - 4 * rows * memory) // (3 * d))
    halves = 31
    tiny = max(1, (total - halves * d - 2 * heads * halves * d // s.layers) // (halves * (2 * d + 1)) // 2) * 2
    latent = max(1, (total - d * d) // (s.experts * 2 * d))

    def one(name: str, method: str, more: Mapping[str, Any], note: str = "", **options: Any) -> Contender:
        return Contender(
            name, "block", (f"layers.blocks.{method}",), dict(more) | {"block": {"name": method, **options}}, note=note
        )

    return [
        replace(
            one("DeepSeekMoE", "segmented", {"router": {"name": "deepseek_moe", "balance": 0.01}}, segments=2, shared=1),
            methods=("layers.blocks.segmented", "layers.routers.deepseek_moe"),
        ),
        one("Chain-of-Experts", "chain", {"top_k": max(1, s.top_k // 2), **_topk(combine="raw")}, passes=2),
        one("halved block", "halved", {"num_experts": s.experts - 1, "top_k": s.top_k - 1, **_topk(combine="raw")}),
        one("Monet", "monet", {"d_expert": tiny}, "computed densely here", n=halves, k=4.0, heads=heads, groups=s.layers),
        one("PEER", "product_key", {}, n=keys, k=k, heads=heads, width=max(1, (active - read) // (2 * heads * (d + keys)))),
        one("UltraMemV2", "ultramem", {"d_dense": dense}, n=rows, rows=8, width=memory),
        one("HyperFormer", "hyperformer", {"d_expert": f * 3 // 2}, "no balance loss"),
        one("HoME", "home", {"d_expert": max(1, f // 2)}, "is told the domain", ranks=[1]),
        Contender("latent experts", "block", ("layers.banks.latent",), {"experts": "latent", "d_expert": latent}),
    ]  # fmt: skip


def _architectures(s: Shape) -> list[Contender]:
    falls = {"start": 2.0, "end": 0.1, "steps": s.steps, "shape": "exponential"}
    pool = {"num_experts": s.experts * s.layers, "router": "norm", "losses": ["pool"], "architecture": "unipool"}
    opened = {"name": "rexmoe", "reuse": s.layers, "begin": s.steps // 5, "end": max(1, s.steps * 3 // 5)}
    return [
        Contender(
            "UniPool",
            "architecture",
            ("layers.architectures.unipool", "layers.routers.norm", "layers.losses.pool"),
            pool,
            note="one pool for all layers",
        ),
        Contender("ReXMoE", "architecture", ("layers.architectures.rexmoe",), _topk() | {"architecture": opened}),
        Contender(
            "Union-of-Experts",
            "architecture",
            ("layers.routers.union", "layers.mixers.selective_heads"),
            {"router": "union", "mixer": "selective_heads"},
            note="half the heads of each token",
        ),
        Contender(
            "task-level experts",
            "architecture",
            ("layers.architectures.task_level",),
            {"architecture": {"name": "task_level", "copies": 4, "width": 16, "hidden": 16, "tau": falls}},
            note="is told the domain; every copy of a layer is trained at each step",
        ),
        Contender(
            "Hecto",
            "architecture",
            ("layers.architectures.hecto",),
            {"architecture": {"name": "hecto", "hidden": s.d_model}, "d_dense": max(1, s.top_k * s.d_expert - s.d_model // 2)},
            note="a recurrence or a small layer at the end",
        ),
    ]
