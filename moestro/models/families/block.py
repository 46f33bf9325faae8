"""From a family's statement about its blocks (`Block`) and the tensors' names to a `Layout`, every shape checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import LayerFacts, ModelFacts, RouterFacts
from moestro.models.checkpoint import Checkpoint, TensorRef
from moestro.models.codecs.coded import METHOD, is_coded
from moestro.models.families.settings import Settings
from moestro.models.layout import Layout, Part

DTYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LEAVES: Mapping[str, str] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down", "input_linear": "gate_up", "output_linear": "down",
}  # fmt: skip
SUFFIXES: Mapping[str, str] = {"": "", "_bias": "_bias", "_blocks": "", "_scales": "_scales"}
ORDER = ("gate", "up", "gate_up", "gate_scales", "up_scales", "gate_up_scales", "gate_bias", "up_bias", "gate_up_bias",
         "down", "down_scales", "down_bias")  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ONE = re.compile(r"(?:^|\.)experts\.(?P<e>\d+)\.(?P<leaf>\w+)\.(?P<kind>weight|bias)$")
_FUSED = re.compile(r"(?:^|\.)experts\.(?P<leaf>[a-z_]+?_proj|w[123])(?P<suffix>_bias|_blocks|_scales)?$")
_LINEAR = re.compile(r"\.block_sparse_moe\.(?P<leaf>input_linear|output_linear)\.weight$")
_EXPERT = re.compile(r"(?:^|\.)experts\.|\.block_sparse_moe\.(?:input|output)_linear\.")
_STALE = re.compile(r"rotary_emb\.inv_freq$")  # written by old versions, recomputed by all


@dataclass(frozen=True, slots=True)
class Block:
    """What a family file says of its MoE blocks and attention.

    layers: the decoder layers that hold experts. tied: the output layer shares the embedding. transposed, interleaved: how
    fused expert tensors are stored ([in, out]; gate and up in alternating rows). kv_values: numbers cached per token.
    state_values: numbers kept per sequence whatever its length. window, windowed_values: how many tokens sliding-window
    layers keep, and their share of kv_values. ignored: patterns of tensors that the model does not load.
    """

    experts: int
    top_k: int
    spec: ExpertSpec
    router: RouterFacts
    layers: tuple[int, ...]
    kv_values: int
    shared: int = 0
    tied: bool = False
    transposed: bool = False
    interleaved: bool = False
    state_values: int = 0
    window: int = 0
    windowed_values: int = 0
    ignored: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the experts of one layer lie: `fused[role]` has all of them along dimension 0, `single[e][role]` one each."""

    fused: dict[str, TensorRef]
    single: dict[int, dict[str, TensorRef]]

    def parts(self, e: int, block: Block) -> tuple[Part, ...]:
        if not self.fused:
            return tuple(Part.of(self.single[e][role], role) for role in ORDER if role in self.single[e])
        out = []
        for role in ORDER:
            if role in self.fused:
                ref = self.fused[role]
                matrix = role in ("gate", "up", "gate_up", "down") and ref.dtype != "U8"
                mixed = block.interleaved and role.startswith("gate_up")
                out.append(Part.of(ref, role, slab=e, transposed=block.transposed and matrix, interleaved=mixed))
        return tuple(out)


