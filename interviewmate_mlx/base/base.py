"""The base: a model folder, opened and checked once."""

import hashlib
import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from interviewmate_mlx.adapter.card import Origin
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.fit import put_weights
from interviewmate_mlx.base.quantization import Quantization, read_quantization
from interviewmate_mlx.base.record import origin_of, source_of
from interviewmate_mlx.base.source import check_depth, model_files, read_network
from interviewmate_mlx.base.tokenizer import (
    build_tokenizer,
    check_tokenizer_class,
    check_vocab,
    read_tokenizer_files,
)
from interviewmate_mlx.errors import ConfigError, ModelError, WeightsError, one_line
from interviewmate_mlx.files import Progress
from interviewmate_mlx.formats.cast import FLOAT_DTYPES, cast
from interviewmate_mlx.formats.json_file import parse_json, read_file
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.formats.safetensors_file import (
    ITEM_BYTES,
    SafetensorsHeader,
    load_tensors,
    read_safetensors_header,
)
from interviewmate_mlx.formats.samples import add_samples
from interviewmate_mlx.hub.names import fetch_model, is_hub_id, is_path, local_path, shipped_base
from interviewmate_mlx.model.architectures import NetworkConfig
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import build_network

_SAMPLE_NUMBERS = 2048  # of each tensor
_GRID_STEPS = 1024  # per unit: weights are rounded to 1/1024


@dataclass(frozen=True)
class Base:
    """A model folder and its tokenizer, opened and checked. `Base.open` creates one.

    No code in the folder is run. After `open`, only the weight files are read again.

    Attributes:
        name: as the user gave it: `mini`, a path, or a Hub id.
        folder: the model folder.
        network: which network it is, and its shape.
        quantization: how its weights are quantised; None if they are not.
        headers: headers of the weight files, by path.
        tokenizer: stops on its own end token, whatever config.json says.
        small_files: a sha256 of `config.json` and `tokenizer.json`, to be continued.
        weights: by path, if they are in memory already; see `in_memory`.
    """

    name: str
    folder: Path
    network: NetworkConfig
    quantization: Quantization | None
    headers: dict[Path, SafetensorsHeader]
    tokenizer: TokenizerWrapper
    small_files: "hashlib._Hash"
    weights: dict[str, mx.array] | None = None

    @classmethod
    def open(cls, name: str | Path, progress: Progress | None = None) -> "Base":
        """Open a base by its name: `mini`, a folder, or a Hub id.

        A Hub id is pulled and converted once, into `models/`.

        Args:
            name: `mini`, a folder, or a Hub id.
            progress: called with bytes done and bytes in all during pull and conversion.

        Raises:
            ModelError: there is no such folder, it holds no network that can be trained
                here, or its files do not fit together.
            ConfigError, HubError, StorageError: as for `fetch_base`.
        """
        name = str(name)
        folder = fetch_base(name, progress)
        refuse_outside_links(folder, model_files(folder), ModelError)
        paths = sorted(folder.glob("model*.safetensors"))
        if not paths:
            raise ModelError(
                f"{folder} holds no model*.safetensors: it has not been converted.\n"
                "Convert it first, into another folder."
            )
        path = folder / "config.json"
        config_bytes = read_file(path)
        config = parse_json(path, config_bytes)
        network = read_network(folder, config)
        headers = {path: read_safetensors_header(path) for path in paths}
        names = [name for header in headers.values() for name in header.tensors]
        check_depth(network.num_layers, names)
        quantization = read_quantization(folder, config, names)
        files = read_tokenizer_files(folder)
        check_tokenizer_class(files, folder / "config.json", config)
        fitting = files.within(network.vocab_size)
        check_vocab(fitting, network.vocab_size)
        tokenizer = build_tokenizer(fitting)
        small_files = hashlib.sha256(config_bytes + files.contents.get("tokenizer.json", b""))
        return cls(name, folder, network, quantization, headers, tokenizer, small_files)

    @property
    def tensor_names(self) -> set[str]:
        """The names of the tensors in its files."""
        return {name for header in self.headers.values() for name in header.tensors}

    def build(self, dtype: mx.Dtype) -> Any:
        """Build the `Network`. Its weights are not in memory yet; `read` loads them.

        Args:
            dtype: of the float weights.

        Raises:
            ModelError: mlx-lm cannot build the network that config.json describes.
            WeightsError: the tensors do not fit the network.
        """
        try:
            model = build_network(self.network)
        except ValueError as error:
            raise ModelError(f"{self.folder}: {error}\nChoose another base.") from error
        weights = dict(self.weights or {})
        for path in self.headers if self.weights is None else ():
            weights |= self._load(path)
        try:
            put_weights(model, weights, self.quantization, are_own=self.weights is not None)
        except Exception as error:  # of any kind, from mlx-lm's `sanitize`
            raise self._as_weights_error(error) from error
        model.set_dtype(dtype)
        model.eval()
        return model

    def stored_otherwise(self, model: nn.Module) -> list[str]:
        """The parameters of a built network that are no tensors of the files as they lie there.

        Some of mlx-lm's networks rename tensors, stack them or change their numbers.
        """
        stored: dict[str, mx.array] = {}
        for path in self.headers:
            stored |= self._load(path)
        taken = model.sanitize(dict(stored)) if hasattr(model, "sanitize") else stored
        names = named_arrays(model.parameters())
        return [n for n in names if n not in stored or taken.get(n) is not stored[n]]

    def read(self, model: nn.Module) -> None:
        """Load the weights of a built network into memory.

        Raises:
            WeightsError: a file does not match its header.
        """
        try:
            mx.eval(model.parameters())
        except (RuntimeError, ValueError) as error:
            raise self._as_weights_error(error) from error

    def in_memory(self, dtype: mx.Dtype) -> "Base":
        """The same base, whose networks share one set of weights, which is read here.

        Args:
            dtype: of the float weights.

        Raises:
            WeightsError: as for `build` and `read`.
        """
        return replace(self, weights=named_arrays(self.load(dtype).parameters()))

    def load(self, dtype: mx.Dtype) -> Any:
        """Build the network and load its weights into memory: `build`, then `read`."""
        model = self.build(dtype)
        self.read(model)
        return model

    @cached_property
    def fingerprint(self) -> str:
        """A hash that detects changes: of config, tokenizer, and a sample of each tensor."""
        digest = self.small_files.copy()
        for path, header in self.headers.items():
            add_samples(digest, path, header.text, header.tensors.values())
        return str(digest.hexdigest())

    @cached_property
    def weights_hash(self) -> str:
        """A hash that tells whether two bases have the same weights.

        It is the same in float32, bfloat16 and float16, in one file or in shards, with a
        trimmed vocabulary or not. It covers the first numbers of each tensor, rounded to a
        grid. The grid is so coarse that the dtype does not matter (if the weights were
        bfloat16 once), and so fine that any training shows. Of quantised weights it tells only
        from others that are quantised alike; it begins with how.
        """
        digest = hashlib.sha256()
        tensors = [item for header in self.headers.values() for item in header.tensors.items()]
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in self.headers}
            for name, entry in sorted(tensors, key=lambda item: item[0]):
                is_packed = entry.dtype == "uint32"
                if (is_packed or entry.dtype in FLOAT_DTYPES) and name != "lm_head.weight":
                    count = min(_SAMPLE_NUMBERS, math.prod(entry.shape))
                    files[entry.path].seek(entry.offset)
                    data = files[entry.path].read(count * ITEM_BYTES[entry.dtype])
                    if is_packed:
                        digest.update(name.encode() + data + b".")
                        continue
                    sample = np.frombuffer(cast(memoryview(data), entry.dtype, "float32"), "<f4")
                    steps = np.nan_to_num(sample.astype(np.float64) * _GRID_STEPS)
                    digest.update(name.encode() + (np.rint(steps) + 0.0).tobytes() + b".")
        kind = f"{self.quantization.bits} bits:" if self.quantization else ""
        return kind + digest.hexdigest()

    def _load(self, path: Path) -> dict[str, mx.array]:
        try:
            return load_tensors(path)
        except (RuntimeError, ValueError) as error:
            raise self._as_weights_error(error) from error

    def _as_weights_error(self, error: Exception) -> WeightsError:
        return WeightsError(
            f"Cannot load {self.folder}: {type(error).__name__}: {one_line(error)}\n"
            "Convert it again, or choose another base."
        )


