"""A live transformers module whose experts hold no memory: the trunk, with a hook where the experts are.

The class is built with every matrix on torch's meta device, so that building costs nothing, and the trunk's tensors are
then read one by one from the checkpoint into their parameters. Expert calls go to a function of the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.core.layer import LayerFacts
from moestro.models.checkpoint import Checkpoint, TensorRef, check_finite
from moestro.models.codecs.coded import is_coded, read_coded
from moestro.models.families import settings_of
from moestro.models.layout import Layout

if TYPE_CHECKING:
    import torch

ExpertsFn = Callable[[int, "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
HOOK = "moestro"  # the name of our entry in transformers' registry of experts implementations
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Seam:
    """Where one MoE layer is cut: `block` is the module that routes, `experts` the one it calls, both inside `decoder`."""

    facts: LayerFacts
    decoder: Any
    block: Any
    experts: Any

    @property
    def router(self) -> Any:
        """The module that makes the router's logits, or None when the block has none under a usual name."""
        return getattr(self.block, "gate", None) or getattr(self.block, "router", None)

    def connect(self, fn: Callable[[Any, Any, Any], Any]) -> None:
        """Send the experts' calls (hidden_TD, top_k_index_TK, top_k_weights_TK) to `fn`."""
        self.experts.moestro_fn = fn


def build_trunk(checkpoint: Checkpoint, layout: Layout, dtype: str, experts_fn: ExpertsFn) -> Any:
    """A transformers module in evaluation mode that computes the model with `experts_fn` in the place of its experts.

    dtype: 'auto' (the checkpoint's), 'float32', 'bfloat16' or 'float16'. experts_fn(ordinal, hidden_TD, top_k_index_TK,
    top_k_weights_TK) -> y_TD is the weighted sum of the routed experts' outputs; with `spec.weigh_input` the weight
    multiplies the expert's input instead. Peak memory: the trunk and one of its tensors.

    Raises:
        CheckpointError: a weight is missing, left over, of another shape, or not a number.
        UnsupportedModel: the class cannot be built in this transformers version.
    """
    module = skeleton(checkpoint, layout.facts.dtype if dtype == "auto" else dtype)
    for seam in seams(module, layout):
        seam.connect(_bind(experts_fn, seam.facts.ordinal))
    load_trunk(module, checkpoint, layout)
    return module


def _bind(experts_fn: ExpertsFn, ordinal: int) -> Callable[[Any, Any, Any], Any]:
    return lambda hidden, index, weights: experts_fn(ordinal, hidden, index, weights)


def skeleton(checkpoint: Checkpoint, dtype: str) -> Any:
    """The transformers module in `dtype`, its matrices on the meta device, its computed buffers real. Nothing is read."""
    import torch
    from transformers import initialization

    cls, config = model_class(checkpoint)
    with torch.no_grad(), initialization.no_init_weights(), _matrices_on_meta():
        module = cls._from_config(config, dtype=getattr(torch, dtype))
    lost = {name for name, buffer in module.named_buffers() if buffer.device.type == "meta"} - set(module.state_dict())
    if lost:
        raise UnsupportedModel(f"{cls.__name__} computes {sorted(lost)[0]} when it is built, in a way moestro cannot follow")
    _register_hook()
    return module.eval()


def model_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The transformers class for causal language modelling and its configuration. Raises UnsupportedModel."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    data = {k: v for k, v in settings_of(checkpoint).data.items() if k not in ("quantization_config", "auto_map")}
    model_type = data.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        if checkpoint.config.get("auto_map"):
            raise UnsupportedModel(
                f"the model_type {model_type!r} needs remote code (auto_map), which moestro does not run",
                expected="a model that transformers knows",
                fix="look for a version of this model without remote code",
            )
        raise UnsupportedModel(
            f"transformers does not know the model_type {model_type!r}",
            expected="a Mixture-of-Experts model that transformers knows",
            fix="pip install --upgrade transformers",
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(data)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers cannot use {checkpoint.path / 'config.json'}: {error}", fix="download it again"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"transformers has no causal language model for {model_type!r}", expected="a text model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config


@contextmanager
def _matrices_on_meta() -> Iterator[None]:
    """Within, torch.empty, zeros, ones, randn and full make tensors of two or more dimensions on the meta device."""
    import torch
    from torch.overrides import TorchFunctionMode

    makers = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func in makers:
                size = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list | torch.Size) else args)
                if len(size) >= 2:
                    kwargs["device"] = "meta"
            return func(*args, **kwargs)

    with Mode():
        yield


def _register_hook() -> None:
    """Put one entry into transformers' registry; it passes each call on to the function tied to that experts module."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if HOOK not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(HOOK, lambda experts, *args: experts.moestro_fn(*args))


def seams(module: Any, layout: Layout) -> tuple[Seam, ...]:
    """The seams of a module built by `skeleton`, one per MoE layer in order, with the hook in place."""
    found: dict[int, Seam] = {}
    by_index = {facts.index: facts for facts in layout.facts.layers}
    for name, experts in module.named_modules():
        at = _LAYER.search(name)
        if name.rpartition(".")[2] != "experts" or not at or int(at[1]) not in by_index:
            continue
        block = module.get_submodule(name.rpartition(".")[0])
        decoder = module.get_submodule(name[: at.end() - 1])
        found[int(at[1])] = Seam(by_index[int(at[1])], decoder, block, experts)
    if missing := sorted(set(by_index) - set(found)):
        raise UnsupportedModel(f"{type(module).__name__} has no experts in its decoder layer {missing[0]}")
    for seam in found.values():
        if has_hook(seam.experts):
            module.set_experts_implementation(HOOK)
        elif seam.facts.spec.weigh_input:
            _route_densely_scored(seam)
        else:
            raise UnsupportedModel(
                f"{type(seam.experts).__name__} does not let its experts be replaced",
                expected="an experts class with transformers' use_experts_implementation",
            )
    return tuple(found[index] for index in sorted(found))


def has_hook(experts: Any) -> bool:
    """Whether an experts module was made by a class that carries transformers' experts decorator."""
    return hasattr(experts, "_is_expert_parallel") and hasattr(type(experts), "_apply_gate")


