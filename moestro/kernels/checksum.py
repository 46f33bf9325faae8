"""CRC-32 of large buffers, as zlib has it and several times as fast where the processor multiplies without carry."""

from __future__ import annotations

import zlib

import numpy as np

from moestro.kernels import native

_SMALL = 1 << 12  # bytes below which a call into native code is not worth it


def crc32(bytes_N: np.ndarray, before: int = 0) -> int:
    """zlib.crc32 of a contiguous uint8 array. before: the checksum of what precedes it. Other threads may run meanwhile."""
    assert bytes_N.dtype == np.uint8 and bytes_N.flags.c_contiguous
    module = native.extension()
    if module is None or bytes_N.nbytes < _SMALL or not module.has_crc32():
        return zlib.crc32(bytes_N.data, before)
    return module.crc32(bytes_N.ctypes.data, bytes_N.nbytes, before)
