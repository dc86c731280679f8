"""Reads a model folder in the Hub's layout: its configuration, and where its tensors lie.

No tensor is loaded and no code is run. The names in old configurations are those of
transformers' `models/falcon/convert_custom_code_checkpoint.py`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from interviewmate_mlx.errors import ModelError, WeightsError, brief, list_faults
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.formats.model_files import (
    OTHER_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    index_of,
)
from interviewmate_mlx.formats.safetensors_file import TensorEntry, read_safetensors_header
from interviewmate_mlx.formats.torch_file import read_torch_file
from interviewmate_mlx.model import falcon, zoo
from interviewmate_mlx.model.architectures import NetworkConfig

_OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}
_OLD_MODEL_TYPES = ("RefinedWebModel", "RefinedWeb")

# MLX has 32 bits for the size of an axis, and projections are up to four times as wide as this.
_MAX_DIMENSION = 1 << 24
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        paths: the files.
        index: the file name of each tensor, if the folder has an index; else None.
    """

    paths: list[Path]
    index: dict[str, str] | None


def read_args(folder: Path, config: dict[str, Any]) -> falcon.ModelArgs:
    """Read and check the network's shape in a `config.json`, with its optional keys.

    Raises:
        ModelError: it is not a Falcon-RW's, or a value is impossible. All such keys are named.
    """
    faults = []
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if type(config.get(key)) is int and config[key] > _MAX_DIMENSION:
            faults.append(f"{key}: got {brief(config[key])}, expected at most {_MAX_DIMENSION}")
    # Keys that are absent or null have defaults.
    given = {key: value for key, value in config.items() if value is not None}
    ffn = given.get("ffn_hidden_size", 1)
    if type(ffn) is not int or not 1 <= ffn <= _MAX_DIMENSION:
        faults.append(
            f"ffn_hidden_size: got {brief(ffn)}, expected a whole number from 1 to {_MAX_DIMENSION}"
        )
    epsilon = given.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        faults.append(f"layer_norm_epsilon: got {brief(epsilon)}, expected from 0 to below 1")
    faults += [
        f"{key}: got {brief(given[key])}, expected true or false"
        for key in ("bias", "tie_word_embeddings")
        if not isinstance(given.get(key, True), bool)
    ]
    try:
        if faults:
            raise ValueError("config.json is not a Falcon-RW's:\n" + list_faults(faults))
        return falcon.ModelArgs.from_dict(config)
    except ValueError as error:
        raise ModelError(
            f"{folder}: {error}\nChoose a Falcon-RW, such as tiiuae/falcon-rw-1b."
        ) from error


def read_network(folder: Path, config: dict[str, Any]) -> NetworkConfig:
    """Read and check which network a `config.json` describes.

    Raises:
        ModelError: it is none that is trained here, or a value is impossible. All such keys
            are named.
    """
    if is_falcon(config):
        return NetworkConfig("falcon", read_args(folder, config), activation="gelu")
    try:
        return zoo.read_network(config)
    except ValueError as error:
        faults = list_faults(str(error).splitlines(), max_shown=20)
        raise ModelError(
            f"{folder}/config.json describes no network that is trained here:\n{faults}\n"
            "Choose another base; docs/bases.md lists the networks."
        ) from error


