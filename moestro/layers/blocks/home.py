"""HoME: a hierarchy of multi-gate experts for tasks that form groups.

Paper      Wang et al. 2024, HoME, arXiv 2408.05430
Idea       Three failures of dense multi-gate experts: outputs of unlike scale, so that one expert is taken (normalise them); shared experts
           that one task captures (groups first, and a mask); experts of sparse tasks that get no gradient (gates for features and for
           oneself).
Rule       E(x) = swish(batchnorm(MLP(x))); v_p = v * FeaGate_p(v), FeaGate(v) = sum_l softmax(v G)_l 2 sigmoid(v B_l A_l), A_l = 0 at first
           level 1, task t of group c: z_c = sum over shared and pool c of softmax(v W_c) E(v_p) + self_c, z_s = sum over all of softmax(v W_s) E(v_p)
           level 2: z = [z_c ; z_s] * FeaGate_t; y = sum over {global, shared of c, own of t} of softmax(z W_t) E(z) + self_t
           self: sum over the private pool of sigmoid (one expert) or softmax (more) of a gate of its own, times E
Needs      the task of each token as ctx.carry["domain_T"] (moestro train gives the domain, in the order of data.sources); task 0 without it;
           d_expert, activation and bias-free maps; num_experts and top_k are not read, as gates are dense; recipe `home`
Gives      a block with three routings: group, shared, task
Departs    Equations are our reading. A sample here has one task, not all. Blocks may be stacked: the head is the tower, and labels are
           tokens. Trait causal-in-training: batch normalisation reads the whole batch; evaluation uses running statistics, those of the
           process
Checked    gradients of masked experts are exactly zero; FeaGate is 1 where A or B is 0; statistics before swish; a private expert
           with main weight 0 learns through its self-gate
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import EMPTY, RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.dispatch import combine, gather, grouped_linear, order_of
from moestro.layers.experts import ACTIVATIONS
from moestro.layers.reduce import average_over_ranks
from moestro.layers.site import Site, require
from moestro.layers.tasks import task_of


class Normalised(nn.Module):
    """Experts swish(batchnorm(MLP(x))), on rows sorted by expert: up_EFI, down_EDF, and per expert and output a scale and a shift."""

    mean_ED: Tensor
    variance_ED: Tensor

    def __init__(self, site: Site, num: int, inputs: int, momentum: float) -> None:
        super().__init__()
        c = site.config
        self.act, self.momentum, self.eps = ACTIVATIONS[c.activation if c else "silu"], momentum, 1e-5
        self.up_EFI = nn.Parameter(torch.randn(num, site.d_expert, inputs) * site.init_std)
        self.down_EDF = nn.Parameter(torch.randn(num, site.d_model, site.d_expert) * site.init_std)
        self.scale_ED = nn.Parameter(torch.ones(num, site.d_model))
        self.shift_ED = nn.Parameter(torch.zeros(num, site.d_model))
        self.register_buffer("mean_ED", torch.zeros(num, site.d_model))
        self.register_buffer("variance_ED", torch.ones(num, site.d_model))

    def normal(self, x_NI: Tensor, starts: list[int], training: bool) -> Tensor:
        """Each expert's rows before scale, shift and swish; in training the running statistics move."""
        hidden = self.act(grouped_linear(x_NI, self.up_EFI, starts))
        h_ND = grouped_linear(hidden, self.down_EDF, starts).float()
        parts: list[Tensor] = []
        mean_ED, variance_ED = self.mean_ED.clone(), self.variance_ED.clone()  # the backward pass keeps what it is given
        for e, (a, b) in enumerate(pairwise(starts)):
            rows, mean, variance = h_ND[a:b], mean_ED[e], variance_ED[e]
            if b > a:
                parts.append(
                    functional.batch_norm(
                        rows, mean, variance, training=training and b > a + 1, momentum=self.momentum, eps=self.eps
                    )
                )
        if training:
            self.mean_ED.copy_(mean_ED)
            self.variance_ED.copy_(variance_ED)
            average_over_ranks(self.mean_ED, self.variance_ED)
        return torch.cat(parts) if parts else h_ND

    def forward(self, x_NI: Tensor, starts: list[int], training: bool) -> Tensor:
        counts = torch.tensor(starts).diff().to(x_NI.device)
        scale_ND, shift_ND = (p.repeat_interleave(counts, 0) for p in (self.scale_ED, self.shift_ED))
        return functional.silu(self.normal(x_NI, starts, training) * scale_ND + shift_ND).to(x_NI.dtype)


