"""Context independence: what a token's expert follows, its id, its neighbours, its place or its kind of text.

Paper      Xue et al. 2024, arXiv 2402.01739 (OpenMoE)
Idea       In OpenMoE routing follows the token id alone, whatever the context.
Rule       For each feature (id, previous id, next id, position, domain): mode share = sum over its values v of max_e #(v, e) / tokens, e the
           heaviest expert; ids and positions with fewer than `least` tokens take no part. Null: the experts shuffled over the tokens
Needs      a trace
Gives      per layer and feature the mode share, the null's, and the gain (share - null) / (1 - null)
Departs    the paper shows pictures; the mode share and the null are the card's and ours
Checked    planted routing by id gives 1 for the id; shuffled experts give a gain of about 0
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.core.trace import Trace
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.context_independence", kind="measure", paper="2402.01739", fidelity="adapted", needs=("trace",))
def context_independence(profile: Profile, *, least: int = 8, seed: int = 0) -> Finding:
    """One row per layer; a column per feature. least: tokens that a value of a feature needs."""
    trace = profile.need_trace()
    found = features(trace)
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(trace.layers):
        first_T = np.asarray(trace.experts_LTK[layer, :, 0], np.int64)
        shuffled_T = rng.permutation(first_T)
        row: list[float] = []
        for value_T in found.values():
            share, null = mode_share(value_T, first_T, least), mode_share(value_T, shuffled_T, least)
            row += [share, (share - null) / (1 - null) if null < 1 else 0.0]
        rows.append((layer, *row))
    names = [name + kind for name in found for kind in ("", "_gain")]
    return finding(
        ("layer", *names),
        rows,
        "share of tokens at the commonest expert of their id, of the id before or after, of their position, of their kind of text.",
        f"gain: 0 chance, 1 certain. Values with fewer than {least} tokens take no part.",
    )


def features(trace: Trace) -> dict[str, np.ndarray]:
    """Per token the value of each feature; -1 where it has none. The domain only when there are two or more."""
    ids_T, sequence_T = np.asarray(trace.tokens_T, np.int64), np.asarray(trace.sequences_T)
    same_T = np.diff(sequence_T) == 0
    before_T, after_T = np.full(len(ids_T), -1), np.full(len(ids_T), -1)
    before_T[1:][same_T] = ids_T[:-1][same_T]
    after_T[:-1][same_T] = ids_T[1:][same_T]
    out = {"id": ids_T, "previous": before_T, "next": after_T, "position": np.asarray(trace.positions_T, np.int64)}
    if labels := trace.info.get("label_of_sequence"):
        _, number_T = np.unique(sequence_T, return_inverse=True)
        domain_T = np.asarray(labels)[number_T]
        if len(np.unique(domain_T)) > 1:
            out["domain"] = domain_T
    return out


def mode_share(value_T: np.ndarray, expert_T: np.ndarray, least: int) -> float:
    """Share of tokens whose expert is the commonest one of their value."""
    kept = (value_T >= 0) & (expert_T >= 0)
    if not kept.any():
        return float("nan")
    _, number, counts = np.unique(value_T[kept], return_inverse=True, return_counts=True)
    table = np.zeros((len(counts), int(expert_T.max()) + 1), np.int64)
    np.add.at(table, (number, expert_T[kept]), 1)
    enough = counts >= least
    return float(table[enough].max(1).sum() / counts[enough].sum()) if enough.any() else float("nan")
