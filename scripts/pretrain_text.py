"""For pretrain.py: a text becomes a tokenizer and token ids, made once and kept."""

import lzma
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.weights.converted import write_json
from interviewmate_mlx.weights.json_file import read_json

END = "<|endoftext|>"
HELD_OUT_EVERY = 100


@dataclass(frozen=True)
class Text:
    """Token ids of a text.

    Attributes:
        train: (N,) uint16; each document ends in `end_id`.
        held_out: likewise, of the documents that are only for judging.
        held_out_bytes: of those documents in UTF-8.
        end_id: of `<|endoftext|>`.
        tokenizer: its folder.
    """

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int
    end_id: int
    tokenizer: Path


def prepare_text(path: Path, vocab_size: int, work: Path, console: Console) -> Text:
    """Train the tokenizer and encode the text, unless an earlier run has left both in `work`."""
    folder, files = work / "tokenizer", [work / "train.npy", work / "held_out.npy"]
    if not (work / "text.json").is_file():  # written last
        documents = read_documents(path)
        held_out = documents[::HELD_OUT_EVERY]
        del documents[::HELD_OUT_EVERY]
        console.print(f"{len(documents):,} documents to learn from, {len(held_out):,} held out")
        train_tokenizer(documents, vocab_size, folder)
        for name, texts in zip(files, (documents, held_out), strict=True):
            with atomic_file(name) as temporary:
                np.save(temporary, encode(folder, texts, console))
        write_json(work / "text.json", {"held_out_bytes": sum(len(t.encode()) for t in held_out)})
    train, valid = map(np.load, files)
    return Text(
        train, valid, **read_json(work / "text.json"), end_id=int(train[-1]), tokenizer=folder
    )


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, plain or .xz, without the end tokens between them."""
    open_text = lzma.open if path.suffix == ".xz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        pieces = file.read().split(END)
    documents = [piece.strip("\n") for piece in pieces if piece.strip()]
    if len(documents) < 2:
        raise TrainingError(
            f"{path} holds {len(documents)} documents, expected two or more, {END} between them.\n"
            "One of a hundred is held out, the first one among them."
        )
    return documents


def train_tokenizer(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE in GPT-2's manner; its last id is the end token, the only special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise TrainingError(
            f"The text yields {size} tokens, expected {vocab_size}.\n"
            "Give more text, or choose another --vocab."
        )
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    with atomic_folder(folder, replace=True) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        write_json(temporary / "special_tokens_map.json", special)
        write_json(
            temporary / "tokenizer_config.json", settings | special | {"model_max_length": 2048}
        )


def encode(folder: Path, documents: list[str], console: Console) -> np.ndarray:
    """Ids of the documents one after the other, each closed by the end token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end, parts = [tokenizer.token_to_id(END)], []
    with progress_bar(console) as bar:
        for start in bar.track(range(0, len(documents), 100), description="encoding"):
            for encoding in tokenizer.encode_batch(documents[start : start + 100]):
                parts += [np.array(encoding.ids, np.uint16), np.array(end, np.uint16)]
    return np.concatenate(parts)


def progress_bar(console: Console) -> Progress:
    """A bar with its time so far and the time left, on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
