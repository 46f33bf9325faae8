"""M3ViT: each task has its own router over experts that all tasks share.

Paper      Liang et al. 2022, arXiv 2210.14793
Idea       One encoder for several tasks: a task's path is only what its router chooses, so one task alone loads and computes little.
Rule       'gates': z = x W_t^T, a matrix for each task t; 'conditioned': z = [x ; e_t] W^T, e_t = MLP(one-hot t)
           training adds N(0, (noise / E)^2); p = softmax z; top-k, raw; loss = balance * mean over the batch's tasks of
           CV^2(importance) + CV^2(load), importance and load of that task's tokens; load smooth with noise, else the counts, without gradient
Needs      the task of each token as ctx.carry["domain_T"] (moestro train gives the domain); task 0 without it
Gives      a router with a balance loss; the compute order that needs two experts in memory is the bank `reordered`
Departs    The smooth load compares logits with logits; the released code compares them with probabilities. A batch may mix tasks: the loss is
           then the mean of theirs (data.pure trains one at a time)
Checked    another task's router has no influence and no gradient; closed forms of the loss, by task
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.importance import squared_variation
from moestro.layers.reduce import counts
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.routers.noisy_topk import load
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax
from moestro.layers.tasks import task_of


class TaskGates(nn.Module):
    """Leaves task_T and, with noise, clean_TE in ctx.notes."""

    def __init__(self, site: Site, tasks: int, conditioned: bool, width: int, noise: float) -> None:
        super().__init__()
        self.tasks, self.sigma = tasks, noise / site.num_experts
        if conditioned:
            self.embed = nn.Sequential(site.linear(width, tasks, bias=True), nn.GELU(), site.linear(width, width, bias=True))
            self.gate = site.linear(site.num_experts, site.d_model + width)
        else:
            self.gates = nn.ModuleList(site.linear(site.num_experts) for _ in range(tasks))
            self.embed = None

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        task_T = ctx.notes["task_T"] = task_of(ctx, len(x_TD), self.tasks).to(x_TD.device)
        if self.embed is not None:
            known = self.embed(functional.one_hot(task_T, self.tasks).float())
            logits_TE = self.gate(torch.cat((x_TD, known), -1))
        else:
            logits_TE = x_TD.new_zeros(len(x_TD), self.gates[0].out_features)  # type: ignore[arg-type]
            for task in task_T.unique().tolist():
                mine = (task_T == task).nonzero()[:, 0]
                logits_TE = logits_TE.index_put((mine,), self.gates[task](x_TD[mine]))
        if not (ctx.training and self.sigma):
            return logits_TE
        ctx.notes["clean_TE"] = logits_TE
        return logits_TE + self.sigma * torch.randn(logits_TE.shape, generator=ctx.rng, device=x_TD.device)


class PerTask(nn.Module):
    """The balance of each task's tokens, averaged over the tasks that are there."""

    def __init__(self, weight: Scheduled, sigma: float, k: int) -> None:
        super().__init__()
        self.weight, self.sigma, self.k = read(weight), sigma, k

    def forward(self, decision: Decision) -> Tensor:
        task_T, clean_TE = decision.ctx.notes["task_T"], decision.ctx.notes.get("clean_TE")
        total, tasks = decision.probs_TE.sum() * 0.0, task_T.unique()
        for task in tasks:
            mine = (task_T == task).nonzero()[:, 0]
            ids, weights = decision.chosen.experts_TK[mine], decision.chosen.weights_TK[mine]
            sums_E = weights.new_zeros(decision.num_experts + 1).index_add(0, ids.flatten() + 1, weights.flatten())[1:]
            if clean_TE is None:
                load_E = counts(ids, decision.num_experts)
            else:
                load_E = load(clean_TE[mine], torch.full_like(clean_TE[mine], self.sigma), decision.logits_TE[mine], self.k)
            total = total + squared_variation(sums_E) + squared_variation(load_E)
        return value_at(self.weight, decision.ctx.step) * total / len(tasks)


@method("layers.routers.tasks", kind="router", fidelity="faithful", paper="2210.14793")
def tasks(
    site: Site, *, tasks: int = 2, mode: str = "gates", width: int = 16, noise: float = 0.0, balance: Scheduled = 0.01
) -> StagedRouter:
    """mode: 'gates' or 'conditioned'; width: of e_t. noise: noise_std, the paper's final runs have none."""
    require(tasks >= 1 and width >= 1, f"{tasks} tasks, width {width}", "at least 1 each")
    require(mode in ("gates", "conditioned"), f"mode {mode!r}", "gates or conditioned")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    score = TaskGates(site, tasks, mode == "conditioned", width, noise)
    return StagedRouter(
        score=score,
        normalise=softmax,
        select=TopK(site.top_k),
        combine=Combine("raw"),
        losses={"balance": PerTask(balance, score.sigma, site.top_k)},
    )
