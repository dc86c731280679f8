"""For pretrain.py: a text becomes a tokenizer and rows of text, made once and kept."""

import json
import lzma
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from interviewmate_mlx.base.converted import write_json, write_tokenizer
from interviewmate_mlx.base.tokenizer import read_tokenizer_files
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.formats.json_file import read_json

END = "<|endoftext|>"
HELD_OUT_EVERY = 100
TRAIN = "train.jsonl"


@dataclass(frozen=True)
class Text:
    """A text as rows to learn from, and those that are only for judging.

    Attributes:
        name: of its file.
        data: the folder of the rows to learn from.
        held_out: the file of the others.
        tokenizer: the folder of the tokenizer.
        num_train, num_held_out: tokens of either, the end of each document counted.
        held_out_bytes: in UTF-8.
    """

    name: str
    data: Path
    held_out: Path
    tokenizer: Path
    num_train: int
    num_held_out: int
    held_out_bytes: int


def prepare_texts(
    paths: Sequence[Path],
    vocab_size: int,
    work: Path,
    console: Console,
    start: Path | None = None,
) -> list[Text]:
    """Train the tokenizer on the first text and lay all out as rows, unless `work` has them.

    The tokenizer is that of the base `start`, if there is one.

    Of the first text every hundredth document is held out. Of the others, those are held
    out that share a paragraph with one of them. So a cut of the first text is judged on
    the cuts of its held-out documents.
    """
    tokenizer, texts = work / "tokenizer", []
    for number, path in enumerate(paths):
        data, facts = work / f"text_{number}", work / f"text_{number}.json"
        judged_by = work / f"held_out_{number}.jsonl"
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
            if not documents:
                raise TrainingError(f"{path}: all of it is held out of the first text.")
            write_rows(data / TRAIN, documents)
            write_rows(judged_by, held_out)
            load_splits(data)  # refuses what no run takes, such as a document without end
            counts = [count_tokens(tokenizer, some, console) for some in (documents, held_out)]
            size = sum(len(document.encode()) for document in held_out)
            text = Text(path.name, data, judged_by, tokenizer, *counts, held_out_bytes=size)
            write_json(facts, {k: v for k, v in asdict(text).items() if isinstance(v, int)})
        texts.append(Text(path.name, data, judged_by, tokenizer, **read_json(facts)))
    return texts


def mix(work: Path, share: float, seed: int) -> Path:
    """The data of the second stage: the second text, and of the first what makes up its share."""
    mixed, (first, second) = work / "mixed", (work / "text_0", work / "text_1")
    if not mixed.is_dir():
        rows, more = (read_rows(folder / TRAIN) for folder in (first, second))
        random.Random(seed).shuffle(rows)
        wanted = sum(map(len, more)) * (1 - share) / share
        if wanted > sum(map(len, rows)):
            raise TrainingError(
                f"--then-share {share:g}: the first text is too short to make up the rest beside "
                "the whole second one.\nChoose a larger share, or a shorter second text."
            )
        while wanted > 0:
            more.append(rows.pop())
            wanted -= len(more[-1])
        with atomic_folder(mixed) as temporary:
            write_rows(temporary / TRAIN, more)
    return mixed


def write_rows(path: Path, documents: Iterable[str]) -> None:
    with atomic_file(path) as temporary:
        lines = (json.dumps({"text": document}, ensure_ascii=False) for document in documents)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


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


def count_tokens(folder: Path, documents: list[str], console: Console) -> int:
    """Tokens of the documents, each closed by the end token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = range(0, len(documents), 100)
    shown = track(
        parts, "counting", console=console, transient=True, disable=not console.is_terminal
    )
    return len(documents) + sum(
        len(encoding) for n in shown for encoding in tokenizer.encode_batch(documents[n : n + 100])
    )
