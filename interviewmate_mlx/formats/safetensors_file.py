"""Reads the headers of safetensors files without loading a tensor, and writes such files.

The format (https://github.com/huggingface/safetensors): 8 bytes with the
header's length, the header in JSON, then the tensors' bytes without gaps,
little-endian, row by row.
"""

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
import errno
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from interviewmate_mlx.errors import WeightsError, brief
from interviewmate_mlx.formats.json_file import without_duplicates

# Name, code in a safetensors header, bytes per number.
_DTYPES = [
    ("float64", "F64", 8),
    ("float32", "F32", 4),
    ("float16", "F16", 2),
    ("bfloat16", "BF16", 2),
    ("int64", "I64", 8),
    ("int32", "I32", 4),
    ("uint32", "U32", 4),  # packed numbers of a quantised model
    ("int16", "I16", 2),
    ("int8", "I8", 1),
    ("uint8", "U8", 1),
    ("bool", "BOOL", 1),
]
ITEM_BYTES = {name: size for name, _, size in _DTYPES}
_CODE_OF = {name: code for name, code, _ in _DTYPES}
_NAME_OF = {code: name for name, code, _ in _DTYPES}

# Falcon-RW-7B's header is 0.06 MB. Parsed JSON takes up to 30 times its size in the file.
_MAX_HEADER_BYTES = 4 << 20
_MAX_NAME_CHARS = 500
_MAX_AXES = 64  # the limit of numpy and torch; multiplying millions of sizes would take hours
_CHUNK_BYTES = 256 << 10  # fits in a CPU's cache; larger pieces are slower


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a file. Checked against the file's size; not read.

    Attributes:
        dtype: `float32`, `bfloat16`, ... (`ITEM_BYTES` lists them).
        shape: () for a single number.
        path: the file.
        offset: where its first number starts, in bytes from the start of the file.
        strides: for each axis, how many numbers (not bytes) to go to the next element.
            None if the tensor is stored row by row.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def first_rows(self, count: int) -> "TensorEntry":
        """The same tensor, truncated to `count` along its first axis."""
        return TensorEntry(
            self.dtype, (count, *self.shape[1:]), self.path, self.offset, self.strides
        )

    def chunks(self) -> Iterator[memoryview]:
        """Read its bytes in pieces, row by row. No number is split between two pieces.

        A piece is valid until the next one is asked for.

        Raises:
            WeightsError: the file became shorter since its header was read.
        """
        if self.strides is not None:
            yield from self._gathered_chunks(self.strides)
            return
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, self.nbytes)))
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, _CHUNK_BYTES):
                piece = buffer[: self.nbytes - start]
                if file.readinto(piece) != len(piece):
                    raise WeightsError(f"{self.path} became shorter while it was read")
                yield piece

    def _gathered_chunks(self, strides: tuple[int, ...]) -> Iterator[memoryview]:
        item = ITEM_BYTES[self.dtype]
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, strides, strict=True))
        numbers = np.memmap(self.path, f"V{item}", mode="r", offset=self.offset, shape=(extent,))
        view = np.lib.stride_tricks.as_strided(
            numbers, self.shape, [step * item for step in strides], writeable=False
        )
        rows = max(1, _CHUNK_BYTES * self.shape[0] // self.nbytes)
        for start in range(0, self.shape[0], rows):
            yield memoryview(np.ascontiguousarray(view[start : start + rows]).tobytes())


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: strings by key. Values that are not strings are left out.
        text: the header's bytes, unchanged.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    text: bytes


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check a file's header. No tensor is read.

    Raises:
        WeightsError: the file cannot be read, is damaged or truncated, or has a
            dtype that is not in `ITEM_BYTES`.
    """
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise _damaged(
                    path,
                    f"its header claims {header_bytes} bytes in a file of {file_bytes}, "
                    f"expected at most {_MAX_HEADER_BYTES}",
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise WeightsError(
            f"Cannot read {path}: {error.strerror}.\nCheck the path and its permissions."
        ) from error
    try:
        header = json.loads(text, object_pairs_hook=without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        metadata = header.pop("__metadata__", None)
        spans = {name: _check_tensor(name, value) for name, value in header.items()}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"bad header: {error}") from error

    data_start = 8 + header_bytes
    in_order = sorted((begin, end) for _, _, begin, end in spans.values())
    edges = [(0, 0), *in_order, (file_bytes - data_start,) * 2]
    if any(end != begin for (_, end), (begin, _) in pairwise(edges)):
        expected = data_start + max((end for _, end in in_order), default=0)
        if expected != file_bytes:
            raise _damaged(path, f"got {file_bytes} bytes, expected {expected}")
        raise _damaged(path, "its tensors overlap or leave gaps")
    tensors = {
        name: TensorEntry(dtype, shape, path, data_start + begin)
        for name, (dtype, shape, begin, _) in spans.items()
    }
    return SafetensorsHeader(tensors, _strings(metadata), text)


def safetensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """The first bytes of a safetensors file: the header and its length.

    The tensors' bytes must follow in the given order, without gaps.

    Args:
        tensors: name, dtype and shape of each.
        metadata: strings by key; transformers requires `{"format": "pt"}`.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": _CODE_OF[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return len(text).to_bytes(8, "little") + text


def save_tensors(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write arrays to a safetensors file.

    Raises:
        OSError: it cannot be written. MLX does not say why.
    """
    try:
        mx.save_safetensors(str(path), tensors, metadata=metadata)
    except RuntimeError as error:
        raise OSError(errno.EIO, f"{error} Is the disk full?", str(path)) from error


def load_tensors(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, by name. MLX reads an array when it is first used.

    Raises:
        RuntimeError, ValueError: MLX cannot read the file.
    """
    return cast(dict[str, mx.array], mx.load(str(path)))


def _check_tensor(name: str, value: object) -> tuple[str, tuple[int, ...], int, int]:
    """Check a tensor's entry in the header; return dtype, shape, begin and end.

    Raises:
        ValueError: the entry is wrong.
    """
    if not is_tensor_name(name):
        raise ValueError(f"{name[:80]!a}: a name that cannot be printed")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _NAME_OF:
        known = ", ".join(_NAME_OF)
        raise ValueError(f"{name}: got dtype {brief(code)}, expected one of {known}")
    if not all(isinstance(v, list) and are_sizes(v) for v in (shape, offsets)) or len(offsets) != 2:
        raise ValueError(
            f"{name}: got shape {brief(shape)} and data_offsets {brief(offsets)}, expected sizes "
            "and [begin, end]"
        )
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[_NAME_OF[code]]
    if end - begin != expected:
        raise ValueError(f"{name}: got {end - begin} bytes, expected {expected} for {shape}")
    return _NAME_OF[code], tuple(shape), begin, end


def _strings(metadata: object) -> dict[str, str]:
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def is_tensor_name(name: str) -> bool:
    """Whether a name can be a tensor's: not long, and without what would steer a terminal."""
    return name.isprintable() and len(name) <= _MAX_NAME_CHARS


def are_sizes(values: Sequence[Any]) -> bool:
    """Whether values can be a tensor's sizes, strides or offsets: whole numbers, not many."""
    # `type`, not isinstance: to Python, a bool is an int.
    return len(values) <= _MAX_AXES and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _damaged(path: Path, fault: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a valid safetensors file: {fault}\nDelete it and download it again."
    )
