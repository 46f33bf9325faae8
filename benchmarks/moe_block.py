"""How fast is a training step of one MoE block, against transformers' implementations of the same experts?

Forward and backward of router and experts with equal weights and inputs: 1,024 tokens, width 512, 32 experts of width 512, top 4,
float32. The peer is transformers' own Mixtral block (softmax, top-k, renormalised) with each of its experts implementations. All take
turns; medians with spread. `dispatch` is what our block does besides the experts' matrix products, as a share of its time: the
block's time less that of the same products on rows already sorted.

    python benchmarks/moe_block.py [--rounds 15] [--tokens 1024] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moestro.core.experts import ExpertSpec
from moestro.core.routing import RouteContext
from moestro.layers.block import MoEBlock
from moestro.layers.dispatch import order_of
from moestro.layers.experts import Stacked
from moestro.layers.routers.topk import topk
from moestro.layers.site import Site

WIDTH, INNER, EXPERTS, TOP = 512, 512, 32, 4
PEERS = ("eager", "grouped_mm")  # batched_mm copies the chosen weights of every pair: 300 times slower at this size


def blocks() -> tuple[MoEBlock, MixtralSparseMoeBlock]:
    """Our block and transformers', with the same weights."""
    torch.manual_seed(0)
    site = Site(d_model=WIDTH, num_experts=EXPERTS, top_k=TOP, d_expert=INNER)
    ours = MoEBlock(topk(site, balance=0), Stacked(EXPERTS, ExpertSpec(WIDTH, INNER)))
    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=TOP, num_attention_heads=8
    )
    theirs = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up_EFD)  # type: ignore[arg-type]
        theirs.experts.down_proj.copy_(ours.experts.down_EDF)  # type: ignore[arg-type]
        theirs.gate.weight.copy_(ours.router.score.gate.weight)  # type: ignore[union-attr]
    return ours.train(), theirs.train()


def jobs(tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed. Each returns the output and the gradients, to be compared once."""
    ours, theirs = blocks()
    x, target = torch.randn(tokens, WIDTH), torch.randn(tokens, WIDTH)
    ctx = RouteContext(training=True)

    def step(module: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        def job() -> Any:
            for parameter in module.parameters():
                parameter.grad = None
            inputs = x.clone().requires_grad_()
            y = run(inputs)
            y.backward(target)
            return y.detach(), inputs.grad

        return job

    def peer(name: str) -> Callable[[], Any]:
        def run(inputs: torch.Tensor) -> torch.Tensor:
            theirs.experts.config._experts_implementation = name  # type: ignore[union-attr]
            return theirs(inputs[None])[0]

        return step(theirs, run)

    order = order_of(ours.router(x, ctx).experts_TK, EXPERTS)
    rows = x.index_select(0, order.token_N)
    grads = torch.randn(rows.shape)

    def products() -> Any:
        for parameter in ours.parameters():
            parameter.grad = None
        inputs = rows.detach().requires_grad_()
        ours.experts.on_pairs(inputs, order.starts).backward(grads)

    return {
        "moestro": step(ours, lambda inputs: ours(inputs, ctx).y_TD),
        **{name: peer(name) for name in PEERS},
        "products": products,
    }


def alternate(named: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, the jobs taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(rounds + 2):
        for name, job in named.items():
            began = time.perf_counter()
            job()
            if turn > 1:  # the first two turns warm up
                spent[name].append(time.perf_counter() - began)
    return spent


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    named = jobs(tokens)
    expected = named["eager"]()
    for name in ("moestro", *PEERS[1:]):
        for a, b in zip(named[name](), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f"{name} computes something else")
    spent = alternate(named, rounds)
    middle = {name: statistics.median(times) for name, times in spent.items()}
    flops = 3 * 2 * tokens * TOP * 3 * WIDTH * INNER
    return {
        "tokens": tokens,
        "ms": {n: {"median": middle[n] * 1e3, "min": min(t) * 1e3, "max": max(t) * 1e3} for n, t in spent.items()},
        "times_as_fast": {name: middle[name] / middle["moestro"] for name in PEERS},
        "dispatch_share": 1 - middle["products"] / middle["moestro"],
        "gflops_per_second": flops / middle["moestro"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024])
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    result = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": {"width": WIDTH, "inner": INNER, "experts": EXPERTS, "top": TOP, "dtype": "float32"},
        "rounds": options.rounds,
        "runs": [measure(tokens, options.rounds) for tokens in options.tokens],
    }
    text = json.dumps(result, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
