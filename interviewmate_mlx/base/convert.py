"""Converts a model folder of the Hub into one that MLX, mlx-lm and transformers load.

The tensors keep the Hub's names and layouts. They are copied in pieces, so a whole tensor
is never in memory. Of a Falcon-RW the other files are corrected and completed: old names in
the configuration, the end token, the chat template, and the model file that mlx-lm needs. Other
networks are taken as they are, in another dtype or quantised if that is asked for.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from interviewmate_mlx import __version__
from interviewmate_mlx.base.converted import (
    MODEL_FILE,
    write_config,
    write_json,
    write_network_config,
    write_tokenizer,
    write_weights,
)
from interviewmate_mlx.base.fit import EMBEDDING, HEAD, check_fit, fit_falcon
from interviewmate_mlx.base.quantization import Quantization, read_quantization
from interviewmate_mlx.base.quantize import quantize_file
from interviewmate_mlx.base.record import (
    RECORD,
    ConvertedFolder,
    find_earlier,
    hash_content,
    read_licence,
)
from interviewmate_mlx.base.source import (
    WeightFiles,
    find_weights,
    is_falcon,
    model_files,
    read_config,
    read_network,
    read_tensors,
)
from interviewmate_mlx.base.tokenizer import check_vocab, read_tokenizer_files
from interviewmate_mlx.errors import ModelError
from interviewmate_mlx.files import Progress, atomic_folder, check_free_space, is_empty_folder
from interviewmate_mlx.formats.cast import FLOAT_DTYPES
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.formats.model_files import index_of
from interviewmate_mlx.formats.safetensors_file import ITEM_BYTES, TensorEntry
from interviewmate_mlx.model import falcon
from interviewmate_mlx.model.architectures import NetworkConfig
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import build_network

_WEIGHTS = "model.safetensors"
_SPARE_BYTES = 64 << 20  # must stay free on the disk


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    trim_vocab: bool = False,
    quantization: Quantization | None = None,
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
        trim_vocab: cut the embedding to the tokenizer's size; of a Falcon-RW.
        quantization: of the weights written; None leaves them as they are.
        force: replace an earlier conversion at `out`.
        source_name: the source's name in `conversion.json`; by default its folder's name.
        revision: the source's commit on the Hub, for `conversion.json`; None or "" if it
            is not from there.
        progress: called with bytes done and bytes in all.

    Raises:
        ModelError: the source is no network that can be trained here, or has no tokenizer;
            what is asked for cannot be done to it; or `out` holds the source, something
            that is not a conversion, or another conversion that may not be replaced.
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
    network = read_network(source, config)
    tokenizer = read_tokenizer_files(source)
    check_vocab(tokenizer.within(network.vocab_size), network.vocab_size)
    weights = find_weights(source)
    tensors = read_tensors(weights)
    quantized = read_quantization(source, config, tensors)
    corrects = is_falcon(config) and not quantized
    _check_wishes(source, network, quantized, bool(dtype or quantization), trim_vocab)
    record: dict[str, Any] = {
        "source": source_name or source.name,
        "revision": revision or None,
        "content": hash_content(source, tensors, tokenizer),
        "trim_vocab": trim_vocab,
        "quantization": quantization.settings if quantization else None,
        "licence": read_licence(source),
        "interviewmate_mlx": __version__,
    }
    if not force and (found := find_earlier(out, record, dtype)):
        return found

    if corrects:
        config["tie_word_embeddings"] = network.args.tie_word_embeddings
        tensors = fit_falcon(tensors, network.args, dtype)
    else:
        check_fit(source, network, tensors, quantized)
    if trim_vocab:
        config["vocab_size"] = tokenizer.vocab_size
        for name in {EMBEDDING, HEAD} & set(tensors):
            tensors[name] = tensors[name].first_rows(tokenizer.vocab_size)
        network = read_network(source, config)
    record["source_dtype"] = _common_dtype(tensors)
    dtypes = {
        name: dtype if dtype and entry.dtype in FLOAT_DTYPES else entry.dtype
        for name, entry in tensors.items()
    }
    is_cast = any(dtypes[name] != entry.dtype for name, entry in tensors.items())
    record["dtype"] = dtype = dtype or record["source_dtype"]
    parameters = named_arrays(build_network(network).parameters()).values()
    num_parameters = sum(array.size for array in parameters)
    nbytes = sum(math.prod(e.shape) * ITEM_BYTES[dtypes[name]] for name, e in tensors.items())
    # While they are quantised, the weights are there twice.
    check_free_space(out, nbytes * (2 if quantization else 1) + _SPARE_BYTES)
    with atomic_folder(out, replace=force) as folder:
        if corrects or is_cast:
            write_weights(folder / _WEIGHTS, tensors, dtypes, progress)
        else:
            _take_files(folder, weights, tensors, dtypes, progress)
        if is_falcon(config):
            write_config(folder, source, config, tokenizer, dtype)
            shutil.copyfile(falcon.__file__, folder / MODEL_FILE)
        else:
            write_network_config(folder, source, config, dtype)
        write_tokenizer(folder, tokenizer, keeps_template=not is_falcon(config))
        if quantization:
            nbytes = quantize_file(folder / _WEIGHTS, network, quantization)
        record |= {"num_parameters": num_parameters, "nbytes": nbytes}
        write_json(folder / RECORD, record)
    return ConvertedFolder(out, num_parameters, dtype, nbytes, already_there=False)


def _check_wishes(
    source: Path,
    network: NetworkConfig,
    quantized: Quantization | None,
    changes_weights: bool,
    trim_vocab: bool,
) -> None:
    """Refuse what cannot be done to a source.

    Raises:
        ModelError: it is quantised and is to be changed, or a vocabulary is to be trimmed that
            is not a Falcon-RW's.
    """
    if quantized and (changes_weights or trim_vocab):
        raise ModelError(
            f"{source} is quantised already, to {quantized.bits} bits.\n"
            "Convert the model that it was made from, or leave it as it is.",
            "dtype",
            "quantize",
            "trim_vocab",
        )
    if trim_vocab and network.model_type != "falcon":
        raise ModelError(
            f"trim_vocab is for Falcon-RW, and {source} is a {network.model_type}.\nLeave it out.",
            "trim_vocab",
        )


def _common_dtype(tensors: dict[str, TensorEntry]) -> str:
    """The dtype of most of the weights."""
    nbytes: dict[str, int] = {}
    for entry in tensors.values():
        nbytes[entry.dtype] = nbytes.get(entry.dtype, 0) + entry.nbytes
    return max(nbytes, key=nbytes.__getitem__)


def _take_files(
    folder: Path,
    weights: WeightFiles,
    tensors: dict[str, TensorEntry],
    dtypes: dict[str, str],
    progress: Progress | None,
) -> None:
    """Take weights as they are: safetensors by a hard link, where the disk has them, else copied.

    A link costs no space, and stays when the Hub's cache is emptied.
    """
    if any(path.suffix != ".safetensors" for path in weights.paths):
        write_weights(folder / _WEIGHTS, tensors, dtypes, progress)
        return
    for path in weights.paths:
        try:
            os.link(os.path.realpath(path), folder / path.name)
        except OSError:  # on another disk, or not allowed
            shutil.copyfile(path, folder / path.name)
    if weights.index is not None:
        index = weights.paths[0].parent / index_of(_WEIGHTS)
        shutil.copyfile(index, folder / index.name)


def _check_out(source: Path, out: Path) -> None:
    """Refuse to write where something is that no conversion wrote."""
    if out == source or out in source.parents:
        raise ModelError(
            f"{out} holds the source {source}.\nChoose another folder for the result.", "out"
        )
    if out.exists() and not is_empty_folder(out) and not (out / RECORD).is_file():
        raise ModelError(
            f"{out} already exists, and no conversion wrote it.\nChoose another folder.", "out"
        )
