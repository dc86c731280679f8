"""The name of a base becomes a folder, and the folder a model and its tokenizer."""

import hashlib
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model

from interviewmate_mlx.data.prompts import encode
from interviewmate_mlx.errors import ModelError, brief
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model import falcon
from interviewmate_mlx.weights.convert import convert
from interviewmate_mlx.weights.hub import pull
from interviewmate_mlx.weights.json_file import read_json
from interviewmate_mlx.weights.links import refuse_links_out
from interviewmate_mlx.weights.names import is_hub_id, local_path, shipped_base
from interviewmate_mlx.weights.safetensors_file import TensorEntry, read_safetensors_header
from interviewmate_mlx.weights.source import check_depth, model_files, read_args
from interviewmate_mlx.weights.tokenizer import TOKENIZER_FILES, check_vocab, read_tokenizer

# All of them read tokenizer.json, or vocab.json and merges.txt, and nothing else. Other classes
# read pickles, or start programs.
_TOKENIZER_CLASSES = (
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
_SAMPLE_BYTES = 4096  # twice a tensor: to read all of a large model would take seconds
_SAMPLE_NUMBERS = 2048  # of a tensor
_GRID = 1024  # steps a unit


def find_base(name: str, progress: Progress | None = None) -> Path:
    """The folder of a base: `mini`, which is shipped; a folder; or a Hub id.

    A Hub id is pulled and converted once, into `models/`.

    Raises:
        ModelError: no such folder, or what was pulled cannot be converted.
        HubError: the Hub did not give it.
    """
    folder = shipped_base(name) or local_path(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not is_hub_id(name):
        raise ModelError(
            f"No model at {name}: no folder with a config.json, and no Hub id like owner/name.\n"
            "Give mini, a folder, or a Hub id such as tiiuae/falcon-rw-1b."
        )
    out = models_folder(name)
    if (out / "config.json").is_file():
        return out
    pulled = pull(name, progress=progress)
    convert(pulled.path, out, source_name=name, revision=pulled.revision, progress=progress)
    return out


def models_folder(name: str) -> Path:
    """Where a Hub id is converted to, below the current folder."""
    return Path("models") / name


def is_here(name: str) -> bool:
    """Whether a base needs no pulling."""
    return local_path(name).exists() or not is_hub_id(name) or models_folder(name).exists()


def load_base(folder: Path, dtype: mx.Dtype) -> tuple[falcon.Model, TokenizerWrapper]:
    """Load a Falcon-RW folder, quantised or not, and its tokenizer. No code of the folder is run.

    Args:
        folder: Hub layout with safetensors, as `convert` writes it.
        dtype: for the weights that are floats.

    Raises:
        ModelError: the folder is no Falcon-RW's, or its weights do not fit.
    """
    model = build_base(folder, dtype)
    read_weights(model, folder)
    return model, load_base_tokenizer(folder)


def build_base(folder: Path, dtype: mx.Dtype) -> falcon.Model:
    """The model of a folder, checked but not in memory yet: see `load_base` and `read_weights`."""
    if not list(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{folder} holds no model*.safetensors.\n"
            f"Convert it first: imate-mlx convert {folder} --out models/{folder.name}"
        )
    refuse_links_out(folder, model_files(folder), ModelError)
    _check_model_files(folder)
    try:
        model, _ = load_model(
            folder,
            lazy=True,
            # Without its model_file, which would be run, the folder is ours to build.
            model_config={"model_file": None},
            get_model_classes=lambda config: (falcon.Model, falcon.ModelArgs),
        )
        model.set_dtype(dtype)
    except Exception as error:  # whatever the libraries meet in files that do not fit
        raise _unloadable(folder, error) from error
    return model


def read_weights(model: falcon.Model, folder: Path) -> None:
    """Read the weights of a built model into memory.

    Raises:
        ModelError: a file is not as its header said.
    """
    try:
        mx.eval(model.parameters())
    except Exception as error:  # whatever the libraries meet in files that do not fit
        raise _unloadable(folder, error) from error


def load_base_tokenizer(folder: Path) -> TokenizerWrapper:
    """Load a folder's tokenizer. It stops on its own end token, whatever config.json says.

    Raises:
        ModelError: it cannot be read, or has no end token.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(
            f"{folder} holds no tokenizer.json and no vocab.json.\nConvert the model anew."
        )
    refuse_links_out(folder, model_files(folder), ModelError)
    _check_tokenizer_files(folder)
    try:
        tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
        encode(tokenizer, "Question:")  # what it was given may fail only when it is used
    except BaseException as error:  # the tokenizers library raises no narrower ones
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"Cannot load the tokenizer in {folder}: {_in_short(error)}\nConvert the model anew."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer in {folder} has no end token.\nConvert the model anew.")
    return tokenizer


def _check_model_files(folder: Path) -> None:
    """Refuse what MLX would take too long over, or read past: sizes and headers that lie."""
    config = read_json(folder / "config.json")
    args = read_args(folder, config)
    names: list[str] = []
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            names += read_safetensors_header(path)
        except OSError as error:
            raise ModelError(
                f"Cannot read {path}: {error.strerror}.\nCheck the path and who may read it."
            ) from error
    check_depth(args, names)
    packed = config.get("quantization")
    if packed is None:
        return
    sizes = [packed.get(k) for k in ("group_size", "bits")] if isinstance(packed, dict) else []
    fault = ""
    if not sizes or not all(type(size) is int and 0 < size <= 1024 for size in sizes):
        fault = f"got {brief(packed)}, expected group_size and bits, whole numbers above 0"
    elif not any(name.endswith(".scales") for name in names):
        fault = f"got {sizes[1]} bits, expected none: the weights are not quantised"
    if fault:
        raise ModelError(
            f"{folder}/config.json: quantization: {fault}.\nConvert it anew, or quantise it anew."
        )


def _check_tokenizer_files(folder: Path) -> None:
    """Refuse a tokenizer of another kind, and one whose tokens the model has no rows for."""
    config = read_json(folder / "config.json")
    files = {
        name: read_json(folder / name)
        for name in TOKENIZER_FILES
        if name.endswith(".json") and (folder / name).is_file()
    }
    for name in ("config.json", "tokenizer_config.json"):
        found = (files | {"config.json": config}).get(name, {}).get("tokenizer_class")
        if found not in (None, *_TOKENIZER_CLASSES):
            raise ModelError(
                f"{folder / name}: tokenizer_class: got {brief(found)}, "
                f"expected one of {', '.join(_TOKENIZER_CLASSES)}.\nConvert the model anew."
            )
    if "Precompiled" in json.dumps(files.get("tokenizer.json", {}).get("normalizer")):
        # The tokenizers library ends in a panic where its bytes are not what it expects.
        raise ModelError(
            f"{folder}/tokenizer.json: normalizer: got a Precompiled one, expected none.\n"
            "Use the tokenizer that the model was trained with."
        )
    check_vocab(folder, read_tokenizer(folder), config.get("vocab_size"))


def _in_short(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:500]}{'...' if len(said) > 500 else ''}"


def _unloadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"Cannot load {folder}: {_in_short(error)}\nConvert it anew, or choose another base."
    )


def hash_base(folder: Path) -> str:
    """A hash of a model's config and tokenizer, and of a sample of each of its tensors."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            data = file.tell()
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    for position in (begin, (begin + end) // 2):
                        file.seek(data + position)
                        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def hash_weights(folder: Path) -> str:
    """What tells a base's weights from another's; empty for a quantised one.

    The same in float32, bfloat16 and float16, in one file and in shards, with the vocabulary
    trimmed or not: the first numbers of each tensor, on a grid too coarse for a dtype to matter
    (to weights that were bfloat16 once) and fine enough for any training.
    """
    entries: dict[str, TensorEntry] = {}
    for path in folder.glob("model*.safetensors"):
        entries |= read_safetensors_header(path)
    if any(name.endswith(".scales") for name in entries):
        return ""
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        if entry.dtype in ("float32", "bfloat16", "float16") and name != "lm_head.weight":
            kind = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[entry.dtype]
            count = min(_SAMPLE_NUMBERS, math.prod(entry.shape))
            sample = np.fromfile(entry.path, kind, count, offset=entry.offset)
            if entry.dtype == "bfloat16":
                sample = (sample.astype(np.uint32) << 16).view(np.float32)
            steps = np.nan_to_num(sample.astype(np.float64) * _GRID)
            digest.update(name.encode() + (np.rint(steps) + 0.0).tobytes() + b".")
    return digest.hexdigest()
