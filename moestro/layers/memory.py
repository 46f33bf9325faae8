"""Fresh large arrays on huge pages: a weight gradient is written once, and page faults would cost as much as computing it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

LARGE = 4 << 20  # bytes; below, the allocator reuses memory
_HUGE, _PAGE = 14, 4096  # MADV_HUGEPAGE of Linux


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C library's madvise, or None where there is none to call."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "madvise", None)
    if call is not None:
        call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return call


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s type. The advice on its pages is only advice: the kernel may ignore it."""
    out = like.new_empty(tuple(shape))
    size = out.numel() * out.element_size()
    call = _madvise()
    if size >= LARGE and call is not None and out.device.type == "cpu":
        first = -(-out.data_ptr() // _PAGE) * _PAGE
        call(first, (out.data_ptr() + size - first) // _PAGE * _PAGE, _HUGE)
    return out
