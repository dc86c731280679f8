"""Training that changes all weights of a base: what it takes, and the model that it writes."""

from collections.abc import Collection
from pathlib import Path

import mlx.core as mx

from interviewmate_mlx.adapter.card import (
    CARD_FILE,
    CHAT_PROMPT,
    VERBATIM_PROMPT,
    base_in_words,
)
from interviewmate_mlx.base.base import Base, find_origin, public_name
from interviewmate_mlx.base.converted import CHAT_TEMPLATE_FILE, MODEL_FILE, as_json
from interviewmate_mlx.data.templates import VERBATIM, Template
from interviewmate_mlx.errors import ModelError, list_faults
from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.formats.json_file import read_file, read_json
from interviewmate_mlx.formats.model_files import TOKENIZER_FILES
from interviewmate_mlx.formats.safetensors_file import save_tensors
from interviewmate_mlx.hub.names import is_hub_id
from interviewmate_mlx.model import falcon
from interviewmate_mlx.model.zoo import Network

WEIGHTS_FILE = "model.safetensors"
# Of a base's config.json: code to run, where it lay, and the newer name of torch_dtype.
_NOT_KEPT = ("auto_map", "_name_or_path", "dtype")


def check_whole(base: Base, model: Network) -> None:
    """Refuse a base whose weights cannot all be trained, or not be written as they came.

    Args:
        base: opened.
        model: its network; its weights need not be in memory.

    Raises:
        ModelError: it is quantised, or mlx-lm's network has tensors otherwise than its files.
    """
    if base.quantization:
        raise ModelError(
            f"train.weights: got all, and {base.name} is quantised, to {base.quantization.bits} "
            "bits: such weights take no small steps.\n"
            "Choose the base that it was made from, or train.weights lora."
        )
    if faults := base.stored_otherwise(model):
        raise ModelError(
            f"train.weights: got all, and mlx-lm's network does not have these tensors as the "
            f"files of {base.name} have them, so transformers could not load them again:\n"
            f"{list_faults(faults)}\nChoose another base, or train.weights lora."
        )


def write_model(
    folder: Path, base: Base, weights: dict[str, mx.array], chat_template: str = ""
) -> None:
    """Write a trained model as `convert` does: for this package, mlx-lm and transformers.

    Args:
        folder: created if it does not exist; other files in it are kept. Each file appears whole
            or not at all.
        base: that the training began with; its tokenizer is the model's.
        weights: by parameter path, in the model's order, all of one dtype.
        chat_template: Jinja, in place of the base's own; "" keeps that.

    Raises:
        StorageError: they cannot be written.
    """
    # The weights come first, because a folder with a config counts as a model.
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        save_tensors(temporary, weights, {"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("mlx.core.")
    for name, content in _small_files(base, dtype, chat_template).items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(content)


def _small_files(base: Base, dtype: str, chat_template: str) -> dict[str, bytes]:
    """All files of a model but its weights, by name; `config.json` comes last."""
    names = (*TOKENIZER_FILES, CHAT_TEMPLATE_FILE, "generation_config.json")
    files = {
        name: read_file(base.folder / name) for name in names if (base.folder / name).is_file()
    }
    if chat_template:  # in both places where loaders look
        files[CHAT_TEMPLATE_FILE] = chat_template.encode()
        path = base.folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        files[path.name] = as_json(settings | {"chat_template": chat_template})
    config = read_json(base.folder / "config.json")
    config = {key: value for key, value in config.items() if key not in _NOT_KEPT}
    if isinstance(base.network.args, falcon.ModelArgs):
        config["model_file"] = MODEL_FILE  # for mlx-lm
        files[MODEL_FILE] = Path(falcon.__file__).read_bytes()
    return files | {"config.json": as_json(config | {"torch_dtype": dtype})}


def write_model_card(
    folder: Path,
    name: str,
    base: str,
    facts: dict[str, str],
    trained_on: str,
    template: Template,
    end_ids: Collection[int] = (),
) -> None:
    """Write the card of a trained model.

    Args:
        folder: the model's.
        name: of the run that trained it.
        base: its name, as the user gave it.
        facts: rows of the card's table.
        trained_on: a sentence about the training data.
        template: how the model is asked.
        end_ids: the tokens that end an answer, if the tokenizer's own is not the only one.

    Raises:
        StorageError: it cannot be written.
    """
    origin, called = find_origin(base), public_name(base)
    header = f"license: {origin.licence}\n" if origin.licence else ""
    header += f"base_model: {called}\n" if is_hub_id(called) else ""
    ends = str(sorted(end_ids)) if end_ids else "tokenizer.eos_token_id"
    # The folder's own tokenizer has the template.
    prompt = VERBATIM_PROMPT if template == VERBATIM else CHAT_PROMPT
    text = f"""---
{header}tags: [mlx, interviewmate]
---

# {name}: all weights of {called}, trained

{trained_on} `run.toml` in this folder repeats the run.

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in facts.items())}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_ID_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_HUB_ID_OF_THIS_FOLDER")
{prompt}
answer = model.generate(**prompt, max_new_tokens=200, eos_token_id={ends})
print(tokenizer.decode(answer[0]))
```

## Base

{base_in_words(called if is_hub_id(called) else Path(called).name, origin)}

This is a small model. It can be wrong and still sound sure. Check its answers before an interview.
"""
    with atomic_file(folder / CARD_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