def fetch_base(name: str | Path, progress: Progress | None = None) -> Path:
    """The folder of a base, by its name. A Hub id is pulled and converted once, into `models/`.

    Raises:
        ModelError: there is no such folder, it holds no model, or the pulled model cannot
            be converted.
        ConfigError, HubError: as for `fetch_model`.
        StorageError: the disk is too small, or cannot be written to.
    """
    name = str(name)
    out = models_folder(name)
    if _is_only_on_hub(name):
        if not (out / "config.json").is_file():
            pulled = fetch_model(name, progress=progress)
            convert(pulled.path, out, source_name=name, revision=pulled.revision, progress=progress)
        return out
    folder = fetch_model(name).path
    if not (folder / "config.json").is_file():
        hint = "Give mini, a model's folder, or a Hub id such as tiiuae/falcon-rw-1b."
        if (folder / "adapter_config.json").is_file():
            hint = "It is an adapter: give its base."
        raise ModelError(f"No model at {name}: it holds no config.json.\n{hint}")
    return folder


def models_folder(name: str) -> Path:
    """Where a Hub id is converted to, relative to the current folder."""
    return Path("models") / name


def public_name(name: str) -> str:
    """The name that others have for a base: what a converted folder was made from.

    Returns:
        A Hub id or `mini`; `name` itself if no record here knows of one.
    """
    if not is_path(name):
        return name
    source = source_of(local_path(name))
    return source if shipped_base(source) or is_hub_id(source) else name


def find_origin(name: str) -> Origin:
    """Where a base comes from, as far as can be said without pulling it."""
    with suppress(ConfigError, ModelError):  # a path of another machine
        if name and is_here(name):
            return origin_of(fetch_base(name))
    return Origin(name)


def is_here(name: str) -> bool:
    """Whether a base can be opened without pulling it."""
    return not _is_only_on_hub(name) or (models_folder(name) / "config.json").is_file()


def _is_only_on_hub(name: str) -> bool:
    return not (shipped_base(name) or local_path(name).exists()) and is_hub_id(name)
