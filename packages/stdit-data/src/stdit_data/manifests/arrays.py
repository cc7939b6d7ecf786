"""Arrow arrays as NumPy's and back, without copies where possible.

pyarrow's own conversions (`to_numpy`, `pa.array`, `pa.scalar`) import pandas where it is installed: a second and 60 MB
in each process of a run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NUMBERS = {np.dtype(np.float64): pa.float64(), np.dtype(np.int64): pa.int64()}


def floats(array: pa.Array) -> NDArray[np.float64]:
    """Return an array of numbers, with NaN for missing ones; whole numbers are exact up to 2**53."""
    array = array.cast(pa.float64(), safe=False)
    if not array.null_count:
        return np.asarray(np.from_dlpack(array), np.float64)
    missing = flags(array.is_null())
    values = np.frombuffer(array.buffers()[1], np.float64, len(array), 8 * array.offset).copy()
    values[missing] = np.nan
    return values


def flags(array: pa.Array) -> NDArray[np.bool_]:
    """Return an array of booleans, none of which is missing."""
    bits = np.frombuffer(array.buffers()[1], np.uint8)
    return np.unpackbits(bits, count=array.offset + len(array), bitorder="little")[array.offset :].view(np.bool_)


def from_numpy(values: NDArray[Any]) -> pa.Array:
    """Return an Arrow array of float64 or int64, in the same memory."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(NUMBERS[values.dtype], len(values), [None, pa.py_buffer(values)])


def text_scalar(text: str) -> pa.Scalar:
    """Return a text as a scalar of `large_string`."""
    data = text.encode()
    offsets = np.array([0, len(data)], np.int64)
    return pa.Array.from_buffers(pa.large_string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])[0]


def codes(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the distinct values of an array, in no order, and the number among them of each."""
    found = from_numpy(values).dictionary_encode()
    return np.from_dlpack(found.dictionary), np.from_dlpack(found.indices).astype(np.int64)
