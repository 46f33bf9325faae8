"""Copy: every expert of a layer is the dense feed-forward, so the MoE computes what the dense model computes.

Paper      Komatsuzaki et al. 2022, Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, arXiv 2212.05055
Idea       Start an MoE from a trained dense model: the experts are copies of its feed-forward, the router is new and random. Training
           then tells them apart; until then the model answers exactly as the dense one did.
Rule       W_e = W for e = 1..E; router weight_ED ~ N(0, std^2); y = sum_k w_k FFN(x) = FFN(x) because Mixtral's top-k weights
           are divided by their sum, for any choice of experts.
Needs      a dense Llama or Mistral checkpoint (headers only, to plan)
Gives      ConstructionPlan of a Mixtral checkpoint
Departs    The paper turns every other layer into an MoE and compares routers; here every layer becomes one, with token-choice top-k
           and weights that sum to one, the decoder variant of its appendix and the form Mixtral checkpoints have.
Checked    closed form: dense logits equal the MoE's for drawn widths, heads, E, k and seeds; no choice of router changes them
"""

from __future__ import annotations

import math

from moestro.build.mixtral import DENSE, FORMAT, buffers, check_dense, moe_config
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.plan import Subject
from moestro.core.plans.construction import ConstructionPlan, ExpertSource, NewLayer, RouterStart
from moestro.models.checkpoint import Checkpoint


@method("build.upcycle.copy", kind="upcycle", paper="2212.05055", needs=("checkpoint",), fidelity="adapted")
def copy(checkpoint: Checkpoint, *, experts: int = 8, top_k: int = 2, std: float = 0.02, seed: int = 0) -> ConstructionPlan:
    """Plan a Mixtral checkpoint with `experts` copies of each feed-forward, `top_k` of them active.

    std scales the router: it sets how even the weights of the chosen experts are, never which are chosen. seed draws another routing.
    The plan's config.json keeps the dense model's dtype. Raises UnsupportedModel when the MoE would not compute the same, InputError.
    """
    if not (math.isfinite(std) and std > 0):
        raise InputError(f"std = {std}", expected="a positive number")
    if seed < 0:
        raise InputError(f"seed = {seed}", expected="a whole number from 0")
    check_dense(checkpoint)
    config = moe_config(checkpoint.config, experts=experts, top_k=top_k)
    router = RouterStart(std, seed)
    return ConstructionPlan(
        subjects=(Subject(checkpoint.source, checkpoint.fingerprint),),
        method="build.upcycle.copy",
        options={"experts": experts, "top_k": top_k, "std": std, "seed": seed},
        source_format=DENSE,
        format=FORMAT,
        config=config,
        layers=tuple(NewLayer(i, (ExpertSource(0, i),) * experts, router) for i in range(config["num_hidden_layers"])),
        dropped=buffers(checkpoint),
    )
