"""One library finds its functions in another, and nobody else in the process does (Linux).

A library that is loaded with its symbols global serves everything that is loaded later: an
OpenBLAS for MLX became torch's too, and its batched products of small matrices end the process
on some processors. A group that is loaded together looks among its own members first, in order.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

# From the ELF specification, elf.h: sizes in bytes and the numbers of the fields used here.
_HEADER, _SEGMENT, _ENTRY, _SYMBOL = 64, 56, 16, 24
_SHARED_LIBRARY, _LOAD, _DYNAMIC, _READ_WRITE = 3, 1, 2, 6
_NEEDED, _HASH, _STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE = 1, 4, 5, 6, 10, 11
_LARGEST_PAGE = 1 << 16  # of the processors that Linux runs on


def load_group(paths: Sequence[str]) -> None:
    """Load shared libraries together: each finds what it needs in the first of them that has it.

    Args:
        paths: of the libraries, by priority. One that is loaded already stays as it is bound.

    Raises:
        OSError: one of them cannot be loaded.
    """
    file = os.memfd_create("group")
    try:
        with open(paths[-1], "rb") as last:
            os.write(file, library_that_needs(paths, like=last.read(_HEADER)))
        ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_LOCAL)
    finally:
        os.close(file)


def library_that_needs(paths: Sequence[str], like: bytes) -> bytes:
    """The bytes of a shared library without code, whose only content is which others it needs.

    Args:
        paths: of those, in the order in which functions are looked up.
        like: the ELF header of a library for the same processor.
    """
    names = [os.fsencode(path) + b"\0" for path in paths]
    starts = [1 + sum(map(len, names[:number])) for number in range(len(names))]
    strings = b"\0" + b"".join(names)
    dynamic_at = _HEADER + 2 * _SEGMENT
    symbols_at = dynamic_at + _ENTRY * (len(paths) + 6)
    hash_at = symbols_at + _SYMBOL  # the one symbol that each table begins with
    hashes = struct.pack("<4I", 1, 1, 0, 0)  # one bucket, one chain, both empty
    strings_at = hash_at + len(hashes)
    end = strings_at + len(strings)
    entries = [
        *((_NEEDED, start) for start in starts),
        (_HASH, hash_at),
        (_STRINGS, strings_at),
        (_SYMBOLS, symbols_at),
        (_STRINGS_SIZE, len(strings)),
        (_SYMBOL_SIZE, _SYMBOL),
        (0, 0),
    ]
    identity, machine = like[:16], struct.unpack_from("<H", like, 18)[0]
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(identity, _SHARED_LIBRARY, machine, 1, 0, _HEADER, 0, 0),
        *(_HEADER, _SEGMENT, 2, 0, 0, 0),
    )

    def segment(kind: int, at: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, _READ_WRITE, at, at, at, size, size, align)

    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return b"".join(
        [
            header,
            segment(_LOAD, 0, end, _LARGEST_PAGE),
            segment(_DYNAMIC, dynamic_at, len(dynamic), 8),
            dynamic,
            bytes(_SYMBOL),
            hashes,
            strings,
        ]
    )
