"""Usage by label: the experts that each kind of text uses most, with intervals.

Paper      none; Wilson 1927 for the interval of a share
Idea       Two bars of different height mean nothing without knowing how wide they are.
Rule       share[g, l, e] = tokens of label g whose slots hold e / tokens of g; Wilson's 95 % interval takes tokens for independent, the
           basic bootstrap draws whole sequences of the label
Needs      usage and sequences
Gives      per label and layer the `most` experts used most there, with both intervals and the share in all other text
Departs    nothing
Checked    Wilson against closed values; planted domains list their own experts; intervals hold the planted share
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.intervals import bootstrap, wilson
from moestro.profile.profile import Profile


@method("profile.measures.label_usage", kind="measure", fidelity="exact", needs=("usage", "sequences"))
def label_usage(profile: Profile, *, label: str = "", layer: int = -1, most: int = 3, draws: int = 500, seed: int = 0) -> Finding:
    """label, layer: only this one; by default all. most: experts listed for each. draws: of the bootstrap."""
    usage_GLE = profile.need("usage", "usage_GLE")
    tokens_G = np.array(profile.tokens_G)
    counts_SLE, of_S = profile.need("sequences", "sequence_counts_SLE"), profile.need("sequences", "sequence_label_S") - 1
    length_S = profile.need("sequences", "sequence_tokens_S")
    rows = []
    for g in [profile.label(label)] if label else range(len(profile.labels)):
        own = of_S == g
        for la in [layer] if layer >= 0 else range(len(profile.layers)):
            top = np.argsort(-usage_GLE[g, la], kind="stable")[:most]
            low, high = wilson(usage_GLE[g, la, top], tokens_G[g])
            drawn_low, drawn_high = np.full(len(top), np.nan), np.full(len(top), np.nan)
            if own.sum() > 1:
                found, lengths = counts_SLE[own][:, la, top].astype(np.float64), length_S[own]
                drawn_low, drawn_high = bootstrap(
                    lambda t_S, f=found, n=lengths: (t_S @ f) / (t_S @ n), int(own.sum()), draws=draws, seed=seed
                )
            rest = (usage_GLE[:, la, top].sum(0) - usage_GLE[g, la, top]) / max(1, tokens_G.sum() - tokens_G[g])
            for i, e in enumerate(top.tolist()):
                share = usage_GLE[g, la, e] / max(1, tokens_G[g])
                rows.append((profile.labels[g], la, e, share, low[i], high[i], drawn_low[i], drawn_high[i], rest[i]))
    return finding(
        ("label", "layer", "expert", "share", "low", "high", "drawn_low", "drawn_high", "elsewhere"),
        rows,
        "low, high: Wilson over tokens. drawn: bootstrap over sequences (none with fewer than two); trust the wider one.",
    )