class FeatureGates(nn.Module):
    """Several feature gates on one input, each a softmax mixture of low-rank gates of these ranks; all are 1 at first."""

    def __init__(self, site: Site, count: int, inputs: int, ranks: list[int]) -> None:
        super().__init__()
        self.count, self.ranks = count, ranks
        self.mix = site.linear(count * len(ranks), inputs)
        self.down = nn.ParameterList(torch.randn(count, inputs, r) * site.init_std for r in ranks)
        self.up = nn.ParameterList(torch.zeros(count, r, inputs) for r in ranks)

    def forward(self, v_TI: Tensor) -> Tensor:
        """gates_TPI, P gates."""
        shares_TPL = self.mix(v_TI).unflatten(-1, (self.count, len(self.ranks))).softmax(-1)
        out = torch.zeros((), device=v_TI.device)
        for place, (b, a) in enumerate(zip(self.down, self.up, strict=True)):
            low_TPI = torch.einsum("ti,pir,prj->tpj", v_TI, b, a)
            out = out + shares_TPL[..., place, None] * 2 * low_TPI.sigmoid()
        return out


class Home(nn.Module):
    """Ids of level 1: shared, then each group's pool. Of level 2: global, each group's shared, each task's own."""

    group_of: Tensor
    first_GE: Tensor
    second_TE: Tensor
    own_TE: Tensor

    def __init__(self, site: Site, groups: list[int], shared: int, own: int, ranks: list[int], momentum: float) -> None:
        super().__init__()
        g, tasks, d = len(groups), sum(groups), site.d_model
        self.tasks, self.groups = tasks, g
        pool_E = torch.tensor([-1] * shared + [c for c in range(g) for _ in range(own)])
        group_of = torch.tensor([c for c, n in enumerate(groups) for _ in range(n)])
        level_E = torch.tensor([-1] * shared + [c for c in range(g) for _ in range(shared)] + [-2] * tasks * own)
        owner_E = torch.tensor([-1] * shared * (1 + g) + [t for t in range(tasks) for _ in range(own)])
        self.register_buffer("pool_E", pool_E, persistent=False)
        self.register_buffer("group_of", group_of, persistent=False)
        self.register_buffer("first_GE", (pool_E == -1) | (pool_E == torch.arange(g)[:, None]), persistent=False)
        self.register_buffer("own_TE", owner_E == torch.arange(tasks)[:, None], persistent=False)
        seen_TE = (level_E == -1) | (level_E == group_of[:, None]) | self.own_TE
        self.register_buffer("second_TE", seen_TE, persistent=False)
        self.meta = Normalised(site, len(pool_E), d, momentum)
        self.experts = Normalised(site, len(level_E), 2 * d, momentum)
        self.features, self.task_features = FeatureGates(site, 1 + g, d, ranks), FeatureGates(site, tasks, 2 * d, ranks)
        self.group_gate, self.shared_gate = site.linear(g * len(pool_E)), site.linear(len(pool_E))
        self.group_self = site.linear(len(pool_E))
        self.task_gate, self.task_self = site.linear(tasks * len(level_E), 2 * d), site.linear(len(level_E), 2 * d)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        task_T = task_of(ctx, len(x_TD), self.tasks).to(x_TD.device)
        group_T, t = self.group_of[task_T], len(x_TD)
        first_TE, pools = self.first_GE[group_T], self.first_GE.shape[1]
        group_TE = self.group_gate(x_TD).unflatten(-1, (self.groups, pools))[torch.arange(t), group_T]
        private_TE = first_TE & (self.pool_E >= 0)  # type: ignore[operator]
        group = _routing(group_TE, first_TE, self.group_self(x_TD), private_TE)
        shared = _routing(self.shared_gate(x_TD), torch.ones_like(first_TE), None, private_TE)
        # Every token meets all experts of level 1, each pool behind its own feature gate.
        v_ETD = (x_TD[:, None] * self.features(x_TD))[:, self.pool_E + 1].transpose(0, 1)  # type: ignore[operator]
        y_ETD = self.meta(v_ETD.flatten(0, 1), list(range(0, t * pools + 1, t)) if t else [0] * (pools + 1), ctx.training)
        y_ETD = y_ETD.view(pools, t, x_TD.shape[1])
        z_TI = torch.cat([torch.einsum("te,etd->td", _dense(r, pools).to(y_ETD.dtype), y_ETD) for r in (group, shared)], -1)
        z_TI = z_TI * self.task_features(z_TI)[torch.arange(t), task_T]
        seen_TE, level = self.second_TE[task_T], self.second_TE.shape[1]
        task_TE = self.task_gate(z_TI).unflatten(-1, (self.tasks, level))[torch.arange(t), task_T]
        task = _routing(task_TE, seen_TE, self.task_self(z_TI), self.own_TE[task_T])
        order = order_of(task.experts_TK, level)
        y_TD = combine(self.experts(gather(z_TI, order), order.starts, ctx.training), task, order)
        return BlockOutput(y_TD, (group, shared, task))


