"""Planted models and traces: small, made by construction, and the right answers are known.

A random model routes almost evenly, so every caching or analysis method looks alike on it. Here the routing is decided in advance.

The planted model is a Mixtral whose residual stream has three parts: one dimension per token, one per class of tokens, and free ones.
Attention and experts write into the free dimensions only, so token and class survive to every layer unchanged up to a positive scale:
routers read the class, hence token t is routed to exactly `experts_VLK[t]`; the head reads the token (and, weakly, the free dimensions,
so that a wrong expert output shows in the logits), hence greedy decoding continues t with exactly `next_V[t]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.core.trace import Trace
from moestro.kernels.convert import to_bf16
from moestro.models.writer import CheckpointWriter

CONSTRUCTED = "planted"  # the model fingerprint of traces that come from no model


@dataclass(frozen=True, slots=True)
class Truth:
    """What was planted. Shapes: V tokens of the vocabulary, L layers, K slots (heaviest weight first).

    group_V: the domain of each token id. experts_VLK: where each token is routed, exactly.
    next_V: the token that greedy decoding puts after each token. repeat: probability that a token has the domain of the one before.
    """

    group_V: np.ndarray
    experts_VLK: np.ndarray
    next_V: np.ndarray
    num_experts: int
    repeat: float

    def experts(self, tokens: Sequence[int]) -> np.ndarray:
        """experts_LTK of these tokens."""
        return np.ascontiguousarray(self.experts_VLK[np.asarray(tokens, np.int64)].swapaxes(0, 1))

    def continuation(self, token: int, length: int) -> list[int]:
        """The `length` tokens that greedy decoding puts after `token`."""
        out: list[int] = []
        for _ in range(length):
            token = int(self.next_V[token])
            out.append(token)
        return out

    def domain_experts(self, group: int, layer: int) -> set[int]:
        """Every expert that tokens of a domain use in a layer."""
        return set(self.experts_VLK[self.group_V == group, layer].reshape(-1).tolist())

    def trace(self, prompt: Sequence[int], length: int, *, model: str = CONSTRUCTED) -> Trace:
        """The trace of greedy decoding `length` tokens: the prompt in one prefill step, then each token but the last in its own."""
        tokens = [*prompt, *self.continuation(prompt[-1], length)[: max(0, length - 1)]]
        return as_trace(self.experts(tokens), self.num_experts, tokens=tokens, prefill=len(prompt), model=model)


@dataclass(frozen=True, slots=True)
class Planted:
    """A planted checkpoint: its folder, sequences of token ids to run through it, and what must come out."""

    path: Path
    sequences: list[list[int]]
    truth: Truth


@dataclass(frozen=True, slots=True)
class PlantedTrace:
    """A trace without a model. probability_E: chance of each expert at each draw, if it was drawn; repeat: as planted, if it was."""

    trace: Trace
    probability_E: np.ndarray | None = None
    repeat: float | None = None


def sticky_model(
    folder: str | Path,
    *,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    groups: int = 4,
    tokens_per_group: int = 16,
    repeat: float = 0.9,
    sequences: int = 4,
    length: int = 64,
    d_expert: int = 64,
    dtype: str = "float32",
    seed: int = 0,
) -> Planted:
    """Domains own disjoint sets of `top_k` experts per layer, and sequences stay in a domain with probability `repeat`.

    An expert cache of one domain's experts per layer therefore hits with that probability. Greedy decoding walks through each
    domain's tokens in order, then goes to the next domain: it stays with probability 1 - 1 / tokens_per_group.
    """
    assert groups * top_k <= experts, "disjoint sets need groups * top_k <= experts"
    rng = np.random.default_rng(seed)
    order_LE = np.stack([rng.permutation(experts) for _ in range(layers)])
    experts_GLK = order_LE[:, : groups * top_k].reshape(layers, groups, top_k).swapaxes(0, 1)
    vocabulary = groups * tokens_per_group
    group_V = np.arange(vocabulary) // tokens_per_group
    truth = Truth(group_V, experts_GLK[group_V], (np.arange(vocabulary) + 1) % vocabulary, experts, repeat)
    drawn = []
    for _ in range(sequences):
        group, walk = int(rng.integers(groups)), []
        for _ in range(length):
            walk.append(group * tokens_per_group + int(rng.integers(tokens_per_group)))
            if rng.random() >= repeat:
                group = int((group + rng.integers(1, groups)) % groups)
        drawn.append(walk)
    _write(Path(folder), truth, group_V, d_expert, dtype, rng)
    return Planted(Path(folder), drawn, truth)


def domain_model(
    folder: str | Path,
    *,
    layers: int = 2,
    domains: int = 3,
    experts_per_domain: int = 4,
    idle: int = 2,
    top_k: int = 2,
    tokens_per_domain: int = 16,
    sequences: int = 6,
    length: int = 48,
    d_expert: int = 64,
    dtype: str = "float32",
    seed: int = 0,
) -> Planted:
    """Each domain owns `experts_per_domain` experts per layer, its tokens use different `top_k` of them; `idle` experts are never used.

    Sequence i is of domain i modulo `domains`, so `repeat` is 1.
    """
    assert 1 <= top_k <= experts_per_domain
    rng = np.random.default_rng(seed)
    experts = domains * experts_per_domain + idle
    vocabulary = domains * tokens_per_domain
    group_V, place_V = np.divmod(np.arange(vocabulary), tokens_per_domain)
    order_LE = np.stack([rng.permutation(experts) for _ in range(layers)])
    # Token j of a domain uses experts j, j + 1, ... of its set, around: all of them get used.
    local_VK = (place_V[:, None] + np.arange(top_k)) % experts_per_domain
    experts_VLK = order_LE[:, group_V[:, None] * experts_per_domain + local_VK].swapaxes(0, 1)
    next_V = group_V * tokens_per_domain + (place_V + 1) % tokens_per_domain
    truth = Truth(group_V, experts_VLK, next_V, experts, 1.0)
    drawn = [
        ((i % domains) * tokens_per_domain + rng.integers(tokens_per_domain, size=length)).tolist() for i in range(sequences)
    ]
    class_V = group_V * experts_per_domain + place_V % experts_per_domain
    _write(Path(folder), truth, class_V, d_expert, dtype, rng)
    return Planted(Path(folder), drawn, truth)


def _write(folder: Path, truth: Truth, class_V: np.ndarray, f: int, dtype: str, rng: np.random.Generator) -> None:
    """The checkpoint described at the top. class_V: tokens of a class share their experts."""
    vocabulary, layers, k = truth.experts_VLK.shape
    classes, heads, head_dim = int(class_V.max()) + 1, 4, 16
    d = -(-(vocabulary + classes + 32) // 32) * 32
    free = slice(vocabulary + classes, d)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": dtype,
        "vocab_size": vocabulary,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "num_local_experts": truth.num_experts,
        "num_experts_per_tok": k,
        "router_aux_loss_coef": 0.001,
    }
    writer = CheckpointWriter(folder, config, overwrite=True)

    def put(name: str, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, np.float32)
        writer.add(name, to_bf16(values) if dtype == "bfloat16" else values, "BF16" if dtype == "bfloat16" else "F32")

    def noise(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(scale / shape[-1] ** 0.5)

    def outward(rows: int) -> np.ndarray:
        """[d, rows] that writes into the free dimensions only."""
        out = np.zeros((d, rows), np.float32)
        out[free] = noise(d - free.start, rows)
        return out

    embed, token = np.zeros((vocabulary, d), np.float32), np.arange(vocabulary)
    embed[token, token] = embed[token, vocabulary + class_V] = 4.0
    embed[:, free] = noise(vocabulary, d - free.start)
    put("model.embed_tokens.weight", embed)
    for i in range(layers):
        at, ones = f"model.layers.{i}", np.ones(d, np.float32)
        put(f"{at}.input_layernorm.weight", ones)
        for part, rows in (("q", heads), ("k", heads // 2), ("v", heads // 2)):
            put(f"{at}.self_attn.{part}_proj.weight", noise(rows * head_dim, d))
        put(f"{at}.self_attn.o_proj.weight", outward(heads * head_dim))
        put(f"{at}.post_attention_layernorm.weight", ones)
        router = np.zeros((truth.num_experts, d), np.float32)
        for slot in range(k):  # the earlier slots a little heavier, every chosen expert far above the others
            router[truth.experts_VLK[:, i, slot], vocabulary + class_V] = 2.0 - 0.1 * slot
        put(f"{at}.block_sparse_moe.gate.weight", router)
        for e in range(truth.num_experts):
            expert = f"{at}.block_sparse_moe.experts.{e}"
            put(f"{expert}.w1.weight", noise(f, d))
            put(f"{expert}.w3.weight", noise(f, d))
            put(f"{expert}.w2.weight", outward(f))
    put("model.norm.weight", np.ones(d, np.float32))
    head = np.zeros((vocabulary, d), np.float32)
    head[truth.next_V, token] = 4.0
    head[:, free] = noise(vocabulary, d - free.start, scale=0.5)
    put("lm_head.weight", head)
    writer.finish()
    _write_tokenizer(folder, truth)


def _write_tokenizer(folder: Path, truth: Truth) -> None:
    """Words such as 'b3' (token 3 of domain b), so that the model can also be driven by text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    first = {int(g): int(np.argmax(truth.group_V == g)) for g in np.unique(truth.group_V)}
    words = {f"{chr(97 + int(g))}{i - first[int(g)]}": i for i, g in enumerate(truth.group_V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def as_trace(
    experts_LTK: np.ndarray, num_experts: int, *, tokens: Sequence[int] | None = None, prefill: int = 0, model: str = CONSTRUCTED
) -> Trace:
    """One sequence as a core Trace: the first `prefill` tokens are one step, each later one its own; weights are equal."""
    layers, length, k = experts_LTK.shape
    position = np.arange(length, dtype=np.int32)
    return Trace(
        tokens_T=np.zeros(length, np.int32) if tokens is None else np.asarray(tokens, np.int32),
        sequences_T=np.zeros(length, np.int32),
        positions_T=position,
        steps_T=np.maximum(position - max(prefill - 1, 0), 0).astype(np.int32),
        prefill_T=(position < prefill).astype(np.uint8),
        experts_LTK=experts_LTK.astype(np.int16),
        weights_LTK=np.full((layers, length, k), 1 / k, np.float16),
        num_experts=(num_experts,) * layers,
        model=model,
    )


def sticky_trace(
    *, layers: int = 4, experts: int = 16, top_k: int = 2, tokens: int = 512, repeat: float = 0.8, prefill: int = 0, seed: int = 0
) -> PlantedTrace:
    """Per layer, a token keeps the whole set of the token before with probability `repeat`, else draws a fresh one evenly.

    With top_k slots per layer LRU hits with probability repeat + (1 - repeat) * top_k / experts.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((layers, tokens, top_k), np.int64)
    for layer in range(layers):
        for t in range(tokens):
            kept = t > 0 and rng.random() < repeat
            out[layer, t] = out[layer, t - 1] if kept else rng.choice(experts, top_k, replace=False)
    return PlantedTrace(as_trace(out, experts, prefill=prefill), np.full(experts, 1 / experts), repeat)


def cyclic_trace(*, layers: int = 2, experts: int = 8, top_k: int = 1, tokens: int = 512, prefill: int = 0) -> PlantedTrace:
    """Experts in turn, 0 to E - 1 around. LRU with fewer than E slots per layer never hits; Belady with C slots (top_k 1) tends to (C - 1) / (E - 1)."""
    assert top_k <= experts
    one = (np.arange(tokens)[:, None] * top_k + np.arange(top_k)) % experts
    return PlantedTrace(as_trace(np.broadcast_to(one, (layers, tokens, top_k)).copy(), experts, prefill=prefill))


def zipf_trace(
    *,
    layers: int = 2,
    experts: int = 16,
    top_k: int = 1,
    tokens: int = 2048,
    exponent: float = 1.0,
    prefill: int = 0,
    seed: int = 0,
) -> PlantedTrace:
    """Independent draws, expert of rank r with probability proportional to r ** -exponent (without repetition within a token).

    The experts' ranks differ between layers; expert ids of rank r are `trace.info["order"][layer][r]`. With top_k 1 the best that
    C slots can hold without knowing the future hits with the sum of the C largest entries of probability_E, which is by rank.
    """
    rng = np.random.default_rng(seed)
    probability = np.arange(1, experts + 1, dtype=float) ** -exponent
    probability /= probability.sum()
    order = np.stack([rng.permutation(experts) for _ in range(layers)])
    # Gumbel top-k: the largest of log p + noise are draws without replacement.
    scores = np.log(probability) + rng.gumbel(size=(layers, tokens, experts))
    ranks = np.argsort(-scores, axis=-1)[..., :top_k]
    trace = as_trace(np.take_along_axis(order[:, None, :], ranks, axis=-1), experts, prefill=prefill)
    trace.info["order"] = order.tolist()
    return PlantedTrace(trace, probability)


def permuted_trace(
    *, layers: int = 4, experts: int = 16, top_k: int = 2, tokens: int = 512, prefill: int = 0, seed: int = 0
) -> PlantedTrace:
    """Even draws at the first layer; each later layer's experts are a fixed permutation of the layer's before.

    Nothing repeats in time beyond chance, yet the next layer is certain: `trace.info["permutation"][layer][e]` follows e of `layer`.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((layers, tokens, top_k), np.int64)
    out[0] = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    permutation = [rng.permutation(experts) for _ in range(layers - 1)]
    for layer, table in enumerate(permutation):
        out[layer + 1] = table[out[layer]]
    trace = as_trace(out, experts, prefill=prefill)
    trace.info["permutation"] = [table.tolist() for table in permutation]
    return PlantedTrace(trace, np.full(experts, 1 / experts))
