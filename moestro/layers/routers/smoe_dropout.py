"""SMoE-Dropout: a frozen random router, and more and more experts.

Paper      Chen et al. 2023, arXiv 2303.01610
Idea       Random fixed routing of few experts regularises early; growing K makes the model dense at last, and usable at any K.
Rule       z = x W^T + b, W and b random and never trained; S = the k largest; g = softmax of the k chosen logits
           k(step) = clip(round(least + (most - least) step / steps)), least to most; evaluation takes `inference`
Needs      nothing; top_k of the configuration is not read
Gives      a router without parameters or losses; W and b are saved buffers
Departs    from nothing. Trait gradient: the router is frozen by design
Checked    the router is the same bits after training; all experts: the dense softmax mixture; k never falls and meets its ends
"""

from __future__ import annotations

from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import SHAPES, Ramp
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, softmax


class Frozen(nn.Module):
    """A linear map with torch's initial weights, as buffers."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        drawn = nn.Linear(site.d_model, site.num_experts)
        self.register_buffer("weight_ED", drawn.weight.detach())
        self.register_buffer("bias_E", drawn.bias.detach())

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        return nn.functional.linear(x_TD, self.weight_ED.float(), self.bias_E.float())  # type: ignore[operator]


class GrowingK:
    """k(step) best in training, `inference` best in evaluation."""

    def __init__(self, grows: Ramp, inference: int) -> None:
        self.grows, self.inference = grows, inference

    def slots(self, step: int, training: bool) -> int:
        """k."""
        return round(self.grows(step)) if training else self.inference

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE.topk(self.slots(ctx.step, ctx.training), -1).indices


@method("layers.routers.smoe_dropout", kind="router", fidelity="faithful", paper="2303.01610", traits=("gradient",))
def smoe_dropout(
    site: Site, *, least: int = 0, most: int = 0, steps: int = 1000, shape: str = "linear", inference: int = 0
) -> StagedRouter:
    """least: experts at the start, 0 for half of them; most: after `steps` steps, 0 for all. inference: in evaluation, 0 for `most`."""
    e = site.num_experts
    least, most = least or max(1, e // 2), most or e
    inference = inference or most
    require(1 <= least <= most <= e, f"{least} growing to {most} of {e} experts", "1 to the number of experts, not falling")
    require(1 <= inference <= e, f"inference with {inference} of {e} experts", f"1 to {e}")
    require(shape in SHAPES, f"shape {shape!r}", "one of " + ", ".join(SHAPES))
    grows = Ramp(least, most, steps, shape=shape)
    return StagedRouter(score=Frozen(site), normalise=softmax, select=GrowingK(grows, inference), combine=Combine("softmax"))
