"""Routers at a small site, and routings as dense matrices, for the tests of single methods."""

from __future__ import annotations

from dataclasses import replace

import torch

from moestro.core.routing import RouteContext
from moestro.layers.experts import Stacked, spec_at
from moestro.layers.site import Site


def site(**changes):
    base = Site(d_model=16, num_experts=8, top_k=2, d_expert=8, vocabulary=32, init_std=0.5)
    return replace(base, **changes)


def with_bank(where):
    torch.manual_seed(0)
    return replace(where, experts=Stacked(where.num_experts, spec_at(where), std=0.3))


def context(tokens=24, training=True, *, step=0, seed=0, length=8, ids=None):
    place = torch.arange(tokens)
    return RouteContext(0, training, step, ids, place // length, place % length, torch.Generator().manual_seed(seed), {})


def inputs(tokens=24, width=16, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def made(factory, where=None, *, weights=0, **options):
    torch.manual_seed(weights)
    return factory(where or site(), **options)


def dense(routing, experts=8):
    """weights_TE, 0 where not routed."""
    out = routing.weights_TK.new_zeros(routing.tokens, experts + 1)
    out.scatter_add_(1, routing.experts_TK.masked_fill(routing.experts_TK < 0, experts), routing.weights_TK)
    return out[:, :experts].detach()


def chosen(routing, experts=8):
    """bool_TE."""
    out = torch.zeros(routing.tokens, experts + 1, dtype=torch.bool)
    return out.scatter_(1, routing.experts_TK.masked_fill(routing.experts_TK < 0, experts), True)[:, :experts]
