"""Early routing: how much of the routing two checkpoints share.

Paper      Xue et al. 2024, arXiv 2402.01739 (OpenMoE)
Idea       Routing is fixed early in training and hardly changes later; two checkpoints show when.
Rule       On the same tokens: first = share with the same heaviest expert; overlap = mean |S1 and S2| / |S1 or S2| of the sets chosen.
           Chance: the same with the other's tokens shuffled within its layer
Needs      a trace, and one of the other checkpoint on the same data
Gives      per layer first, overlap and both under chance
Departs    nothing
Checked    a checkpoint with itself gives 1; independent routing stays at chance
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.early_routing", kind="measure", paper="2402.01739", fidelity="faithful", needs=("trace",))
def early_routing(profile: Profile, *, other: str = "", seed: int = 0) -> Finding:
    """other: the profile of the other checkpoint."""
    if not other:
        raise InputError(
            "there is nothing to compare with", expected="another checkpoint's profile", fix="--measure early_routing:other=FILE"
        )
    second_profile = Profile.open(other)
    one, two = profile.need_trace(), second_profile.need_trace()
    same = profile.data == second_profile.data and np.array_equal(one.tokens_T, two.tokens_T)
    if not same or one.num_experts != two.num_experts:
        raise InputError(
            f"{other} was made of other data, or of a model with other layers",
            expected="two checkpoints of one training run on the same text with the same options",
        )
    order = np.random.default_rng(seed).permutation(one.tokens)
    rows = []
    for layer in range(one.layers):
        a_TK, b_TK = np.asarray(one.experts_LTK[layer], np.int64), np.asarray(two.experts_LTK[layer], np.int64)
        rows.append((layer, *agreement(a_TK, b_TK), *agreement(a_TK, b_TK[order])))
    return finding(("layer", "first", "overlap", "first_chance", "overlap_chance"), rows, "1: both checkpoints route alike.")


def agreement(a_TK: np.ndarray, b_TK: np.ndarray) -> tuple[float, float]:
    """(share with the same first expert, mean Jaccard index of the sets)."""
    both_T = ((a_TK[:, :, None] == b_TK[:, None, :]) & (a_TK >= 0)[:, :, None]).sum((1, 2))
    either_T = (a_TK >= 0).sum(1) + (b_TK >= 0).sum(1) - both_T
    used = either_T > 0
    return float((a_TK[used, 0] == b_TK[used, 0]).mean()), float((both_T[used] / either_T[used]).mean())
