"""Feed-forward of many experts on their routed rows in one call, from weights in any supported number format.

Law: each output row has the same bits whatever other rows and experts share the call and however many threads run it,
because every sum runs over its inputs in one fixed order. So streamed and resident experts agree exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.kernels import native
from moestro.kernels.convert import to_f32

if TYPE_CHECKING:
    from moestro.kernels.packed import Packed

FORMATS = ("f32", "f16", "bf16", "int8", "int4", "mxfp4", "uint4")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")
GROUPS = (32, 64, 128)
MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "uint16",
    "int8": "int8",
    "int4": "uint8",
    "mxfp4": "uint8",
    "uint4": "uint8",
}


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One weight matrix [rows, cols], output rows first. Rows may lie at any stride and any alignment; a row is contiguous.

    data: f32: float32; f16: float16; bf16: uint16 bit patterns; int8: int8; int4, uint4 and mxfp4: uint8 [rows, cols / 2], low nibble first.
    scales: int8 and int4: float32 or float16 [rows, cols / group]; mxfp4: uint8 exponents with bias 127 [rows, cols / 32];
    uint4: float16 [rows, cols / group, 2], a scale and a minimum.
    int4 is symmetric: (nibble - 8) * scale; uint4: nibble * scale + minimum; int8: value * scale.

    Raises:
        ValueError: parts that do not fit one another.
    """

    data: np.ndarray
    format: str
    scales: np.ndarray | None = None
    group: int = 0
    handle: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        data, scales = self.data, self.scales
        if _DTYPES.get(self.format) != data.dtype.name or data.ndim != 2 or not _contiguous_rows(data):
            raise ValueError(f"not a {self.format} matrix: {data.dtype} {data.shape}, strides {data.strides}")
        if self.format in ("f32", "f16", "bf16"):
            return
        kinds = {"mxfp4": ("uint8",), "uint4": ("float16",)}.get(self.format, ("float32", "float16"))
        if self.format == "mxfp4" and self.group == 0:
            object.__setattr__(self, "group", 32)
        if self.group not in ((32,) if self.format == "mxfp4" else GROUPS) or self.cols % self.group:
            raise ValueError(f"{self.format} in groups of {self.group} cannot hold rows of {self.cols}")
        shape = (self.rows, self.cols // self.group, *((2,) if self.format == "uint4" else ()))
        if scales is None or scales.dtype.name not in kinds or scales.shape != shape:
            found = None if scales is None else f"{scales.dtype} {scales.shape}"
            raise ValueError(f"{self.format} {self.shape} needs scales {list(shape)}, found {found}")
        if not _contiguous_rows(scales):
            raise ValueError("a row of scales must be contiguous")

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def cols(self) -> int:
        return int(self.data.shape[1]) * (2 if self.format in ("int4", "mxfp4", "uint4") else 1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantise(self) -> np.ndarray:
        """float32 [rows, cols]; for float32 a view."""
        if self.format in ("f32", "f16", "bf16"):
            return to_f32(self.data)
        assert self.scales is not None
        if self.format == "int8":
            values = self.data.astype(np.float32)
        else:
            nibbles = np.empty(self.shape, np.uint8)
            nibbles[:, 0::2], nibbles[:, 1::2] = self.data & 15, self.data >> 4
            values = MXFP4_VALUES[nibbles] if self.format == "mxfp4" else nibbles.astype(np.float32)
            if self.format == "int4":
                values -= 8
        if self.format == "mxfp4":
            bits = self.scales.astype(np.uint32) << 23  # the exponent field of a float; its lowest value would be subnormal
            bits[self.scales == 0] = 0x00400000
            bits[self.scales == 255] = 0x7FC00000  # not-a-number in the MX standard
            scales = bits.view(np.float32)
        else:
            scales = self.scales if self.scales.ndim == 2 else self.scales[..., 0]
        grouped = values.reshape(self.rows, self.cols // self.group, self.group)
        with np.errstate(over="ignore"):  # the largest scales reach infinity, as in native code
            grouped *= scales.astype(np.float32)[:, :, None]
            if self.format == "uint4":
                grouped += self.scales[..., 1:].astype(np.float32)
        return values

    def reference(self) -> Callable[[np.ndarray], np.ndarray]:
        """The product with one row of activations, float32 [cols] -> [rows], in numpy."""
        matrix_RC = self.dequantise()
        return lambda x_C: matrix_RC @ x_C

    def pack(self) -> tuple[int, ...]:
        """Addresses and strides, as the native code wants them."""
        scales = self.scales
        place = (0, 0, 0) if scales is None else (scales.ctypes.data, scales.strides[0], int(scales.dtype == np.float16))
        return (FORMATS.index(self.format), self.data.ctypes.data, self.data.strides[0], *self.shape, *place, self.group)

    def bind(self, module: Any) -> Any:
        """The native code's view of this matrix, made at the first use and kept as `handle`."""
        object.__setattr__(self, "handle", module.Matrix(self.pack()))
        return self.handle


@dataclass(frozen=True, slots=True, eq=False)
class ExpertView:
    """One expert ready to run: gate [F, D] or None, up [F, D], down [D, F], and float32 biases [F], [F], [D] or None.

    Its matrices are all of the kind `Matrix` or all `Packed` (whose formats may differ).
    It keeps its arrays alive; what they hold may change between calls. handle: packed pointers for the native code.

    Raises:
        ValueError: shapes that do not fit one another.
    """

    gate: Matrix | Packed | None
    up: Matrix | Packed
    down: Matrix | Packed
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    handle: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        width, inner = self.up.cols, self.up.rows
        if self.down.shape != (width, inner) or (self.gate is not None and self.gate.shape != (inner, width)):
            gate = None if self.gate is None else self.gate.shape
            raise ValueError(f"an expert's matrices do not fit: gate {gate}, up {self.up.shape}, down {self.down.shape}")
        kinds = {type(matrix).__name__ for matrix in (self.gate, self.up, self.down) if matrix is not None}
        if len(kinds) > 1:
            raise ValueError("an expert's matrices are all in rows or all packed in tiles, not both")
        addresses = []
        for name, length in (("gate_bias", inner), ("up_bias", inner), ("down_bias", width)):
            bias = getattr(self, name)
            if bias is not None:
                if bias.shape != (length,):
                    raise ValueError(f"{name} has shape {bias.shape}, expected ({length},)")
                bias = np.ascontiguousarray(bias, np.float32)
                object.__setattr__(self, name, bias)
            addresses.append(0 if bias is None else bias.ctypes.data)
        module = native.extension()
        if module is not None:
            gate = None if self.gate is None else self.gate.pack()
            object.__setattr__(self, "handle", module.Expert(gate, self.up.pack(), self.down.pack(), *addresses))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        arrays = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return sum(a.nbytes for a in arrays if a is not None)


def grouped_ffn(
    x_TD: np.ndarray,
    rows_N: np.ndarray,
    starts_G1: np.ndarray,
    experts: Sequence[ExpertView],
    *,
    activation: str,
    limit: float = 0.0,
    alpha: float = 1.0,
    out_ND: np.ndarray,
    threads: int = 0,
    input_weight_N: np.ndarray | None = None,
) -> None:
    """out_ND[n] = expert g of x_TD[rows_N[n]] for starts_G1[g] <= n < starts_G1[g + 1].

    x_TD, out_ND: float32, rows at any stride. rows_N, starts_G1: int64, contiguous. experts: G of one shape, all of Matrix or all of Packed, which round the
    input and what goes into the down projection to int8 (see kernels.packed). input_weight_N multiplies the input row
    (Llama 4). limit, alpha: of 'swiglu_clamped'. threads: 0 takes all cores. The interpreter lock is released.

    Raises:
        ValueError: an unknown activation, 'swiglu_clamped' without a gate, packed experts beside others, or arrays that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    for expert in experts:
        if expert.gate is None and activation == "swiglu_clamped":
            raise ValueError("swiglu_clamped needs a gate")
        if type(expert.up) is not type(experts[0].up):
            raise ValueError("packed experts and experts in rows cannot share a call")
    module = native.extension()
    if module is None:
        reference_grouped_ffn(
            x_TD, rows_N, starts_G1, experts, activation=activation, limit=limit, alpha=alpha, out_ND=out_ND,
            input_weight_N=input_weight_N,
        )  # fmt: skip
        return
    handles, kind = [expert.handle for expert in experts], ACTIVATIONS.index(activation)
    module.grouped_ffn(x_TD, rows_N, starts_G1, handles, kind, limit, alpha, out_ND, input_weight_N, threads or native.cores())


@np.errstate(over="ignore", invalid="ignore")  # infinities and not-a-number pass through in silence, as in native code
def reference_grouped_ffn(
    x_TD: np.ndarray,
    rows_N: np.ndarray,
    starts_G1: np.ndarray,
    experts: Sequence[ExpertView],
    *,
    activation: str,
    limit: float = 0.0,
    alpha: float = 1.0,
    out_ND: np.ndarray,
    input_weight_N: np.ndarray | None = None,
) -> None:
    """`grouped_ffn` in numpy: row by row, for a matrix product's bits depend on how many rows it has."""
    pairs = len(rows_N)
    if len(starts_G1) != len(experts) + 1 or starts_G1[0] or starts_G1[-1] != pairs or (np.diff(starts_G1) < 0).any():
        raise ValueError(f"starts {starts_G1} do not divide {pairs} rows among {len(experts)} experts")
    if out_ND.shape != (pairs, x_TD.shape[1]) or (pairs and not 0 <= rows_N.min() <= rows_N.max() < len(x_TD)):
        raise ValueError(f"rows or out {out_ND.shape} do not fit x {x_TD.shape}")
    if experts and experts[0].up.cols != x_TD.shape[1]:
        raise ValueError(f"the experts take rows of {experts[0].up.cols}, the input has {x_TD.shape[1]}")
    for g, expert in enumerate(experts):
        if starts_G1[g] == starts_G1[g + 1]:
            continue
        gate = None if expert.gate is None else expert.gate.reference()
        up, down = expert.up.reference(), expert.down.reference()
        for n in range(int(starts_G1[g]), int(starts_G1[g + 1])):
            x = np.ascontiguousarray(x_TD[rows_N[n]])
            if input_weight_N is not None:
                x = x * input_weight_N[n]
            u = up(x)
            if expert.up_bias is not None:
                u = u + expert.up_bias
            v = None if gate is None else gate(x)
            if v is not None and expert.gate_bias is not None:
                v = v + expert.gate_bias
            y = down(activate(v, u, activation, limit, alpha))
            out_ND[n] = y if expert.down_bias is None else y + expert.down_bias


@np.errstate(over="ignore", invalid="ignore")
def activate(gate: np.ndarray | None, up: np.ndarray, activation: str, limit: float, alpha: float) -> np.ndarray:
    """What goes into the down projection: act(gate) * up, or act(up) without a gate. float32."""
    if activation == "swiglu_clamped":
        assert gate is not None
        g = np.minimum(gate, np.float32(limit))
        return (np.clip(up, -np.float32(limit), np.float32(limit)) + np.float32(1)) * (g * _sigmoid(np.float32(alpha) * g))
    x = up if gate is None else gate
    if activation == "silu":
        h = x * _sigmoid(x)
    elif activation == "gelu":
        h = np.float32(0.5) * x * (np.float32(1) + _ERF(x * np.float32(math.sqrt(0.5))).astype(np.float32))
    elif activation == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        h = x * _sigmoid(np.float32(2 * math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))
    else:
        h = np.maximum(x, np.float32(0))
        if activation == "relu2":
            h = h * h
    return h if gate is None else h * up


def _contiguous_rows(array: np.ndarray) -> bool:
    return array.size == 0 or bool(array[0].flags.c_contiguous)


_ERF = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), float32; where exp overflows the result is the 0 that it rounds to."""
    y = np.exp(np.negative(x, dtype=np.float32))
    y += 1
    return np.reciprocal(y, out=y)
