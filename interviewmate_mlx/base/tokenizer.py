"""Reads a tokenizer's files, and builds the tokenizer.

`tokenizer.json` comes first. If it is missing, a byte-level BPE is built from
`vocab.json` and `merges.txt`. A class name in the files never chooses what is
loaded, so it can lead to no code and to no pickle of a model folder.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interviewmate_mlx.data.prompts import encode
from interviewmate_mlx.errors import ModelError, brief, list_faults, one_line
from interviewmate_mlx.formats.json_file import parse_json, read_file
from interviewmate_mlx.formats.model_files import TOKENIZER_FILES

# Classes of transformers that read only these files.
TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
_NEW_CLASS = "TokenizersBackend"  # the name of the last one in transformers 5
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files, each read once.

    Attributes:
        folder: the folder with the files.
        contents: bytes of the files that exist, by file name.
        objects: the JSON files, parsed, by file name.
        ids: token ids by text.
        special: text of `eos_token`, and of `bos_token`, `unk_token` and `pad_token`
            if the tokenizer has them.
    """

    folder: Path
    contents: dict[str, bytes]
    objects: dict[str, dict[str, Any]]
    ids: dict[str, int]
    special: dict[str, str]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values()) + 1

    def within(self, vocab_size: int) -> "TokenizerFiles":
        """The same without added tokens beyond the embedding.

        Some text models share the tokenizer of one that reads images, whose tokens they have no
        rows for. Unchanged if another token, or the end token, lies there: `check_vocab` refuses.
        """
        content = self.objects.get("tokenizer.json", {})
        beyond = {text for text, number in self.ids.items() if number >= vocab_size}
        added = {token["content"] for token in content.get("added_tokens", [])}
        if not beyond or not beyond <= added - set(self.special.values()):
            return self
        kept = [t for t in content["added_tokens"] if t["content"] not in beyond]
        content = {**content, "added_tokens": kept}
        return replace(
            self,
            contents={**self.contents, "tokenizer.json": json.dumps(content).encode()},
            objects={**self.objects, "tokenizer.json": content},
            ids={text: number for text, number in self.ids.items() if text not in beyond},
        )

    @property
    def special_ids(self) -> dict[str, int]:
        return {key: self.ids[text] for key, text in self.special.items()}


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read and check the files of a tokenizer.

    Raises:
        ModelError: there is no tokenizer, a file is damaged, no end token is named, or
            a special token is not in the vocabulary.
    """
    paths = [folder / name for name in TOKENIZER_FILES]
    contents = {path.name: read_file(path) for path in paths if path.is_file()}
    objects = {
        name: parse_json(folder / name, data)
        for name, data in contents.items()
        if name.endswith(".json")
    }
    try:
        ids = _token_ids(objects)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"The tokenizer's files in {folder} are damaged: {brief(error, 200)}\n"
            "Download them again."
        ) from error
    if not ids or not {"tokenizer.json", "merges.txt"} & contents.keys():
        raise ModelError(
            f"{folder} holds no tokenizer, so its true end token is unknown.\n"
            "Put tokenizer.json, or vocab.json and merges.txt, beside the weights."
        )
    special = {}
    for key in _SPECIAL_TOKENS:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            value = objects.get(name, {}).get(key)
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
    return TokenizerFiles(folder, contents, objects, ids, special)


def check_vocab(files: TokenizerFiles, vocab_size: object) -> None:
    """Refuse a tokenizer with more tokens than the embedding has rows.

    MLX would read past the end of the embedding.

    Args:
        files: the tokenizer's.
        vocab_size: the value in config.json; rows of the embedding.

    Raises:
        ModelError: there are more tokens, or `vocab_size` is not a whole number.
    """
    if not isinstance(vocab_size, int) or files.vocab_size > vocab_size:
        raise ModelError(
            f"{files.folder}: its tokenizer has {files.vocab_size} tokens, "
            f"its embedding only {brief(vocab_size)} rows (vocab_size).\n"
            "Use the tokenizer that the model was trained with."
        )


def check_tokenizer_class(files: TokenizerFiles, path: Path, settings: dict[str, Any]) -> None:
    """Refuse a `tokenizer_class` that may read its files in another way than this package.

    `tokenizer.json` describes a whole tokenizer, whatever its class is called.

    Args:
        files: the tokenizer's.
        path: the file with the settings, for messages.
        settings: its content.

    Raises:
        ModelError: the class is another one.
    """
    known = (*TOKENIZER_CLASSES, _NEW_CLASS)
    if "tokenizer.json" in files.contents:
        return
    if (found := settings.get("tokenizer_class")) not in (None, *known):
        raise ModelError(
            f"{path}: tokenizer_class: got {brief(found)}, expected one of {', '.join(known)}.\n"
            "Convert the model again."
        )


def build_tokenizer(files: TokenizerFiles) -> TokenizerWrapper:
    """Build the tokenizer that the files describe. It stops on its own end token.

    Raises:
        ModelError: the tokenizers library cannot build it, or it is of an unknown class.
    """
    settings = files.objects.get("tokenizer_config.json", {})
    check_tokenizer_class(files, files.folder / "tokenizer_config.json", settings)
    if "Precompiled" in json.dumps(files.objects.get("tokenizer.json", {}).get("normalizer")):
        # The tokenizers library panics if its bytes are damaged.
        raise ModelError(
            f"{files.folder}/tokenizer.json: normalizer: got Precompiled, expected another kind.\n"
            "Use the tokenizer that the model was trained with."
        )
    try:
        tokenizer = _wrap(build_backend(files), files.special, _chat_template(files))
        encode(tokenizer, "Question:")  # a broken tokenizer may fail only on first use
    except BaseException as error:  # a panic of the library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"Cannot load the tokenizer in {files.folder}: {type(error).__name__}: "
            f"{one_line(error)}\n"
            "Convert the model again."
        ) from error
    return tokenizer


def build_backend(files: TokenizerFiles) -> Tokenizer:
    """Build the tokenizers library's own object, with the tokens of all files.

    Raises:
        Exception: the tokenizers library cannot build it; it raises plain Exceptions.
        ValueError: a token gets another id than the files say.
    """
    if "tokenizer.json" in files.contents:
        backend = Tokenizer.from_str(files.contents["tokenizer.json"].decode())
    else:
        lines = files.contents["merges.txt"].decode().splitlines()
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in pairs]
        backend = Tokenizer(models.BPE(vocab=files.objects["vocab.json"], merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    known = backend.get_vocab()
    for text in sorted(files.ids.keys() - known.keys(), key=files.ids.__getitem__):
        backend.add_tokens([AddedToken(text, normalized=False)])
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in files.special.values():
        if text not in added or not added[text].special:
            backend.add_special_tokens([AddedToken(text, normalized=False)])
    known = backend.get_vocab()
    if wrong := [text for text, number in files.ids.items() if known[text] != number]:
        text = wrong[0]
        raise ValueError(f"token {brief(text)}: got id {known[text]}, expected {files.ids[text]}")
    return backend


class _WholeTextDetokenizer(BPEStreamingDetokenizer):
    """Keeps the space that a text begins with, as `decode` does: it may go on from another."""

    def _maybe_trim_space(self, text: str) -> str:
        return text


def _wrap(backend: Tokenizer, special: dict[str, str], chat_template: Any) -> TokenizerWrapper:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = chat_template
    is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    streaming = _WholeTextDetokenizer if is_byte_level else NaiveStreamingDetokenizer
    return TokenizerWrapper(tokenizer, streaming)


def _chat_template(files: TokenizerFiles) -> Any:
    """The chat template as transformers finds it; checked where it is used."""
    path = files.folder / "chat_template.jinja"
    if path.is_file():
        return read_file(path).decode("utf-8", "replace")
    return files.objects.get("tokenizer_config.json", {}).get("chat_template")


def _token_ids(objects: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Every token's id. If two files name a token, tokenizer.json decides."""
    ids: dict[str, Any] = dict(objects.get("added_tokens.json", {}))
    decoder = objects.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    ids |= {token["content"]: int(number) for number, token in decoder.items()}
    if "tokenizer.json" in objects:
        content = objects["tokenizer.json"]
        vocab = dict(content["model"]["vocab"])
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        for token in vocab.keys() & added.keys():
            if vocab[token] != added[token]:
                both = f"{brief(vocab[token])} and {brief(added[token])}"
                raise ValueError(f"the id of {brief(token)} is {both}")
        ids |= vocab | added
    elif "vocab.json" in objects:
        ids |= objects["vocab.json"]
    else:
        return {}
    if wrong := [token for token, number in ids.items() if type(number) is not int]:
        raise ValueError(f"the id of {brief(wrong[0])} is {brief(ids[wrong[0]])}")
    return ids
