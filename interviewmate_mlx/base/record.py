"""What a conversion writes about itself, and what an earlier one wrote."""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx.adapter.card import Origin
from interviewmate_mlx.base.tokenizer import TokenizerFiles
from interviewmate_mlx.errors import ModelError, brief, list_faults
from interviewmate_mlx.formats.json_file import parse_json, read_file, read_json
from interviewmate_mlx.formats.model_files import CARD_FILE, TOKENIZER_FILES
from interviewmate_mlx.formats.safetensors_file import TensorEntry
from interviewmate_mlx.formats.samples import add_samples

RECORD = "conversion.json"
_CARD_CHARS = 1 << 14  # of a card, where its header is
_LICENCE = re.compile(r"(?s)---\n(?:(?!---\n).*?\n)?license:[ \"']*([\w.+-]+)").match


@dataclass(frozen=True)
class ConvertedFolder:
    """A converted folder.

    Attributes:
        path: the folder.
        num_parameters: count of its weights; a tied head counts once.
        dtype: of all its weights.
        nbytes: size of its weights, without the file's header.
        already_there: an earlier conversion of the same files wrote it; this one
            wrote nothing.
    """

    path: Path
    num_parameters: int
    dtype: str
    nbytes: int
    already_there: bool


def origin_of(folder: Path) -> Origin:
    """Where a base's folder says that it comes from."""
    content: dict[str, Any] = {}
    if (folder / RECORD).is_file():
        with suppress(ModelError):  # damaged: it says nothing
            content = read_json(folder / RECORD)
    given = {key: content.get(key) for key in ("source", "revision", "licence")}
    words = {key: value if isinstance(value, str) else "" for key, value in given.items()}
    return Origin(words["source"], words["revision"], words["licence"] or read_licence(folder))


def read_licence(folder: Path) -> str:
    """The licence that a model's card names in its header; "" if there is none."""
    path = folder / CARD_FILE
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = _LICENCE(file.read(_CARD_CHARS))
    return found[1] if found else ""


def source_of(folder: Path) -> str:
    """What a converted folder says that it was made from; "" if it does not say."""
    return origin_of(folder).source


def hash_content(source: Path, tensors: dict[str, TensorEntry], tokenizer: TokenizerFiles) -> str:
    """A hash of what the source's files hold: the small files whole, the weights by samples.

    Copies of the files have the same hash, whenever and wherever they were made.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        path = source / name
        content = tokenizer.contents.get(name) or (read_file(path) if path.is_file() else b"")
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for path in dict.fromkeys(entry.path for entry in tensors.values()):
        here = {name: entry for name, entry in tensors.items() if entry.path == path}
        layout = [[n, e.dtype, e.shape, e.offset, e.strides] for n, e in here.items()]
        add_samples(digest, path, json.dumps(layout).encode(), here.values())
    return digest.hexdigest()


def find_earlier(out: Path, record: dict[str, Any], dtype: str | None) -> ConvertedFolder | None:
    """The folder at `out` if the same conversion wrote it; None if there is none."""
    if not (out / RECORD).is_file():
        return None
    found = _read_record(out)
    faults = []
    if not _has_same_source(found, record):
        made_of = f"{found['source']}{' at ' if found['revision'] else ''}{found['revision'] or ''}"
        reason = "whose files hold something else"
        if "content" not in found:
            reason = "by a version that did not record what its files hold"
        faults.append(f"source: converted from {made_of}, {reason}")
    expected = {
        "dtype": dtype or found["source_dtype"],
        "trim_vocab": record["trim_vocab"],
        "quantization": record["quantization"],
    }
    faults += [
        f"{key}: got {found[key]}, expected {value}"
        for key, value in expected.items()
        if found[key] != value
    ]
    size = sum(path.stat().st_size for path in out.glob("model*.safetensors"))
    if size < found["nbytes"]:
        faults.append("model.safetensors: truncated or missing")
    if faults:
        raise ModelError(
            f"{out} holds another conversion:\n{list_faults(faults)}\n"
            "Choose another folder, or replace it.",
            "out",
            "force",
        )
    return ConvertedFolder(
        out, found["num_parameters"], found["dtype"], found["nbytes"], already_there=True
    )


def _has_same_source(found: dict[str, Any], record: dict[str, Any]) -> bool:
    if "content" in found:
        return bool(found["content"] == record["content"])
    # An older record. A commit of the Hub says what its files hold; a path does not.
    same = all(found[key] == record[key] for key in ("source", "revision"))
    return same and found["revision"] is not None


def _read_record(out: Path) -> dict[str, Any]:
    """Read what an earlier conversion wrote about itself."""
    path, hint = out / RECORD, "Choose another folder, or replace it."
    try:
        found = parse_json(path, read_file(path), ModelError, hint)
    except ModelError as error:
        raise ModelError(str(error), "out", "force") from error
    found.setdefault("revision", None)
    found.setdefault("quantization", None)
    kinds: dict[str, type | tuple[type, ...]] = {
        "source": str,
        "revision": (str, type(None)),
        "dtype": str,
        "source_dtype": str,
        "trim_vocab": bool,
        "quantization": (dict, type(None)),
        "num_parameters": int,
        "nbytes": int,
    }
    faults = [
        f"{key}: got {brief(found.get(key))}" if key in found else f"{key}: missing"
        for key, kind in kinds.items()
        if not isinstance(found.get(key), kind)
    ]
    if faults:
        raise ModelError(
            f"{path} is damaged:\n{list_faults(faults)}\n{hint}",
            "out",
            "force",
        )
    return found