def _routing(logits_TE: Tensor, allowed_TE: Tensor, own_TE: Tensor | None, private_TE: Tensor) -> Routing:
    """The softmax gate over the allowed experts, plus the self-gate over the private ones."""
    logits_TE = logits_TE.float().masked_fill(~allowed_TE, float("-inf"))
    probs_TE = logits_TE.softmax(-1)
    weights_TE = probs_TE
    if own_TE is not None:
        own_TE = own_TE.float()
        apart = own_TE.masked_fill(~private_TE, float("-inf"))
        single = private_TE.sum(-1, keepdim=True) == 1
        weights_TE = probs_TE + torch.where(private_TE, torch.where(single, own_TE.sigmoid(), apart.softmax(-1)), 0.0)
    slots = int(allowed_TE.sum(1).max()) if len(allowed_TE) else 0
    ranked_TK = allowed_TE.int().sort(dim=1, descending=True, stable=True).indices[:, :slots]
    empty_TK = ~allowed_TE.gather(1, ranked_TK)
    weights_TK = weights_TE.gather(1, ranked_TK).masked_fill(empty_TK, 0.0)
    return Routing(ranked_TK.masked_fill(empty_TK, EMPTY), weights_TK, logits_TE, probs_TE)


def _dense(routing: Routing, experts: int) -> Tensor:
    """weights_TE."""
    out = routing.weights_TK.new_zeros(routing.tokens, experts)
    return out.scatter_add(1, routing.experts_TK.clamp_min(0), routing.weights_TK)


@method("layers.blocks.home", kind="block", fidelity="adapted", paper="2408.05430", traits=("causal-in-training",))
def home(
    site: Site,
    *,
    groups: list[int] | None = None,
    shared: int = 1,
    own: int = 1,
    ranks: list[int] | None = None,
    momentum: float = 0.1,
) -> Home:
    """groups: tasks in each group, default two of two. shared, own: experts in each shared and private pool. ranks: of the low-rank
    gates, default 2 and 4. momentum: of the running statistics."""
    groups, ranks = list(groups or (2, 2)), list(ranks or (2, 4))
    require(all(isinstance(n, int) and n >= 1 for n in groups), f"groups {groups}", "whole numbers of tasks above 0")
    require(all(isinstance(r, int) and r >= 1 for r in ranks), f"ranks {ranks}", "whole numbers above 0")
    require(shared >= 1 and own >= 1, f"{shared} shared and {own} own experts", "at least 1 each")
    require(0 < momentum <= 1, f"momentum {momentum}", "above 0, at most 1")
    return Home(site, groups, shared, own, ranks, momentum)
