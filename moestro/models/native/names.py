"""Finds the trunk's tensors by name and checks their shapes, so that a description is right before anything is read."""

from __future__ import annotations

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.core.layer import ModelFacts
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import is_coded
from moestro.models.families.settings import Settings
from moestro.models.layout import Layout
from moestro.models.native.decoder import Attention, Decoder, Latent, Layer, Linear, Mlp, Rope, Router

STORED = ("F32", "F16", "BF16")


class Names:
    """The trunk's tensors of one checkpoint. Every method raises CheckpointError for what is missing or of another shape."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.facts: ModelFacts = layout.facts
        self.trunk = frozenset(layout.trunk)
        self.d_model = layout.facts.d_model
        ends = ("embed_tokens.weight", "norm.weight")
        roots = {n.removesuffix(ends[0]) for n in self.trunk if n.endswith(ends[0])}
        roots |= {n.removesuffix(ends[1]) for n in self.trunk if n.endswith(ends[1]) and ".layers." not in f".{n}"}
        if len(roots) != 1:
            raise UnsupportedModel(f"the tensors' names begin in {len(roots)} ways", expected="one decoder")
        self.root = roots.pop()

    def found(self, *names: str) -> str:
        """The first of these names that is there, or ''."""
        return next((name for name in names if name in self.trunk), "")

    def tensor(self, shape: tuple[int, ...], *names: str) -> str:
        """The first of these names that is there."""
        name = self.found(*names)
        if not name:
            raise CheckpointError(
                f"{self.checkpoint.path} lacks {names[0]}", expected="the whole model", fix="download the checkpoint again"
            )
        ref = self.checkpoint.ref(name)
        if ref.shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(ref.shape)}",
                expected=str(list(shape)),
                fix="use the config.json that belongs to the weights",
            )
        if ref.dtype not in STORED and not (is_coded(ref.dtype) and len(shape) == 2):
            raise UnsupportedModel(f"{name} has dtype {ref.dtype}", expected=", ".join(STORED))
        return name

    def linear(self, rows: int, cols: int, *stems: str, bias: bool = False) -> Linear:
        """stems: names without '.weight'."""
        weight = self.tensor((rows, cols), *(f"{stem}.weight" for stem in stems))
        return Linear(weight, self.tensor((rows,), weight.removesuffix("weight") + "bias") if bias else "")

    def norm(self, stem: str, width: int | None = None) -> str:
        return self.tensor((self.d_model if width is None else width,), f"{stem}.weight")

    def mlp(self, stem: str, width: int, *, bias: bool = False) -> Mlp:
        """gate_proj, up_proj and down_proj."""
        gate, up = (self.linear(width, self.d_model, f"{stem}.{name}_proj", bias=bias) for name in ("gate", "up"))
        return Mlp(gate, up, self.linear(self.d_model, width, f"{stem}.down_proj", bias=bias))

    def attention(
        self,
        at: str,
        *,
        kv_heads: int,
        width: int,
        scale: float | None = None,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: str = "",
        window: int = 0,
        sinks: bool = False,
        clip: float = 0.0,
    ) -> Attention:
        """Of the layer `at`. scale: one over the root of the width if not given. qk_norm: 'heads', 'whole' or ''."""
        heads, stem = self.settings.integer("num_attention_heads"), f"{at}self_attn."
        if kv_heads < 1 or heads % kv_heads:
            raise CheckpointError(f"{self.settings.where} says {heads} heads with {kv_heads} for keys and values")
        sizes = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
        q, k, v = (self.linear(size, self.d_model, f"{stem}{name}_proj", bias=bias) for name, size in sizes.items())
        per_head = qk_norm == "heads"
        return Attention(
            q,
            k,
            v,
            self.linear(self.d_model, heads * width, f"{stem}o_proj", bias=out_bias),
            heads,
            kv_heads,
            width,
            width**-0.5 if scale is None else scale,
            q_norm=self.norm(f"{stem}q_norm", width if per_head else sizes["q"]) if qk_norm else "",
            k_norm=self.norm(f"{stem}k_norm", width if per_head else sizes["k"]) if qk_norm else "",
            norm_heads=per_head,
            window=window,
            sinks=self.tensor((heads,), f"{stem}sinks") if sinks else "",
            clip=clip,
        )

    def layer(self, index: int) -> str:
        """What the names of a decoder layer begin with."""
        return f"{self.root}layers.{index}."

    def made(
        self,
        at: str,
        attention: Attention | Latent,
        router: Router | None = None,
        mlp: Mlp | None = None,
        mlp_gate: Linear | None = None,
    ) -> Layer:
        """The decoder layer `at`, with its two norms."""
        first, second = self.norm(f"{at}input_layernorm"), self.norm(f"{at}post_attention_layernorm")
        return Layer(first, attention, second, router, mlp, mlp_gate)

    def experts(self, index: int) -> int:
        """Routed experts of a decoder layer, 0 in a dense one."""
        return next((layer.num_experts for layer in self.facts.layers if layer.index == index), 0)

    def decoder(self, layers: list[Layer], rope: Rope, eps: float, **scales: float) -> Decoder:
        """The whole: embedding, final norm and output layer around `layers`.

        Raises CheckpointError when a tensor of the trunk has no place.
        """
        shape = (self.facts.vocabulary, self.d_model)
        embedding, beside = f"{self.root}embed_tokens.weight", self.root.removesuffix("model.") + "lm_head.weight"
        tied = self.settings.flag("tie_word_embeddings", False)
        first, last = ((embedding, beside), (beside, embedding)) if tied else ((embedding,), (beside,))
        made = Decoder(
            self.tensor(shape, *first),
            self.norm(f"{self.root}norm"),
            self.tensor(shape, *last),
            tied,
            tuple(layers),
            rope,
            eps,
            self.settings.activation(),
            **scales,
        )
        if left := sorted(self.trunk - set(made.names())):
            raise CheckpointError(
                f"{left[0]} has no place in this {self.settings.model_type}",
                expected="the tensors of this model and no others",
                fix="use the config.json and the weights of one revision",
            )
        return made
