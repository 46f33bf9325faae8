"""Reordered computation: experts one after another, each on its whole queue, with memory for two experts.

Paper      Liang et al. 2022, M3ViT, arXiv 2210.14793
Idea       Route all tokens first; then an expert is loaded once, however many tokens want it, while the one before still computes.
Rule       queues per expert; expert i on its full queue while expert i+1 is copied into the other of two buffers
Needs      d_expert, activation and gated of the configuration
Gives      a bank of E experts; training is that of `stacked`, evaluation is reordered
Departs    the buffers are ordinary memory filled by a thread, where the paper's are on an FPGA; the engine streams from disk in this order
Checked    equal to token by token; loads are the experts hit, once each; never more than two loaded
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from moestro.core.experts import ExpertSpec
from moestro.core.method import method
from moestro.layers.experts import Stacked, activate, down_std, spec_at
from moestro.layers.site import Site, require


class Reordered(Stacked):
    """A `Stacked` that computes expert by expert when it is not trained."""

    def __init__(self, num: int, spec: ExpertSpec, *, std: float = 0.02, down_std: float = 0.0) -> None:
        require(not spec.bias, "reordered experts with biases", "bias false")
        super().__init__(num, spec, std=std, down_std=down_std)

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        queues = [(e, a, b) for e, (a, b) in enumerate(pairwise(starts)) if b > a]
        if torch.is_grad_enabled() or not queues:
            return super().on_pairs(x_ND, starts)
        buffers = [(torch.empty_like(self.gate_up_EFD[0]), torch.empty_like(self.down_EDF[0])) for _ in range(2)]
        y_ND = torch.empty_like(x_ND)
        with ThreadPoolExecutor(1) as loader:
            coming = loader.submit(self.load, queues[0][0], buffers[0])
            for i, (_, a, b) in enumerate(queues):
                gate_up, down = coming.result()
                if i + 1 < len(queues):
                    coming = loader.submit(self.load, queues[i + 1][0], buffers[(i + 1) % 2])
                h = activate(functional.linear(x_ND[a:b], gate_up.to(x_ND.dtype)), self.spec)
                y_ND[a:b] = functional.linear(h, down.to(x_ND.dtype))
        return y_ND

    def load(self, e: int, buffer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Copy expert e's weights into a buffer."""
        with torch.no_grad():  # a thread has its own mode
            buffer[0].copy_(self.gate_up_EFD[e])
            buffer[1].copy_(self.down_EDF[e])
        return buffer


@method("layers.banks.reordered", kind="experts", fidelity="adapted", paper="2210.14793")
def reordered(site: Site) -> Reordered:
    """site.num_experts experts."""
    return Reordered(site.num_experts, spec_at(site), std=site.init_std, down_std=down_std(site))
