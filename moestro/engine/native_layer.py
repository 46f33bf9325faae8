"""One decoder layer of the native trunk: its weights, and its plan for one row in two native calls where its shape allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.core.layer import LayerFacts
from moestro.engine.native_attention import GroupedAttention, LatentAttention
from moestro.kernels import native
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.kernels.linear import linear
from moestro.kernels.packed import Packed
from moestro.kernels.step import AttentionStep, DenseStep, LayerStep, RouterStep
from moestro.models.native.decoder import Decoder


@dataclass(frozen=True, slots=True)
class NativeRouter:
    """A router's weights. choice: a bias on the choice alone."""

    facts: LayerFacts
    weight: Matrix | Packed
    bias: np.ndarray | None
    choice: np.ndarray | None

    def logits(self, x_ND: np.ndarray, out_NE: np.ndarray | None = None, threads: int = 0) -> np.ndarray:
        return linear(x_ND, self.weight, out_TR=out_NE, bias_R=self.bias, threads=threads)


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One decoder layer's weights. mlp: dense, or what every token passes beside the experts."""

    input_norm: np.ndarray
    attention: GroupedAttention | LatentAttention
    post_norm: np.ndarray
    router: NativeRouter | None
    mlp: ExpertView | None
    mlp_gate: tuple[Matrix | Packed, np.ndarray | None] | None

    def step(self, next_norm: np.ndarray, decoder: Decoder) -> LayerStep | None:
        """The layer for one row, with the norm that follows it; None for latent attention, a router with groups, and without native code."""
        attention, router = self.attention, self.router
        if not native.available() or not isinstance(attention, GroupedAttention):
            return None
        if router is not None and router.facts.router.groups_kept < router.facts.router.groups:
            return None
        dense = None if self.mlp is None else DenseStep(self.mlp, self.mlp_gate, decoder.activation)
        chosen = None if router is None else _router_step(router)
        return LayerStep(
            self.post_norm, next_norm, decoder.eps, decoder.residual_scale, _attention_step(attention), chosen, dense
        )


def _attention_step(attention: GroupedAttention) -> AttentionStep:
    at = attention.at
    q, k, v = zip(attention.matrices, attention.biases, strict=True)
    return AttentionStep(
        (q, k, v, (attention.o, attention.o_bias)),
        heads=at.heads,
        kv_heads=at.kv_heads,
        width=at.width,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        norm_heads=at.norm_heads,
        clip=at.clip,
        interleaved=attention.interleaved,
        scale=at.scale,
        window=at.window,
        sinks=attention.sinks,
    )


def _router_step(router: NativeRouter) -> RouterStep:
    facts, spec = router.facts.router, router.facts.spec
    return RouterStep(
        (router.weight, router.bias),
        chosen=router.facts.top_k,
        score=facts.score,
        bias=router.choice,
        renormalised=facts.renormalised,
        scale=facts.scale,
        activation=spec.activation,
        limit=spec.limit,
        alpha=spec.alpha,
    )