def layout(checkpoint: Checkpoint, settings: Settings, block: Block) -> Layout:
    """Find every expert of `block` among the checkpoint's tensors.

    Raises:
        CheckpointError: experts are missing or have other shapes than the configuration says.
        UnsupportedModel: experts are stored in a form that moestro does not read.
    """
    depth = settings.integer("num_hidden_layers")
    _refuse_quantised(settings)
    _check_counts(settings, block)
    places, trunk, ignored = _sort(checkpoint, depth, block)
    if wrong := sorted(set(places) ^ set(block.layers)):
        raise CheckpointError(
            f"{settings.where} says that the decoder layers {list(block.layers)} have experts, the tensors say {sorted(places)}",
            expected=f"agreement on layer {wrong[0]}",
            fix="use the config.json and the weights of one revision",
        )
    layers, total = [], 0
    for ordinal, index in enumerate(block.layers):
        _check(places[index], index, block)
        whole = sum(part.nbytes for e in range(block.experts) for part in places[index].parts(e, block))
        size = whole // block.experts  # the mean, where experts differ in bits
        total += whole
        layers.append(LayerFacts(ordinal, index, block.experts, block.top_k, block.spec, block.router, block.shared, size))
    tied = block.tied and not any(name.endswith("lm_head.weight") for name in trunk)
    if not block.tied and not any(name.endswith("lm_head.weight") for name in trunk):
        raise CheckpointError(
            f"{checkpoint.path} has no lm_head.weight",
            expected="an output layer, or tie_word_embeddings",
            fix="download it again",
        )
    extra = {"state_values": block.state_values, "window": block.window, "windowed_values": block.windowed_values}
    facts = ModelFacts(
        family=settings.model_type,
        dtype=_dtype(settings, [checkpoint.tensors[name] for name in trunk]),
        vocabulary=settings.integer("vocab_size"),
        d_model=block.spec.d_model,
        decoder_layers=depth,
        context=settings.integer("max_position_embeddings", default=0),
        layers=tuple(layers),
        trunk_bytes=sum(checkpoint.tensors[name].nbytes for name in trunk),
        expert_bytes=total,
        kv_values_per_token=block.kv_values,
        fingerprint=checkpoint.fingerprint,
        tied_embeddings=tied,
        extra={k: v for k, v in extra.items() if v} | dict(block.extra),
    )
    by_ordinal = [places[index] for index in block.layers]

    def locate(key: ExpertKey) -> tuple[Part, ...]:
        assert 0 <= key.expert < block.experts, key
        return by_ordinal[key.layer].parts(key.expert, block)

    return Layout(facts, tuple(trunk), tuple(ignored), locate)


def _sort(checkpoint: Checkpoint, depth: int, block: Block) -> tuple[dict[int, Places], list[str], list[str]]:
    """Experts by decoder layer, the trunk's names, and the names that the model does not load."""
    skipped = [re.compile(pattern) for pattern in block.ignored]
    places: dict[int, Places] = {}
    trunk: list[str] = []
    ignored: list[str] = []
    for name, ref in checkpoint.tensors.items():
        at = _LAYER.search(name)
        if _STALE.search(name) or any(s.search(name) for s in skipped) or (at and int(at[1]) >= depth):
            ignored.append(name)
        elif not at or not _EXPERT.search(name):
            trunk.append(name)
        else:
            place = places.setdefault(int(at[1]), Places({}, {}))
            if (one := _ONE.search(name)) and one["leaf"] in LEAVES:
                role = LEAVES[one["leaf"]] + ("_bias" if one["kind"] == "bias" else "")
                place.single.setdefault(int(one["e"]), {})[role] = ref
            elif (fused := _FUSED.search(name) or _LINEAR.search(name)) and fused["leaf"] in LEAVES:
                place.fused[LEAVES[fused["leaf"]] + SUFFIXES[fused.groupdict().get("suffix") or ""]] = ref
            else:
                raise UnsupportedModel(
                    f"{name} is an expert tensor of a kind that moestro does not read",
                    expected="gate, up and down projections per expert or fused, as 16 or 32 bit floats or MXFP4",
                    fix="use the unquantised checkpoint",
                )
    return places, trunk, ignored


def _check_counts(settings: Settings, block: Block) -> None:
    if not 1 <= block.top_k <= block.experts:
        raise CheckpointError(
            f"{settings.where} says {block.experts} experts of which {block.top_k} are used per token",
            expected="at least one, and no more than there are",
            fix="use the config.json that belongs to the weights",
        )
    if not block.layers:
        raise UnsupportedModel(f"no layer of this {settings.model_type} has experts", expected="a Mixture-of-Experts model")


