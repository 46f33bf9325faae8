"""HyperFormer's feed-forward: many small ReLU experts, two of them per token, weighed by a softmax of their two scores.

Paper      Hu et al. 2023, arXiv 2308.06512; the gate is FastMoE's default
Idea       On small structured data (statements of a knowledge graph) a wide feed-forward layer can be many narrow ones at the same active width.
Rule       z = x W + b; S = the k largest; g = softmax of z over S; y = sum g_e (W2_e relu(W1_e x + b1_e) + b2_e); no balance loss
Needs      num_experts (64), top_k (2), d_expert of the configuration; its router, activation, gated and bias are not read
Gives      a block
Departs    The model around it (neighbour aggregation, convolution of pairs) is not built: the recipe `hyperformer` predicts the end of statements with qualifiers
           with an encoder and these layers. Initial weights follow the model's init_std
Checked    all and equal experts are one dense layer; gates sum to 1; recipe trained
"""

from __future__ import annotations

from dataclasses import replace

from moestro.core.experts import ExpertSpec
from moestro.core.method import method
from moestro.layers.block import MoEBlock
from moestro.layers.decoder import losses_at
from moestro.layers.experts import Stacked, down_std
from moestro.layers.routers.topk import topk
from moestro.layers.site import Site


@method("layers.blocks.hyperformer", kind="block", fidelity="faithful", paper="2308.06512")
def hyperformer(site: Site) -> MoEBlock:
    """The block at this site."""
    spec = ExpertSpec(site.d_model, site.d_expert, "relu", False, True)
    bank = Stacked(site.num_experts, spec, std=site.init_std, down_std=down_std(site))
    at = replace(site, experts=bank)
    return MoEBlock(topk(at, combine="softmax", bias=True, balance=0.0), bank, losses=losses_at(at) if site.config else {})
