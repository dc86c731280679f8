"""Writes the files of a converted folder: weights, configuration, tokenizer.

This package can load the folder, and so can transformers and the standard mlx-lm
commands with `--trust-remote-code`. None of them runs code that came with the source.
"""

import json
import math
from pathlib import Path
from typing import Any

from interviewmate_mlx.base.tokenizer import TOKENIZER_CLASSES, TokenizerFiles, build_backend
from interviewmate_mlx.data.templates import CHAT_TEMPLATE
from interviewmate_mlx.errors import WeightsError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.formats.cast import cast
from interviewmate_mlx.formats.json_file import read_file, read_json
from interviewmate_mlx.formats.safetensors_file import ITEM_BYTES, TensorEntry, safetensors_header

MODEL_FILE = "falcon.py"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def write_weights(
    path: Path,
    tensors: dict[str, TensorEntry],
    dtypes: dict[str, str],
    progress: Progress | None,
) -> None:
    """Copy tensors into one safetensors file, in the given order.

    Args:
        path: the file to write.
        tensors: where each tensor lies, by name.
        dtypes: of each tensor in the new file.
        progress: called with bytes done and bytes in all.

    Raises:
        WeightsError: a number is too large for its dtype, or a source file became shorter
            since its header was read.
    """
    layout = [(name, dtypes[name], entry.shape) for name, entry in tensors.items()]
    total = sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in layout)
    done = 0
    with open(path, "wb") as file:
        file.write(safetensors_header(layout, {"format": "pt"}))
        for name, entry in tensors.items():
            try:
                for chunk in entry.chunks():
                    done += file.write(cast(chunk, entry.dtype, dtypes[name]))
                    if progress:
                        progress(done, total)
            except OverflowError as error:
                raise WeightsError(
                    f"{name} in {entry.path}: {error}.\nChoose float32.", "dtype"
                ) from error


def write_config(
    folder: Path, source: Path, config: dict[str, Any], tokenizer: TokenizerFiles, dtype: str
) -> None:
    """Write `config.json` and `generation_config.json`.

    Both get the ids of the tokenizer's own special tokens. The Hub's files say that the
    end token is 2, but to the tokenizer 2 is `#`.

    Args:
        folder: the converted folder.
        source: the source folder, for its `generation_config.json`.
        config: the source's `config.json` with today's names and the converted shape.
        tokenizer: the source's.
        dtype: of the converted weights.
    """
    # auto_map would make loaders run code from the Hub.
    dropped = ("auto_map", "_name_or_path", "dtype")
    config = {key: value for key, value in config.items() if key not in dropped}
    config |= {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "torch_dtype": dtype,
        "model_file": MODEL_FILE,
    }
    path = source / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    generation.pop("_from_model_config", None)
    for settings in (config, generation):
        settings.pop("pad_token_id", None)
        for key, number in tokenizer.special_ids.items():
            if key != "unk_token":
                settings[f"{key}_id"] = number
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)


def write_network_config(folder: Path, source: Path, config: dict[str, Any], dtype: str) -> None:
    """Write the `config.json` of a network as it is, without what would run code.

    Args:
        folder: the converted folder.
        source: the source folder, for its `generation_config.json`.
        config: the source's `config.json`.
        dtype: of the converted weights.
    """
    dropped = ("auto_map", "_name_or_path", "dtype")
    config = {key: value for key, value in config.items() if key not in dropped}
    write_json(folder / "config.json", config | {"torch_dtype": dtype})
    path = source / "generation_config.json"
    if path.is_file():
        write_json(folder / path.name, read_json(path))


def write_tokenizer(folder: Path, tokenizer: TokenizerFiles, keeps_template: bool = False) -> None:
    """Write a tokenizer's files, and our chat template in both places where loaders look.

    If the source has no `tokenizer.json`, one is built.

    Args:
        folder: the converted folder.
        tokenizer: the source's.
        keeps_template: leave the chat template as it is, or absent.
    """
    for name, data in tokenizer.contents.items():
        (folder / name).write_bytes(data)
    if "tokenizer.json" not in tokenizer.contents:
        build_backend(tokenizer).save(str(folder / "tokenizer.json"))
    settings = dict(tokenizer.objects.get("tokenizer_config.json", {}))
    settings.pop("auto_map", None)
    settings |= {key: text for key, text in tokenizer.special.items() if not settings.get(key)}
    if settings.get("tokenizer_class") not in TOKENIZER_CLASSES and not keeps_template:
        settings["tokenizer_class"] = TOKENIZER_CLASSES[-1]
    write_json(folder / "tokenizer_config.json", settings)
    own = tokenizer.folder / CHAT_TEMPLATE_FILE
    if not keeps_template:
        set_chat_template(folder, CHAT_TEMPLATE)
    elif own.is_file():
        (folder / CHAT_TEMPLATE_FILE).write_bytes(read_file(own))


def set_chat_template(folder: Path, text: str) -> None:
    """Write a chat template in both places where loaders look."""
    (folder / CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    write_json(path, settings | {"chat_template": text})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(as_json(value))


def as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
