"""Rotary frequencies as transformers computes them: default, linear, llama3 and YaRN (arXiv 2309.00071), from config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moestro.core.errors import UnsupportedModel
from moestro.models.families.settings import Settings
from moestro.models.native.decoder import Rope

KINDS = ("default", "linear", "llama3", "yarn")


def parameters(settings: Settings, theta: float = 10_000.0, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rotation's settings in one form, whichever way the file states them.

    theta, default: of the model's class, for what the file leaves out. Raises UnsupportedModel for kinds other than KINDS.
    """
    data = dict(settings.data.get("rope_scaling") or settings.data.get("rope_parameters") or default or {})
    kind = data.get("rope_type") or data.get("type") or "default"
    if kind not in KINDS:
        raise UnsupportedModel(f"rotary embedding of kind {kind!r}", expected=", ".join(KINDS))
    if any(isinstance(value, dict) for value in data.values()):
        raise UnsupportedModel("rotary embeddings that differ between layers", expected="one for all layers")
    data["rope_type"] = kind
    if data.get("rope_theta") is None:
        data["rope_theta"] = settings.number("rope_theta", theta)
    if kind in ("llama3", "yarn"):
        longest = settings.value("max_position_embeddings")
        own = settings.value("original_max_position_embeddings", default=data.get("original_max_position_embeddings"))
        data["original_max_position_embeddings"] = longest if own is None else own
        if kind == "yarn" and data.get("factor") is None:
            data["factor"] = longest / data["original_max_position_embeddings"]
    if "partial_rotary_factor" in settings.data:
        data.setdefault("partial_rotary_factor", settings.data["partial_rotary_factor"])
    return data


def rope(data: Mapping[str, Any], width: int, *, partial: float | None = None, interleaved: bool = False) -> Rope:
    """The rotation of heads of `width` dimensions.

    data: from `parameters`. partial: the share of the dimensions that turn where the file does not say; None for classes that
    turn all of them. Raises UnsupportedModel for a share where the class knows none.
    """
    share = data.get("partial_rotary_factor")
    if partial is None and share not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor is {share}", expected="none in this model")
    turned = int(width * ((share if share is not None else partial) if partial is not None else 1.0))
    if turned < 2 or turned % 2:
        raise UnsupportedModel(f"{turned} of {width} dimensions turn", expected="an even number")
    base, kind, scale = float(data["rope_theta"]), data["rope_type"], 1.0
    period_R = base ** (np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned))
    frequency_R = np.float32(1) / period_R
    if kind == "linear":
        frequency_R = frequency_R / np.float32(data["factor"])
    elif kind == "llama3":
        frequency_R = _llama3(frequency_R, data)
    elif kind == "yarn":
        frequency_R, scale = _yarn(period_R, data, base, turned), _yarn_scale(data)
    return Rope(np.ascontiguousarray(frequency_R, np.float32), scale, interleaved)


def magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's growth of the scores with the factor by which the context is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def score_scale(data: Mapping[str, Any]) -> float:
    """What DeepSeek multiplies the attention's scale by: the square of `magnitude` with mscale_all_dim."""
    weight = data.get("mscale_all_dim")
    return magnitude(data["factor"], weight) ** 2 if data["rope_type"] != "default" and weight else 1.0


def _llama3(frequency_R: np.ndarray, data: Mapping[str, Any]) -> np.ndarray:
    low, high, before = (data[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    wave_R = np.float32(2 * math.pi) / frequency_R
    slow_R = np.where(wave_R > before / low, frequency_R / np.float32(data["factor"]), frequency_R)
    smooth_R = (before / wave_R - low) / (high - low)
    between = (wave_R >= before / high) & (wave_R <= before / low)
    return np.where(between, (1 - smooth_R) * slow_R / data["factor"] + smooth_R * slow_R, slow_R)


def _yarn_scale(data: Mapping[str, Any]) -> float:
    if data.get("attention_factor") is not None:
        return float(data["attention_factor"])
    some, every = data.get("mscale"), data.get("mscale_all_dim")
    if some and every:
        return magnitude(data["factor"], some) / magnitude(data["factor"], every)
    return magnitude(data["factor"])


def _yarn(period_R: np.ndarray, data: Mapping[str, Any], base: float, turned: int) -> np.ndarray:
    def place(rotations: float) -> float:
        """The dimension that turns this often within the original context."""
        within = data["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return turned * math.log(within) / (2 * math.log(base))

    low, high = place(data.get("beta_fast") or 32), place(data.get("beta_slow") or 1)
    if data.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high += 0.001 if low == high else 0
    ramp_R = np.clip((np.arange(turned // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept_R = 1 - ramp_R
    return (1 - kept_R) / (np.float32(data["factor"]) * period_R) + kept_R / period_R
