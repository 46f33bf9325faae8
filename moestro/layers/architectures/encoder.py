"""The encoder: every position reads every other, for samples whose label is predicted.

Paper      none; the form of BERT and of vision transformers
Idea       A classifier need not be causal: what follows in an image is known.
Rule       the plain decoder's layers, attention over the whole row (of its document, where rows are packed)
Needs      a configuration; an objective that does not predict the inputs, such as `label`
Gives      a model with logits at every position; the last one stands for the sample
Departs    Trait causal: attention reads later tokens, by design; next-token training would see its answers
Checked    later tokens change earlier logits; with a single token it is the plain decoder
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.method import method
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder


class Encoder(Decoder):
    """A decoder whose attention has no direction."""

    def visible(self, tokens_BT: Tensor, segment_BT: Tensor | None) -> Tensor:
        if segment_BT is not None:
            return (segment_BT[:, :, None] == segment_BT[:, None, :])[:, None]
        t = tokens_BT.shape[1]
        return torch.ones(1, 1, t, t, dtype=torch.bool, device=tokens_BT.device)


@method("layers.architectures.encoder", kind="architecture", fidelity="exact", traits=("causal",))
def encoder(config: MoEConfig) -> Encoder:
    """Layers as the configuration names them."""
    return Encoder(config)
