"""Tells what a weight file holds from a few bytes of each tensor.

To read a large model whole would take seconds or minutes. Training changes almost all
numbers of a tensor that it changes, so two samples of each are enough to see it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from interviewmate_mlx.formats.safetensors_file import TensorEntry

if TYPE_CHECKING:
    from hashlib import _Hash

_SAMPLE_BYTES = 4096


def add_samples(
    digest: "_Hash", path: Path, description: bytes, entries: Iterable[TensorEntry]
) -> None:
    """Add a weight file to a hash: its name and size, its header, two samples of each tensor.

    Args:
        digest: the hash.
        path: the file.
        description: what says where each tensor lies, such as the file's header.
        entries: the tensors, in the order of `description`.
    """
    digest.update(json.dumps([path.name, path.stat().st_size]).encode())
    digest.update(description)
    with path.open("rb") as file:
        for entry in entries:
            for start in (0, entry.nbytes // 2):
                file.seek(entry.offset + start)
                digest.update(file.read(_SAMPLE_BYTES))