def _check(place: Places, index: int, block: Block) -> None:
    """Every expert of a layer is there, whole, in one form, with the shapes of the specification."""
    spec, count = block.spec, block.experts
    groups = [place.fused] if place.fused else [place.single.get(e, {}) for e in range(count)]
    if place.fused and place.single:
        raise CheckpointError(f"layer {index} has its experts twice: fused and one by one", expected="one form")
    if extra := sorted(set(place.single) - set(range(count))):
        raise CheckpointError(f"layer {index} has expert {extra[-1]}, the configuration says there are {count}")
    for e, group in enumerate(groups):
        what = f"the experts of layer {index}" if place.fused else f"expert {e} of layer {index}"
        wanted = {"gate_up", "down"} if "gate_up" in group else {"gate", "up", "down"} if spec.gated else {"up", "down"}
        if spec.bias:
            wanted |= {role + "_bias" for role in wanted}
        wanted |= {role + "_scales" for role in wanted if role in group and group[role].dtype == "U8"}
        if set(group) != wanted:
            gone, odd = sorted(wanted - set(group)), sorted(set(group) - wanted)
            raise CheckpointError(
                f"{what}: "
                + "; ".join(([f"no {', '.join(gone)}"] if gone else []) + ([f"unexpected {', '.join(odd)}"] if odd else [])),
                expected=", ".join(sorted(wanted)),
                fix="download the checkpoint again",
            )
        for role, ref in group.items():
            shape = ref.shape[1:] if place.fused else ref.shape
            right = _shape(role, block, coded=group[role.removesuffix("_scales")].dtype == "U8", fused=bool(place.fused))
            if shape != right or (place.fused and ref.shape[0] != count):
                raise CheckpointError(
                    f"{ref.name} has shape {list(ref.shape)}",
                    expected=str([count, *right] if place.fused else list(right)),
                    fix="use the config.json that belongs to the weights",
                )
            if (
                ref.dtype not in DTYPES
                and not is_coded(ref.dtype)
                and not (ref.dtype == "U8" and role.removesuffix("_scales") in group)
            ):
                raise UnsupportedModel(
                    f"{ref.name} has dtype {ref.dtype}", expected="F32, F16, BF16 or MXFP4", fix="use the unquantised checkpoint"
                )


def _shape(role: str, block: Block, *, coded: bool, fused: bool) -> tuple[int, ...]:
    """The shape of one expert's part as stored."""
    spec = block.spec
    kind = role.removesuffix("_bias").removesuffix("_scales")
    rows = {"gate": spec.d_expert, "up": spec.d_expert, "gate_up": 2 * spec.d_expert, "down": spec.d_model}[kind]
    columns = spec.d_expert if kind == "down" else spec.d_model
    if role.endswith("_bias"):
        return (rows,)
    if role.endswith("_scales"):
        return (rows, columns // 32)
    if coded:
        return (rows, columns // 32, 16)
    return (columns, rows) if block.transposed and fused else (rows, columns)


def _refuse_quantised(settings: Settings) -> None:
    method = (settings.data.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4", METHOD):
        raise UnsupportedModel(
            f"the checkpoint is quantised with {method!r}",
            expected="16 or 32 bit floats, MXFP4 experts, or moestro's own tiles",
            fix="use the unquantised checkpoint",
        )


def _dtype(settings: Settings, refs: list[TensorRef]) -> str:
    """The trunk's dtype: what the configuration says, else what most of its bytes are."""
    said = settings.data.get("dtype") or settings.data.get("torch_dtype")
    if said in DTYPES.values():
        return str(said)
    sizes = Counter[str]()
    for ref in refs:
        if ref.dtype in DTYPES:
            sizes[DTYPES[ref.dtype]] += ref.nbytes
    return sizes.most_common(1)[0][0] if sizes else "float32"