def is_falcon(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is a Falcon's, by its old names or today's."""
    return config.get("model_type", "falcon") in ("falcon", *_OLD_MODEL_TYPES)


def check_depth(num_layers: int, tensors: Collection[str]) -> None:
    """Refuse a config with more layers than the weights have tensors.

    Such a config could name millions of layers, and they would be built before the
    weights are compared.

    Raises:
        WeightsError: there are more layers than tensors.
    """
    if num_layers > len(tensors):
        raise WeightsError(
            f"config.json: num_hidden_layers: got {num_layers}, expected at most "
            f"{len(tensors)}, the number of tensors in the weights.\n"
            "Correct config.json, or download the model again."
        )


def model_files(folder: Path) -> list[str]:
    """Names of the files in a model folder that are read, by this package or by a library."""
    patterns = [*OTHER_FILES, *TOKENIZER_FILES, "model*", "pytorch_model*"]
    names = [path.name for path in folder.iterdir()]
    return sorted(name for name in names if any(fnmatchcase(name, p) for p in patterns))


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`; old names become those that transformers uses today.

    Raises:
        ModelError: there is none, or an old name in it has another value than the new one.
    """
    path = folder / "config.json"
    if not path.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        hint = "It is an adapter: give its base." if is_adapter else "Give a model's folder."
        raise ModelError(f"{folder} holds no config.json.\n{hint}")
    config = read_json(path)
    if config.get("model_type") in _OLD_MODEL_TYPES:
        config["model_type"] = "falcon"
        config.setdefault("new_decoder_architecture", "n_head_kv" in config)
    faults = []
    for old, new in _OLD_NAMES.items():
        value = config.pop(old, None)
        if value is not None and config.setdefault(new, value) != value:
            faults.append(f"{old} is {brief(value)}, {new} is {brief(config[new])}")
    if faults:
        raise ModelError(f"{path} contradicts itself:\n{list_faults(faults)}\nRemove one of each.")
    return config


def find_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder. Safetensors are preferred to `pytorch_model.bin`.

    Raises:
        WeightsError: there are none, shards are missing or surplus, or the index
            names files outside the folder.
    """
    for single, shards in WEIGHTS:
        index = folder / index_of(single)
        if (folder / single).is_file():
            found = WeightFiles([folder / single], None)
        elif index.is_file():
            found = _read_index(index, shards)
        elif any(folder.glob(shards)):
            raise WeightsError(f"{folder} holds shards, but no {index.name}.\nDownload that too.")
        else:
            continue
        for path in found.paths:
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise WeightsError(f"{path} is only a Git LFS pointer.\nRun git lfs pull.")
        return found
    known = " or ".join(single for single, _ in WEIGHTS)
    raise WeightsError(
        f"{folder} holds no weights: expected {known}, or shards of one with their index.\n"
        "Download the weights into it."
    )


def _read_index(index: Path, shards: str) -> WeightFiles:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(n, str) for n in shard_of.values()):
        raise WeightsError(f"{index} has no weight_map.\nDownload it again.")
    folder = index.parent
    faults = []
    names = sorted(set(shard_of.values()))
    for name in names:
        if not fnmatchcase(name, shards) or "/" in name or "\\" in name:
            faults.append(f"{name[:80]!r}: expected a file name like {shards}")
        elif not (folder / name).is_file():
            faults.append(f"{name}: in the index, but not in the folder")
    surplus = {path.name for path in folder.glob(shards)} - set(names)
    faults += [f"{name}: in the folder, but not in the index" for name in sorted(surplus)]
    if faults:
        raise WeightsError(
            f"{index} does not fit its folder:\n{list_faults(faults)}\nDownload the model again."
        )
    return WeightFiles([folder / name for name in names], shard_of)


def read_tensors(weights: WeightFiles) -> dict[str, TensorEntry]:
    """Find where each tensor lies. Only the files' headers are read.

    Raises:
        WeightsError: a file is damaged or unsafe, or its tensors are not those of the index.
    """
    tensors: dict[str, TensorEntry] = {}
    faults = []
    for path in weights.paths:
        is_torch = path.suffix != ".safetensors"
        found = read_torch_file(path) if is_torch else read_safetensors_header(path).tensors
        for name, entry in found.items():
            if name in tensors:
                faults.append(f"{name}: in {tensors[name].path.name} and in {path.name}")
            elif weights.index is not None and weights.index.get(name) != path.name:
                expected = weights.index.get(name, "no file")
                faults.append(f"{name}: in {path.name}, but the index says {expected}")
            tensors[name] = entry
    absent = set(weights.index or ()) - set(tensors)
    faults += [f"{name}: in the index, but in no file" for name in sorted(absent)]
    if faults:
        raise WeightsError(
            f"The shards in {weights.paths[0].parent} do not fit their index:\n"
            f"{list_faults(faults)}\nDownload the model again."
        )
    return tensors
