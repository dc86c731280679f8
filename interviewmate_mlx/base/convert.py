"""Converts a Falcon-RW folder from the Hub into one that MLX, mlx-lm and transformers load.

The tensors keep the Hub's names and layouts. They are copied in pieces, so a whole
tensor is never in memory. The other files are corrected and completed: old names in
the configuration, the end token, the chat template, and the model file that mlx-lm
needs.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx import __version__
from interviewmate_mlx.base.converted import (
    MODEL_FILE,
    write_config,
    write_json,
    write_tokenizer,
    write_weights,
)
from interviewmate_mlx.base.source import (
    check_depth,
    find_weights,
    model_files,
    read_args,
    read_config,
    read_tensors,
)
from interviewmate_mlx.base.tokenizer import TokenizerFiles, check_vocab, read_tokenizer_files
from interviewmate_mlx.errors import ModelError, WeightsError, brief, list_faults
from interviewmate_mlx.files import Progress, atomic_folder, check_free_space, is_empty_folder
from interviewmate_mlx.formats.cast import FLOAT_DTYPES
from interviewmate_mlx.formats.json_file import parse_json, read_file, read_json
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.formats.model_files import TOKENIZER_FILES
from interviewmate_mlx.formats.safetensors_file import ITEM_BYTES, TensorEntry
from interviewmate_mlx.formats.samples import add_samples
from interviewmate_mlx.model import falcon
from interviewmate_mlx.model.tree import named_arrays

_RECORD = "conversion.json"
_WEIGHTS = "model.safetensors"
_EMBEDDING = "transformer.word_embeddings.weight"
_HEAD = "lm_head.weight"
_SPARE_BYTES = 64 << 20  # must stay free on the disk


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


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    trim_vocab: bool = False,
    force: bool = False,
    source_name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ConvertedFolder:
    """Convert a model folder. `out` appears whole or not at all.

    Args:
        source: a folder in the Hub's layout, with safetensors or `pytorch_model.bin`,
            in one file or in shards.
        out: the converted folder.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the source's.
        trim_vocab: cut the embedding to the tokenizer's size.
        force: replace an earlier conversion at `out`.
        source_name: the source's name in `conversion.json`; by default its folder's name.
        revision: the source's commit on the Hub, for `conversion.json`; None or "" if it
            is not from there.
        progress: called with bytes done and bytes in all.

    Raises:
        ModelError: the source is not a Falcon-RW, or has no tokenizer; or `out` holds
            the source, something that is not a conversion, or another conversion that
            may not be replaced.
        WeightsError: the weights are damaged or unsafe, or do not fit the model.
        StorageError: the disk has too little free space, or cannot be written to.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ModelError(f"dtype: got {dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}")
    source, out = source.resolve(), out.resolve()
    _check_out(source, out)
    if source.is_dir():
        refuse_outside_links(source, model_files(source), ModelError)
    config = read_config(source)
    args = read_args(source, config)
    tokenizer = read_tokenizer_files(source)
    check_vocab(tokenizer, args.vocab_size)
    tensors = read_tensors(find_weights(source))
    record: dict[str, Any] = {
        "source": source_name or source.name,
        "revision": revision or None,
        "content": _hash_content(source, tensors, tokenizer),
        "trim_vocab": trim_vocab,
        "interviewmate_mlx": __version__,
    }
    if not force and (found := _find_earlier(out, record, dtype)):
        return found

    config["tie_word_embeddings"] = args.tie_word_embeddings
    tensors = _fit(tensors, args, dtype)
    record["source_dtype"] = tensors[_EMBEDDING].dtype
    record["dtype"] = dtype = dtype or record["source_dtype"]
    if trim_vocab:
        config["vocab_size"] = tokenizer.vocab_size
        for name in {_EMBEDDING, _HEAD} & set(tensors):
            tensors[name] = tensors[name].first_rows(tokenizer.vocab_size)
    num_parameters = sum(math.prod(entry.shape) for entry in tensors.values())
    nbytes = num_parameters * ITEM_BYTES[dtype]
    record |= {"num_parameters": num_parameters, "nbytes": nbytes}
    check_free_space(out, nbytes + _SPARE_BYTES)
    with atomic_folder(out, replace=force) as folder:
        write_weights(folder / _WEIGHTS, tensors, dtype, progress)
        write_config(folder, source, config, tokenizer, dtype)
        write_tokenizer(folder, tokenizer)
        shutil.copyfile(falcon.__file__, folder / MODEL_FILE)
        write_json(folder / _RECORD, record)
    return ConvertedFolder(out, num_parameters, dtype, nbytes, already_there=False)


