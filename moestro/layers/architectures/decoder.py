"""The plain decoder: every layer has its own attention, router and experts.

Paper      none; the Llama and Mixtral form
Idea       Pre-norm attention and feed-forward layers on one residual stream; the feed-forward is a block of experts.
Rule       x = x + attention(norm(x)); x = x + block(norm(x))
Needs      a configuration
Gives      a model
Departs    nothing
Checked    logits equal to transformers' after export to a family
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder


@method("layers.architectures.decoder", kind="architecture", fidelity="exact")
def decoder(config: MoEConfig) -> Decoder:
    """Layers as the configuration names them."""
    return Decoder(config)
