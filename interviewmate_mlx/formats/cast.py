"""From one float dtype to another, on raw bytes, rounded to the nearest, ties to even.

numpy has no bfloat16, so it is handled as what it is: the upper half of a float32.
"""

import numpy as np
import numpy.typing as npt

FLOATS = ("float32", "bfloat16", "float16")

_NUMPY_TYPE = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}


def cast(chunk: memoryview, source: str, target: str) -> memoryview:
    """The same numbers in another dtype. Infinities and NaN stay what they are.

    Args:
        chunk: bytes of whole numbers, little-endian.
        source: their dtype, one of `FLOATS`.
        target: the dtype wanted, one of `FLOATS`.

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
        with np.errstate(all="ignore"):  # what overflows is found below
            narrow = wide.astype("<f2")
        is_infinite = np.isinf(narrow)
    if is_infinite.any() and (is_infinite & np.isfinite(wide)).any():
        largest = np.abs(wide[np.isfinite(wide)]).max()
        raise OverflowError(f"{largest:g} is too large for {target}")
    return narrow.data.cast("B")


def _round_to_bfloat16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = wide.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40  # rounding could carry a NaN over into an infinity
    return np.where(np.isnan(wide), quiet_nan, rounded).astype("<u2")
