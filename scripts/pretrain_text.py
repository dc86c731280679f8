"""For pretrain.py: a text becomes a tokenizer and token ids, made once and kept."""

import lzma
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from interviewmate_mlx.base.converted import write_json, write_tokenizer
from interviewmate_mlx.base.tokenizer import read_tokenizer_files
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.formats.json_file import read_json

END = "<|endoftext|>"
HELD_OUT_EVERY = 100


@dataclass(frozen=True)
class Text:
    """Token ids of a text.

    Attributes:
        name: of its file.
        train: (N,) uint16; each document ends in `end_id`.
        held_out: likewise, of the documents that are only for judging.
        held_out_bytes: of those documents in UTF-8.
        end_id: of `<|endoftext|>`.
        tokenizer: its folder.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int
    end_id: int
    tokenizer: Path


def prepare_texts(
    paths: Sequence[Path],
    vocab_size: int,
    work: Path,
    console: Console,
    start: Path | None = None,
) -> list[Text]:
    """Train the tokenizer on the first text and encode all, unless `work` has them already.

    The tokenizer is that of the base `start`, if there is one.

    Of the first text every hundredth document is held out. Of the others, those are held
    out that share a paragraph with one of them. So a cut of the first text is judged on
    the cuts of its held-out documents.
    """
    tokenizer, texts = work / "tokenizer", []
    for number, path in enumerate(paths):
        files = [work / f"train_{number}.npy", work / f"held_out_{number}.npy"]
        facts = work / f"text_{number}.json"
        if not facts.is_file():  # written last
            documents = read_documents(path)
            if number == 0:
                held_out = documents[::HELD_OUT_EVERY]
                del documents[::HELD_OUT_EVERY]
                if start:
                    with atomic_folder(tokenizer, replace=True) as temporary:
                        write_tokenizer(temporary, read_tokenizer_files(start))
                else:
                    train_tokenizer(documents, vocab_size, tokenizer)
            else:
                judged = read_documents(paths[0])[::HELD_OUT_EVERY]
                known = set().union(*map(paragraphs, judged))
                held_out = [d for d in documents if not known.isdisjoint(paragraphs(d))]
                documents = [d for d in documents if known.isdisjoint(paragraphs(d))]
            console.print(
                f"{path.name}: {len(documents):,} documents to learn from, "
                f"{len(held_out):,} held out"
            )
            for file, some in zip(files, (documents, held_out), strict=True):
                with atomic_file(file) as temporary:
                    np.save(temporary, encode(tokenizer, some, console))
            write_json(facts, {"held_out_bytes": sum(len(t.encode()) for t in held_out)})
        train, valid = map(np.load, files)
        end_id = int(train[-1])
        texts.append(
            Text(path.name, train, valid, **read_json(facts), end_id=end_id, tokenizer=tokenizer)
        )
    return texts


def paragraphs(document: str) -> set[str]:
    """What stands between empty lines."""
    return {paragraph.strip() for paragraph in document.split("\n\n")}


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
