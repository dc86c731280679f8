"""Converts a Falcon-RW folder from the Hub into one that MLX, mlx-lm and transformers load.

The tensors keep the Hub's names and layouts. They are copied in pieces, so a whole
tensor is never in memory. The other files are corrected and completed: old names in
the configuration, the end token, the chat template, and the model file that mlx-lm
needs.
"""

import hashlib
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
    WeightFiles,
    check_depth,
    find_weights,
    model_files,
    read_args,
    read_config,
    read_tensors,
)
from interviewmate_mlx.base.tokenizer import (
    TOKENIZER_FILES,
    TokenizerFiles,
    check_vocab,
    read_tokenizer_files,
)
from interviewmate_mlx.errors import ModelError, WeightsError, list_faults
from interviewmate_mlx.files import Progress, atomic_folder, check_free_space
from interviewmate_mlx.formats.cast import FLOAT_DTYPES
from interviewmate_mlx.formats.json_file import read_file, read_json
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.formats.safetensors_file import ITEM_BYTES, TensorEntry
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
        revision: the source's commit on the Hub, for `conversion.json`.
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
    if source.is_dir():
        refuse_outside_links(source, model_files(source), ModelError)
    config = read_config(source)
    args = read_args(source, config)
    tokenizer = read_tokenizer_files(source)
    check_vocab(tokenizer, args.vocab_size)
    weights = find_weights(source)
    record: dict[str, Any] = {
        "source": source_name or source.name,
        "revision": revision,
        "fingerprint": _fingerprint(source, weights, tokenizer),
        "trim_vocab": trim_vocab,
        "interviewmate_mlx": __version__,
    }
    if found := _find_earlier(source, out, record, dtype, force):
        return found

    config["tie_word_embeddings"] = args.tie_word_embeddings
    tensors = _fit(read_tensors(weights), args, dtype)
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


def _fingerprint(source: Path, weights: WeightFiles, tokenizer: TokenizerFiles) -> str:
    """A hash that detects changes of the source's files.

    Weights are large, so only their names, sizes and times count.
    """
    digest = hashlib.sha256()
    for path in weights.paths:
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        path = source / name
        content = tokenizer.contents.get(name) or (read_file(path) if path.is_file() else b"")
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _find_earlier(
    source: Path, out: Path, record: dict[str, Any], dtype: str | None, force: bool
) -> ConvertedFolder | None:
    """The folder at `out` if the same conversion wrote it; None if `out` may be written."""
    if out == source or out in source.parents:
        raise ModelError(
            f"{out} holds the source {source}.\nChoose another folder for the result.", "out"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / _RECORD).is_file():
        raise ModelError(
            f"{out} already exists, and no conversion wrote it.\nChoose another folder.", "out"
        )
    if force:
        return None
    found = read_json(out / _RECORD)
    faults = []
    if found.get("fingerprint") != record["fingerprint"]:
        name, revision = found.get("source"), found.get("revision")
        faults.append(f"source: converted from other files, {name} {revision}")
    expected = {"dtype": dtype or found.get("source_dtype"), "trim_vocab": record["trim_vocab"]}
    for key, value in expected.items():
        if found.get(key) != value:
            faults.append(f"{key}: got {found.get(key)}, expected {value}")
    weights = out / _WEIGHTS
    if not weights.is_file() or weights.stat().st_size < found.get("nbytes", math.inf):
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


def _fit(
    tensors: dict[str, TensorEntry], args: falcon.ModelArgs, dtype: str | None
) -> dict[str, TensorEntry]:
    """Check that the tensors are exactly the model's; return them in the model's order."""
    check_depth(args, tensors)
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
