"""Vocabulary specialisation: whether experts belong to token ids.

Paper      Muennighoff et al. 2024, arXiv 2409.02060 (OLMoE)
Idea       If an id's occurrences nearly always use the same expert, the expert is a matter of vocabulary.
Rule       share[x, l, e] = occurrences of id x whose slots hold e / occurrences of x; strongest = mean over ids (with `least` occurrences
           or more) of max_e share. Null: the same number of draws from the layer's own shares
Needs      tokens
Gives      per layer the mean strongest share, weighted by occurrences or not, and the null
Departs    the null is ours
Checked    a planted model whose routing follows the id gives 1; ids routed at random stay at the null
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.vocabulary_specialisation", kind="measure", paper="2409.02060", fidelity="adapted", needs=("tokens",))
def vocabulary_specialisation(profile: Profile, *, least: int = 8, seed: int = 0) -> Finding:
    """One row per layer. least: occurrences that an id needs to take part."""
    counts_ILE, seen_I = profile.need("tokens", "by_token_ILE"), profile.need("tokens", "token_counts_I")
    kept = seen_I >= least
    if not kept.any():
        raise InputError(f"no token id occurs {least} times", fix="profile more text, or give a smaller least")
    counts_ILE, seen_I = counts_ILE[kept], seen_I[kept]
    rng = np.random.default_rng(seed)
    rows = []
    for layer, experts in enumerate(profile.experts_L.tolist()):
        share_I = counts_ILE[:, layer, :experts].max(1) / seen_I
        p_E = counts_ILE[:, layer, :experts].sum(0) / seen_I.sum()  # the chance that a token's slots hold the expert
        null_I = rng.binomial(seen_I[:, None], np.minimum(1, p_E)[None, :]).max(1) / seen_I
        rows.append((layer, share_I.mean(), (share_I * seen_I).sum() / seen_I.sum(), null_I.mean()))
    return finding(
        ("layer", "strongest", "weighted", "null"),
        rows,
        f"over {int(kept.sum())} ids with {least} or more occurrences; weighted: by occurrences. 1: an id always uses the same expert.",
    )
