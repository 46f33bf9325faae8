"""Sinks: how strongly each layer's attention leans on the first token.

Paper      Gu et al. 2024, arXiv 2410.10781
Idea       Attention sinks and massive activations come together; an expert that makes them must not be pruned or crushed. High in
           the layers after a super expert, it says that its work is used.
Rule       strength = sink_L / sinking_L, the mean weight given to the first token; even = the same if all tokens before were attended
           alike, the null; sinks = share of heads (of all sequences) with a mean of at least `threshold`
Needs      sinks
Gives      per layer strength, even and sinks
Departs    the first token's own weight is not counted; the threshold is rounded down to a multiple of 0.05
Checked    even attention gives strength = even and no sinks; a planted key gives 1 and 1
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.probes.sinks import BINS
from moestro.profile.profile import Profile


@method("profile.measures.sinks", kind="measure", fidelity="adapted", paper="2410.10781", needs=("sinks",))
def sinks(profile: Profile, *, threshold: float = 0.3) -> Finding:
    """One row per layer. threshold: the mean weight from which on a head counts as a sink."""
    tokens_L, sums_L, even_L = (profile.need("sinks", name) for name in ("sinking_L", "sink_L", "even_sink_L"))
    rows = []
    for layer, bins_B in enumerate(profile.need("sinks", "sinks_LB")):
        n, heads = int(tokens_L[layer]), int(bins_B.sum())
        if n:
            above = int(bins_B[max(0, int(threshold * BINS + 1e-9)) :].sum())
            rows.append((layer, float(sums_L[layer]) / n, float(even_L[layer]) / n, above / heads))
        else:
            rows.append((layer, None, None, None))
    return finding(
        ("layer", "strength", "even", "sinks"),
        rows,
        "strength: mean attention to the first token. even: what attending evenly would give. sinks: share of heads with a mean of"
        f" {threshold:g} or more; - is a layer without such attention.",
    )
