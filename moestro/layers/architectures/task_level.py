"""Task-level experts: whole layers in several copies, chosen by the task.

Paper      Ye et al. 2022, arXiv 2205.12701
Idea       A task decides once which copy of each layer it runs through; what tasks share shows in their routes.
Rule       route_l(t) = MLP_l(e_t), e_t learned; training: a = one-hot of argmax(z + gumbel) with the gradient of softmax((z + gumbel) / tau)
           ('gumbel'), or softmax(z / tau) ('softmax'); x = sum_j a_j Layer_lj(x); evaluation: argmax only, or softmax where that was trained
           tau falls as the option says: the paper's max(0.1, 2 exp(-3e-4 step))
Needs      the task of each sequence as ctx.carry["domain_T"], 0 without it; experts, router, num_experts and top_k of the configuration are not read:
           the layers are dense
Gives      a model with one routing per layer, the same for all tokens of a task; with 'softmax' every copy is in it
Departs    A decoder where the paper has BART. All weights have one learning rate, the paper's task vectors a thousand times the model's.
           Copies start `noise` apart (paper 1e-8 on pre-trained layers; ours for training from nothing). Of the second stage the option `mode` with a
           falling tau is there; freezing the routes is not
Checked    equal copies give the dense model for any route; tau large is the mean, tau small the argmax; one route per task; one-hot mixture equals the sparse path
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder, decoder_layers
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import require
from moestro.layers.tasks import task_of

TAU = {"start": 2.0, "end": 0.1, "steps": 9986, "shape": "exponential"}  # 2 exp(-3e-4 step), down to 0.1


class Choice(nn.Module):
    """copies: whole decoder layers. tasks_TD: the tasks' vectors, common to all layers."""

    def __init__(self, copies: list[nn.Module], vectors: nn.Embedding, hidden: int, mode: str, tau: Scheduled) -> None:
        super().__init__()
        self.copies, self.vectors, self.mode, self.tau = nn.ModuleList(copies), vectors, mode, read(tau)
        self.route = nn.Sequential(nn.Linear(vectors.embedding_dim, hidden), nn.GELU(), nn.Linear(hidden, len(copies)))

    def weights(self, ctx: RouteContext) -> tuple[Tensor, Tensor]:
        """logits and weights of all tasks, [tasks, copies]."""
        z = self.route(self.vectors.weight.float())
        tau = value_at(self.tau, ctx.step)
        if self.mode == "softmax":
            return z, (z / tau).softmax(-1)
        if not ctx.training:
            return z, torch.zeros_like(z).scatter(1, z.argmax(-1, keepdim=True), 1.0)
        uniform = torch.rand(z.shape, generator=ctx.rng).clamp(1e-10, 1 - 1e-7)
        noisy = z - (-uniform.log()).log()
        soft = (noisy / tau).softmax(-1)
        hard = torch.zeros_like(z).scatter(1, noisy.argmax(-1, keepdim=True), 1.0)
        return z, hard + soft - soft.detach()

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, ctx: RouteContext
    ) -> tuple[Tensor, BlockOutput]:
        b, t, _ = x_BTD.shape
        task_B = task_of(ctx, b * t, self.vectors.num_embeddings).view(b, t)[:, :1].flatten()
        logits, a = self.weights(ctx)
        a_BJ = a[task_B]
        y = torch.zeros_like(x_BTD)
        for j, layer in enumerate(self.copies):
            # With a gradient every copy's output is wanted, weighed by 0 or not; without one, only the chosen run.
            rows = torch.arange(b) if a.requires_grad and ctx.training else (a_BJ[:, j] != 0).nonzero()[:, 0]
            if len(rows):
                part = tuple(r.expand(b, -1, -1, -1)[rows] for r in rotary)
                seen = mask if mask is None or mask.shape[0] == 1 else mask[rows]
                out, _ = layer(x_BTD[rows], part, seen, ctx)
                y = y.index_add(0, rows, out * a_BJ[rows, j, None, None].to(out.dtype))
        slots = 1 if self.mode == "gumbel" else len(self.copies)
        weights, ids = (v.repeat_interleave(t, 0) for v in a_BJ.topk(slots, -1))
        raw, probs = (v[task_B].repeat_interleave(t, 0) for v in (logits, logits.softmax(-1)))
        return y, BlockOutput(y, (Routing(ids, weights, raw, probs),))


@method("layers.architectures.task_level", kind="architecture", fidelity="adapted", paper="2205.12701")
def task_level(
    config: MoEConfig,
    *,
    tasks: int = 4,
    copies: int = 3,
    width: int = 128,
    hidden: int = 64,
    mode: str = "gumbel",
    tau: Scheduled | None = None,
    noise: float = 0.01,
) -> Decoder:
    """copies: of each layer. width: of task vectors; hidden: of the routers. noise: standard deviation between copies."""
    require(tasks >= 1 and copies >= 1, f"{tasks} tasks, {copies} copies", "at least 1 each")
    require(
        width >= 1 and hidden >= 1 and noise >= 0, f"width {width}, hidden {hidden}, noise {noise}", "at least 1; noise 0 or more"
    )
    require(mode in ("gumbel", "softmax"), f"mode {mode!r}", "gumbel or softmax")
    dense = replace(config, dense_layers=tuple(range(config.layers)), d_dense=config.dense_width)
    vectors = nn.Embedding(tasks, width)
    sets = [decoder_layers(dense) for _ in range(copies)]
    with torch.no_grad():
        for layers in sets[1:]:
            for layer, first in zip(layers, sets[0], strict=True):
                layer.load_state_dict(first.state_dict())
        for layers in sets:
            for parameter in (p for layer in layers for p in layer.parameters()):
                parameter.add_(noise * torch.randn(parameter.shape))
    made = [Choice(list(column), vectors, hidden, mode, TAU if tau is None else tau) for column in zip(*sets, strict=True)]
    return Decoder(config, made)
