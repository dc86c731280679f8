"""What a tokenizer's files say of its tokens. The tokenizer itself is not loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx.errors import ModelError, brief, list_faults
from interviewmate_mlx.weights.json_file import read_json

TOKENIZER_FILES = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer's files say of its tokens.

    Attributes:
        size: one more than the largest id.
        special: `eos_token`, and `bos_token`, `unk_token`, `pad_token` where it has them.
        ids: the ids of those.
    """

    size: int
    special: dict[str, str]
    ids: dict[str, int]


def read_tokenizer(folder: Path) -> Tokenizer:
    """The special tokens of a folder's tokenizer and their ids.

    Raises:
        ModelError: there is no tokenizer, it names no end token, or one that it
            does not have.
    """
    paths = [folder / name for name in TOKENIZER_FILES if name.endswith(".json")]
    files = {path.name: read_json(path) for path in paths if path.is_file()}
    try:
        ids = _token_ids(files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"The tokenizer's files in {folder} are damaged: {brief(error, 200)}\n"
            "Download them again."
        ) from error
    if not ids or not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer, so its true end token is unknown.\n"
            "Put tokenizer.json, or vocab.json and merges.txt, beside the weights."
        )
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            value = files.get(name, {}).get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                special[key] = text
    if "eos_token" not in special:
        raise ModelError(
            f"The tokenizer in {folder} names no end token.\n"
            'Add "eos_token" to its tokenizer_config.json.'
        )
    unknown = [f"{key}: {brief(text)}" for key, text in special.items() if text not in ids]
    if unknown:
        raise ModelError(
            f"The tokenizer in {folder} names tokens that it does not have:\n"
            f"{list_faults(unknown)}\nDownload tokenizer.json and tokenizer_config.json again."
        )
    return Tokenizer(
        size=max(ids.values()) + 1,
        special=special,
        ids={key: ids[text] for key, text in special.items()},
    )


def check_vocab(folder: Path, tokenizer: Tokenizer, vocab_size: Any) -> None:
    """Refuse tokens that the embedding has no row for: MLX would read past its end.

    Raises:
        ModelError: that is so.
    """
    if not isinstance(vocab_size, int) or tokenizer.size > vocab_size:
        raise ModelError(
            f"{folder}: its tokenizer has {tokenizer.size} tokens, "
            f"its embedding only {brief(vocab_size)} rows (vocab_size).\n"
            "Use the tokenizer that the model was trained with."
        )


def _token_ids(files: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Every token's id. Where two files name a token, tokenizer.json is right."""
    ids: dict[str, Any] = dict(files.get("added_tokens.json", {}))
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    ids |= {token["content"]: int(number) for number, token in decoder.items()}
    if "tokenizer.json" in files:
        whole = files["tokenizer.json"]
        vocab = dict(whole["model"]["vocab"])
        added = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        for token in vocab.keys() & added.keys():
            if vocab[token] != added[token]:
                said = f"{brief(vocab[token])} and {brief(added[token])}"
                raise ValueError(f"the id of {brief(token)} is {said}")
        ids |= vocab | added
    elif "vocab.json" in files:
        ids |= files["vocab.json"]
    else:
        return {}
    if odd := [token for token, number in ids.items() if type(number) is not int]:
        raise ValueError(f"the id of {brief(odd[0])} is {brief(ids[odd[0]])}")
    return ids