def source_of(folder: Path) -> str:
    """What a converted folder says that it was made from; "" if it does not say."""
    if not (folder / _RECORD).is_file():
        return ""
    try:
        return str(read_json(folder / _RECORD).get("source", ""))
    except ModelError:  # damaged: it says nothing
        return ""


def _hash_content(source: Path, tensors: dict[str, TensorEntry], tokenizer: TokenizerFiles) -> str:
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


def _check_out(source: Path, out: Path) -> None:
    """Refuse to write where something is that no conversion wrote."""
    if out == source or out in source.parents:
        raise ModelError(
            f"{out} holds the source {source}.\nChoose another folder for the result.", "out"
        )
    if out.exists() and not is_empty_folder(out) and not (out / _RECORD).is_file():
        raise ModelError(
            f"{out} already exists, and no conversion wrote it.\nChoose another folder.", "out"
        )


def _find_earlier(out: Path, record: dict[str, Any], dtype: str | None) -> ConvertedFolder | None:
    """The folder at `out` if the same conversion wrote it; None if there is none."""
    if not (out / _RECORD).is_file():
        return None
    found = _read_record(out)
    faults = []
    if not _has_same_source(found, record):
        made_of = f"{found['source']}{' at ' if found['revision'] else ''}{found['revision'] or ''}"
        reason = "whose files hold something else"
        if "content" not in found:
            reason = "by a version that did not record what its files hold"
        faults.append(f"source: converted from {made_of}, {reason}")
    expected = {"dtype": dtype or found["source_dtype"], "trim_vocab": record["trim_vocab"]}
    faults += [
        f"{key}: got {found[key]}, expected {value}"
        for key, value in expected.items()
        if found[key] != value
    ]
    weights = out / _WEIGHTS
    if not weights.is_file() or weights.stat().st_size < found["nbytes"]:
        faults.append(f"{_WEIGHTS}: truncated or missing")
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
    path, hint = out / _RECORD, "Choose another folder, or replace it."
    try:
        found = parse_json(path, read_file(path), ModelError, hint)
    except ModelError as error:
        raise ModelError(str(error), "out", "force") from error
    found.setdefault("revision", None)
    kinds: dict[str, type | tuple[type, ...]] = {
        "source": str,
        "revision": (str, type(None)),
        "dtype": str,
        "source_dtype": str,
        "trim_vocab": bool,
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


def _fit(
    tensors: dict[str, TensorEntry], args: falcon.ModelArgs, dtype: str | None
) -> dict[str, TensorEntry]:
    """Check that the tensors are exactly the model's; return them in the model's order."""
    check_depth(args.num_hidden_layers, tensors)
    expected = {
        name: value.shape for name, value in named_arrays(falcon.Model(args).parameters()).items()
    }
    faults = [f"{name}: missing" for name in expected if name not in tensors]
    common = tensors[_EMBEDDING].dtype if _EMBEDDING in tensors else None
    for name, entry in tensors.items():
        if name not in expected and not (name == _HEAD and args.tie_word_embeddings):
            faults.append(f"{name}: unknown")
        elif name in expected and entry.shape != expected[name]:
            faults.append(f"{name}: got {entry.shape}, expected {expected[name]}")
        if entry.dtype not in FLOAT_DTYPES:
            faults.append(f"{name}: got {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        elif dtype is None and common in FLOAT_DTYPES and entry.dtype != common:
            faults.append(f"{name}: got {entry.dtype}, expected {common} like the embedding")
    is_tied = args.tie_word_embeddings and _HEAD in tensors
    if not faults and is_tied and not _are_equal(tensors[_HEAD], tensors[_EMBEDDING]):
        faults.append(f"{_HEAD}: differs from the embedding, but tie_word_embeddings is true")
    if faults:
        path = next(iter(tensors.values())).path.parent if tensors else "The model"
        raise WeightsError(
            f"{path}: its tensors do not fit the Falcon-RW in its config.json:\n"
            f"{list_faults(faults, max_shown=40)}\n"
            "Correct config.json, or download the model again; for mixed dtypes, choose one dtype.",
            "dtype",
        )
    return {name: tensors[name] for name in expected}


def _are_equal(one: TensorEntry, other: TensorEntry) -> bool:
    if one == other:  # they share a storage
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = hashlib.sha256(), hashlib.sha256()
    for digest, entry in ((first, one), (second, other)):
        for chunk in entry.chunks():
            digest.update(chunk)
    return first.digest() == second.digest()
