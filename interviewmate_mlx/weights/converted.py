"""What a converted folder holds: weights, configuration, tokenizer.

It serves three: this package, the stock mlx-lm commands with
`--trust-remote-code`, and transformers. None of them runs code that came with
the source.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from interviewmate_mlx.data.prompts import CHAT_TEMPLATE
from interviewmate_mlx.errors import WeightsError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.weights.cast import cast
from interviewmate_mlx.weights.json_file import read_json
from interviewmate_mlx.weights.safetensors_file import ITEM_BYTES, TensorEntry, safetensors_header
from interviewmate_mlx.weights.tokenizer import TOKENIZER_FILES, Tokenizer

MODEL_FILE = "falcon.py"
# These read tokenizer.json, or vocab.json and merges.txt, with no code from the folder.
_TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")


def write_weights(
    path: Path, tensors: dict[str, TensorEntry], dtype: str, progress: Progress | None
) -> None:
    """Stream tensors into one safetensors file, in their order.

    Raises:
        WeightsError: a number is too large for `dtype`, or a source file became shorter.
    """
    layout = [(name, dtype, entry.shape) for name, entry in tensors.items()]
    total = sum(math.prod(shape) for _, _, shape in layout) * ITEM_BYTES[dtype]
    done = 0
    with open(path, "wb") as file:
        file.write(safetensors_header(layout, {"format": "pt"}))
        for name, entry in tensors.items():
            try:
                for chunk in entry.chunks():
                    done += file.write(cast(chunk, entry.dtype, dtype))
                    if progress:
                        progress(done, total)
            except OverflowError as error:
                raise WeightsError(
                    f"{name} in {entry.path}: {error}.\nChoose --dtype float32."
                ) from error


def write_config(
    folder: Path, source: Path, config: dict[str, Any], tokenizer: Tokenizer, dtype: str
) -> None:
    """Write `config.json` and `generation_config.json`.

    Both get the ids of the tokenizer's own special tokens: the Hub's files say
    that the end token is 2, which is `#` to the tokenizer.

    Args:
        folder: where to.
        source: the folder converted, for its `generation_config.json`.
        config: its `config.json` in today's names, of the converted shape.
        tokenizer: as `read_tokenizer` gives it.
        dtype: of the weights.
    """
    # auto_map would have loaders run code from the Hub.
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
        for key, number in tokenizer.ids.items():
            if key != "unk_token":
                settings[f"{key}_id"] = number
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(folder: Path, source: Path, tokenizer: Tokenizer) -> None:
    """Copy a tokenizer's files, and write the chat template where loaders look for it."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    settings.pop("auto_map", None)
    if settings.get("tokenizer_class") not in _TOKENIZER_CLASSES:
        is_whole = (folder / "tokenizer.json").is_file()
        settings["tokenizer_class"] = _TOKENIZER_CLASSES[2 if is_whole else 0]
    settings |= {key: text for key, text in tokenizer.special.items() if not settings.get(key)}
    settings["chat_template"] = CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(path, settings)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
