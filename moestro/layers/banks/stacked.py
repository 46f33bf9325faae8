"""Stacked experts: E feed-forward experts of one width.

Paper      none; the layout of Hugging Face transformers 5
Idea       All experts of a layer in two arrays, so that pairs sorted by expert meet them in a few large matrix products.
Rule       y = down_e(act(gate_e(x)) * up_e(x))
Needs      d_expert, activation, gated and bias of the configuration
Gives      an expert bank
Departs    nothing
Checked    equal to a loop over experts written out; gradients against finite differences
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.layers.experts import Stacked, down_std, spec_at
from moestro.layers.site import Site


@method("layers.banks.stacked", kind="experts", fidelity="exact")
def stacked(site: Site, *, zero_output: bool = False) -> Stacked:
    """site.num_experts experts. zero_output: the output maps start at zero."""
    return Stacked(site.num_experts, spec_at(site), std=site.init_std, down_std=down_std(site), zero_output=zero_output)
