"""Finds the tensors in a `pytorch_model.bin`, without torch.

torch.save writes a zip whose members are stored, not compressed: `ROOT/data.pkl`,
a pickle that describes the tensors, and `ROOT/data/KEY`, the bytes of each storage.
So every tensor is a byte range of the file; this module finds it and checks it.
`torch_pickle` reads the pickle, and runs nothing in it.

The format: torch/serialization.py (`_save`).
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from interviewmate_mlx.errors import WeightsError, list_faults
from interviewmate_mlx.formats.safetensors_file import ITEM_BYTES, TensorEntry
from interviewmate_mlx.formats.torch_pickle import StoredTensor, read_state_dict

_ZIP_MAGIC = b"PK\x03\x04"
# Falcon-RW-7B's pickle is 0.1 MB, its archive's directory 0.05 MB. In memory they take up to
# 70 times their size in the file.
_MAX_PICKLE_BYTES = 1 << 20
_MAX_DIRECTORY_BYTES = 4 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, ..., bytes of the name, bytes of the extras
_ENCRYPTED, _UTF8 = 0x1, 0x800


class _BoundedFile(io.FileIO):
    """A file that refuses large reads: zipfile reads an archive's directory whole, at any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = _MAX_DIRECTORY_BYTES
        if size is not None and size > limit:
            raise ValueError(f"its directory has {size} bytes, expected at most {limit}")
        return super().read(size if size is not None and size >= 0 else limit) or b""


def read_torch_file(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a state dict that torch.save wrote, by name, in the file's order.

    No tensor is loaded: an entry says where its bytes lie. Tensors that share a
    storage (tied weights) share their bytes. Only the format of torch 1.6 and
    newer is read, little-endian, with pickle protocols 2 to 5.

    Raises:
        WeightsError: the file cannot be read, is not such a zip, or is truncated or
            inconsistent; or its pickle holds anything but a flat dict of tensors.
    """
    try:
        opened = _BoundedFile(path)
    except OSError as error:
        raise WeightsError(
            f"Cannot read {path}: {error.strerror}.\nCheck the path and its permissions."
        ) from error
    with opened as file:
        if file.read(4) != _ZIP_MAGIC:
            raise WeightsError(
                f"{path} is not in the zip format of torch 1.6 and newer.\n"
                "If it is an older file that you trust, save it again with torch: "
                f'torch.save(torch.load("{path.name}", weights_only=True), "{path.name}"). '
                "Otherwise download it again."
            )
        try:
            return _read_archive(path, file)
        except zipfile.BadZipFile as error:
            fault = f"the archive is truncated or damaged ({error})"
        except (ValueError, OverflowError, NotImplementedError, struct.error, OSError) as error:
            fault = getattr(error, "strerror", None) or str(error)
    raise WeightsError(
        f"{path} cannot be read as a torch file: {fault}\n"
        "Nothing in it was run. Download it again, or get the model as safetensors."
    )


def _read_archive(path: Path, file: BinaryIO) -> dict[str, TensorEntry]:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two of its members have the same name")
        end = archive.start_dir
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} members named data.pkl, expected one")
    root = roots[0]

    order = f"{root}/byteorder"  # files from before torch 2.1 do not have it
    if order in members and _read_member(file, members[order], end) != b"little":
        raise ValueError("its numbers are not little-endian")
    tensors = read_state_dict(_read_member(file, members[f"{root}/data.pkl"], end))

    entries, faults = {}, []
    for name, tensor in tensors.items():
        try:
            member = members.get(f"{root}/data/{tensor.storage.key}")
            if member is None:
                raise ValueError(f"storage {tensor.storage.key[:40]!r} is not in the archive")
            start = _find_start(file, member, end)
            entries[name] = _locate(path, tensor, member.file_size, start)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise ValueError("\n" + list_faults(faults))
    return entries


def _find_start(file: BinaryIO, member: zipfile.ZipInfo, end: int) -> int:
    """Where a member's bytes start, in bytes from the start of the file.

    Only the member's own header tells: torch pads it to align the data, and the
    directory at the end of the archive does not record this padding.
    """
    label = f"member {member.filename[:80]!r}"
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"{label} is compressed; torch.save never does that")
    if member.flag_bits & _ENCRYPTED:
        raise ValueError(f"{label} is encrypted")
    start = member.header_offset + _LOCAL_HEADER.size
    if not _LOCAL_HEADER.size <= start <= end:
        raise ValueError(f"{label} lies outside the file")
    file.seek(member.header_offset)
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name = file.read(name_bytes).decode("utf-8" if member.flag_bits & _UTF8 else "cp437")
    if magic != _ZIP_MAGIC or name != member.orig_filename:
        raise ValueError(f"{label} is not where the archive says")
    start += int(name_bytes) + int(extra_bytes)
    if start + member.file_size > end:
        raise ValueError(
            f"{label} has {member.file_size} bytes, but only {end - start} are left in the file"
        )
    return start


def _read_member(file: BinaryIO, member: zipfile.ZipInfo, end: int) -> bytes:
    if member.file_size > _MAX_PICKLE_BYTES:
        raise ValueError(
            f"member {member.filename[:80]!r} has {member.file_size} bytes, "
            f"expected at most {_MAX_PICKLE_BYTES}"
        )
    start = _find_start(file, member, end)
    file.seek(start)
    return file.read(member.file_size)


def _locate(path: Path, tensor: StoredTensor, storage_bytes: int, start: int) -> TensorEntry:
    """Check a tensor against its storage, and find where it lies in the file."""
    storage, offset, shape, strides = tensor
    item = ITEM_BYTES[storage.dtype]
    if storage.length * item != storage_bytes:
        raise ValueError(
            f"its storage has {storage_bytes} bytes, "
            f"expected {storage.length * item} for {storage.length} x {storage.dtype}"
        )
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.length:
        raise ValueError(f"it ends at index {last} of a storage of {storage.length} numbers")
    position = start + offset * item if math.prod(shape) else start
    return TensorEntry(
        storage.dtype,
        shape,
        path,
        position,
        None if _is_row_by_row(shape, strides) else strides,
    )


def _is_row_by_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return not math.prod(shape)
        expected *= size
    return True
