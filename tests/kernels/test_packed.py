"""Packed weights: layouts against their definitions, products against numpy bit for bit, and the error of int8 activations."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.kernels.packed import FORMATS, pack, part_sizes, quantise
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4

CASES = [(format, group) for format in FORMATS for group in ((32,) if format == "mxfp4" else (32, 64, 128))]


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)


@pytest.mark.parametrize(("format", "group"), CASES)
def test_codes_mean_what_the_formats_say(level, format, group):
    rng = np.random.default_rng(1)
    w = weights(rng, 37, 3 * 128)
    packed = quantise(w, format, group)
    assert [p.nbytes for p in packed.parts] == list(part_sizes(37, 3 * 128, format, group))
    assert packed.nbytes == sum(p.nbytes for p in packed.parts) and packed.shape == (37, 384)
    error = np.sqrt(((packed.dequantise() - w) ** 2).mean() / (w**2).mean())
    bound = {"int8": 0.007, "int4": 0.11, "int3": 0.2, "int2": 0.36, "mxfp4": 0.12, "nested": 0.14}[format]
    assert error < bound
    if format in ("int8", "int4", "mxfp4"):
        encode = {"int8": encode_int8, "int4": encode_int4}.get(format)
        same = encode_mxfp4(w) if encode is None else encode(w, group, scale_dtype="float16")
        assert (pack(same).dequantise() == same.dequantise()).all()
        assert (packed.dequantise() == same.dequantise()).all()