def _route_densely_scored(seam: Seam) -> None:
    """Give a block that weighs every expert's input (Llama 4) a forward that calls the seam with ids and weights."""
    import torch

    block, experts, top_k = seam.block, seam.experts, seam.facts.top_k

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TD = hidden_states.reshape(-1, seam.facts.spec.d_model)
        scores_TE, logits_TE = block.router(x_TD)
        # Scores outside the router's own top k are sigmoid(-inf) = 0; a chosen one that underflows to 0 adds nothing either.
        weights_TK, index_TK = torch.topk(scores_TE, top_k, dim=1)
        routed = experts.moestro_fn(x_TD, index_TK, weights_TK)
        return block.shared_expert(x_TD) + routed, logits_TE

    block.forward = forward


def load_trunk(module: Any, checkpoint: Checkpoint, layout: Layout) -> None:
    """Read every trunk tensor into its parameter or buffer, tie weights, and check that nothing is missing or left over."""
    import torch

    rename = renamer(module)
    inside = tuple(f"{name}." for name, m in module.named_modules() if name.rpartition(".")[2] == "experts")
    state = {k: v for k, v in module.state_dict(keep_vars=True).items() if not k.startswith(inside)}
    loaded: dict[str, str] = {}
    for name in layout.trunk:
        ref, key = checkpoint.tensors[name], rename(name)
        if key not in state or key in loaded:
            raise CheckpointError(
                f"{name} has no place in {type(module).__name__}"
                if key not in state
                else f"{name} and {loaded[key]} are one weight",
                expected="the tensors of this model and no others",
                fix="use the config.json and the weights of one revision",
            )
        if tuple(state[key].shape) != ref.shape:
            raise CheckpointError(
                f"{name} has shape {list(ref.shape)}",
                expected=str(list(state[key].shape)),
                fix="use the config.json that belongs to the weights",
            )
        tensor = read_tensor(checkpoint, ref).to(dtype_of(module, key, state[key]))
        owner, _, leaf = key.rpartition(".")
        parent = module.get_submodule(owner)
        if leaf in parent._parameters:
            parent._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=state[key].requires_grad)
        else:
            parent._buffers[leaf] = tensor
        loaded[key] = name
    missing = _tie(module, set(state) - set(loaded))
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} weights that {type(module).__name__} needs, such as {sorted(missing)[0]}",
            expected="the whole model",
            fix="download the checkpoint again",
        )


def _tie(module: Any, missing: set[str]) -> set[str]:
    """Tie the weights that the configuration ties; returns the names that stay without a value."""
    import torch

    for target, source in dict(module.all_tied_weights_keys).items():
        if source in missing and target not in missing:
            source, target = target, source
        elif target not in missing and not torch.equal(module.get_parameter(target), module.get_parameter(source)):
            continue  # the checkpoint has both and they differ: transformers keeps them apart
        owner, _, leaf = target.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = module.get_parameter(source)
        missing.discard(target)
    return missing


def renamer(module: Any) -> Callable[[str], str]:
    """From a name on disk to the name in memory, by transformers' own conversion rules for this class."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    state = module.state_dict()
    prefix = module.base_model_prefix

    def rename(name: str) -> str:
        name = re.sub(r"^language_model\.", "", name)  # a text model inside a multimodal checkpoint
        key, converted = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state:
            key, converted = rename_source_key(name, [], [], prefix, state)
        if converted is not None:
            raise UnsupportedModel(f"transformers rewrites {name} when it loads it, which moestro does not do")
        return key

    return rename


def dtype_of(module: Any, key: str, made: Any) -> Any:
    """The dtype a weight has in a module loaded by transformers: as made, unless the class keeps it in float32."""
    import torch

    plan = module._get_dtype_plan(module.config.dtype)
    return torch.float32 if any(re.search(pattern.replace("*", ".*"), key) for pattern in plan) else made.dtype


def read_tensor(checkpoint: Checkpoint, ref: TensorRef) -> Any:
    """One tensor from disk, in its own dtype. Raises CheckpointError when it holds a NaN or an infinity."""
    import torch

    if is_coded(ref.dtype):
        return torch.from_numpy(read_coded(checkpoint, ref.name).dequantise())
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if ref.dtype not in dtypes:
        raise UnsupportedModel(
            f"{ref.name} has dtype {ref.dtype}", expected="F32, F16 or BF16", fix="use the unquantised checkpoint"
        )
    tensor = torch.empty(ref.shape, dtype=dtypes[ref.dtype])
    if tensor.numel():
        checkpoint.read_into(ref.name, tensor.view(-1).view(torch.uint8).numpy())
    check_finite(_bits(tensor), ref.name)
    return tensor


def _bits(tensor: Any) -> np.ndarray:
    """The tensor as numpy, BF16 as uint16."""
    import torch

    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
