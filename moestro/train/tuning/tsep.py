"""Task-specific expert pruning: while the model is fine-tuned for a task, the experts that the task does not use leave one after another.

Paper      Chen et al. 2022, arXiv 2206.00277
Idea       Dropping while training lets those that stay take over; at the end a task has its own few experts.
Rule       the first half of the steps is cut into `windows`; in each, score_e = the share of choices (or of weight) that alive expert e got;
           at its end every alive expert with score < threshold / alive goes; at half time only the `keep` best stay, to the end.
           A dropped expert's logit is -inf
Needs      nothing
Gives      the fine-tuned model, and which experts stay in each layer
Departs    never fewer than are used per token (the paper ends with one, of top-1 models); the threshold and the number of windows are a
           reproduction's; the moments of dropped experts' weights stay, but their weights get no gradient
Checked    alive sets shrink and are nested; no dropped expert is chosen; `keep` at half time; keeps a planted domain's experts
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError, UnsupportedModel
from moestro.core.method import method
from moestro.core.routing import OnLogits, RouteContext, Tap
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome
from moestro.train.objectives.next_token import NextToken
from moestro.train.pretrained import Pretrained, opened
from moestro.train.tuned import Left, Tuning


class Proficiency(nn.Module):
    """The objective; it keeps which experts are alive and what they got in this window."""

    alive_LE: Tensor
    score_LE: Tensor

    def __init__(self, student: Pretrained, by_weight: bool) -> None:
        super().__init__()
        self.inner, self.by_weight = NextToken(), by_weight
        layers = student.model.layers
        shape = len(layers), max(layer.facts.num_experts for layer in layers)
        self.register_buffer("alive_LE", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("score_LE", torch.zeros(shape))
        for i, layer in enumerate(layers):
            self.alive_LE[i, : layer.facts.num_experts] = True
            layer.replace(router=layer.router.tapped(Tap("logits", self._tap(i, layer.facts.num_experts))))

    def _tap(self, layer: int, experts: int) -> OnLogits:
        def tap(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
            return logits_TE.masked_fill(~self.alive_LE[layer, :experts], float("-inf"))

        return tap

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        outcome = self.inner(module, batch, step, rng)
        assert isinstance(module, Pretrained)
        with torch.no_grad():
            for i, (_, routing) in sorted(module.watched.items()):
                ids, weights = routing.experts_TK.reshape(-1), routing.weights_TK.detach().reshape(-1).float()
                each = weights if self.by_weight else torch.ones_like(weights)
                self.score_LE[i].index_add_(0, ids[ids >= 0], each[ids >= 0])
        return outcome


class Dropping:
    """The phase."""

    def __init__(self, scores: Proficiency, windows: int, threshold: float, keep_L: list[int]) -> None:
        self.scores, self.windows, self.threshold, self.keep_L = scores, windows, threshold, keep_L

    @torch.no_grad()
    def __call__(self, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, steps: int) -> Mapping[str, float]:
        alive_LE, score_LE, half = self.scores.alive_LE, self.scores.score_LE, max(1, steps // 2)
        ends = {max(1, round((i + 1) * half / self.windows)) for i in range(self.windows)}
        if step in ends:
            for alive_E, score_E, keep in zip(alive_LE, score_LE, self.keep_L, strict=True):
                number = int(alive_E.sum())
                share_E = score_E / score_E.sum().clamp_min(1e-20)
                order = torch.argsort(-share_E.masked_fill(~alive_E, -1.0), stable=True)
                stay = keep if step >= half else max(keep, int((share_E[alive_E] >= self.threshold / number).sum()))
                alive_E[order[min(stay, number) :]] = False
            score_LE.zero_()
        return {"alive": float(alive_LE.sum(1).float().mean())}


@method("train.tuning.tsep", kind="tuning", fidelity="adapted", paper="2206.00277")
def tsep(
    student: Pretrained,
    teacher: Pretrained | None,
    *,
    keep: int = 0,
    windows: int = 4,
    threshold: float = 0.1,
    by_weight: bool = True,
) -> Tuning:
    """keep: experts of each layer at the end; 0: as many as a token uses. Raises InputError, UnsupportedModel."""
    layers = [layer.facts for layer in student.model.layers]
    for facts in layers:
        if facts.router.score not in ("softmax", "logits") or facts.router.groups > 1 or facts.router.selection_bias:
            raise UnsupportedModel(
                "the router would choose experts whose logit is -inf",
                expected="a softmax over all experts, without groups and bias",
            )
        if not (keep == 0 or facts.top_k <= keep <= facts.num_experts):
            raise InputError(f"{keep} experts are to stay", expected=f"{facts.top_k} to {facts.num_experts}")
    if windows < 1 or not 0 <= threshold <= 1:
        raise InputError(f"windows {windows}, threshold {threshold:g}", expected="at least 1, and a share")
    scores = Proficiency(student, by_weight)
    opened(list(student.module.parameters()))
    phase = Dropping(scores, windows, threshold, [keep or facts.top_k for facts in layers])

    def left() -> Left:
        return Left(kept=tuple(tuple(torch.nonzero(row).reshape(-1).tolist()) for row in scores.alive_LE))

    return Tuning(scores, (phase,), left)
