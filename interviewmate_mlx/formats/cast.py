"""Casts raw bytes from one float dtype to another, rounding to nearest, ties to even.

numpy has no bfloat16. A bfloat16 is the upper half of a float32, and is handled as that.
"""

import numpy as np
import numpy.typing as npt

FLOAT_DTYPES = ("float32", "bfloat16", "float16")

_NUMPY_TYPE = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}


def cast(chunk: memoryview, source: str, target: str) -> memoryview:
    """Cast numbers to another dtype. Infinities and NaN are kept.

    Args:
        chunk: little-endian bytes, without a cut number at either end.
        source: the dtype of `chunk`, one of `FLOAT_DTYPES`.
        target: the dtype of the result, one of `FLOAT_DTYPES`.

    Raises:
        OverflowError: a finite number is too large for `target`.
    """
    if source == target:
        return chunk
    numbers = np.frombuffer(chunk, _NUMPY_TYPE[source])
    if source == "bfloat16":
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    wide = numbers.astype("<f4", copy=False)
    if target == "float32":
        return wide.data.cast("B")
    if target == "bfloat16":
        narrow = _round_to_bfloat16(wide)
        is_infinite = (narrow & 0x7FFF) == 0x7F80
    else:
        with np.errstate(all="ignore"):  # overflow is reported below
            narrow = wide.astype("<f2")
        is_infinite = np.isinf(narrow)
    if is_infinite.any() and (is_infinite & np.isfinite(wide)).any():
        largest = np.abs(wide[np.isfinite(wide)]).max()
        raise OverflowError(f"{largest:g} is too large for {target}")
    return narrow.data.cast("B")


def _round_to_bfloat16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = wide.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40  # rounding could turn a NaN into an infinity
    return np.where(np.isnan(wide), quiet_nan, rounded).astype("<u2")
