"""Pretrain a small Falcon-RW on a text: the tokenizer, the model, a folder as the Hub has it.

    python scripts/pretrain.py text.txt.xz --out models/small --tokens 40e6

This made `mini`, the base inside the package. The text is UTF-8, plain or .xz, its
documents apart by `<|endoftext|>`; every hundredth is held out. What is not finished
lies in OUT.work: Ctrl-C saves there, and --resume goes on as if nothing had happened.
"""

import argparse
import hashlib
import lzma
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate
from mlx_lm.sample_utils import make_sampler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from interviewmate_mlx.data.packing import collate_rows, packed_rows, rows_in_order
from interviewmate_mlx.errors import InterviewMateError, TrainingError
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.training.checkpoint import (
    State,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from interviewmate_mlx.training.optimizer import Muon, learning_rate_at
from interviewmate_mlx.training.step import compile_loss, compile_step
from interviewmate_mlx.weights.base import load_base
from interviewmate_mlx.weights.converted import write_json, write_tokenizer
from interviewmate_mlx.weights.source import read_json, read_tokenizer

END = "<|endoftext|>"
HELD_OUT_EVERY = 100
PROMPTS = (
    "Gradient descent is",
    "The validation set is used to",
    "In order to avoid overfitting,",
    "A transformer is a neural network that",
)


def options() -> argparse.ArgumentParser:
    """The command line. All but `text`, `out`, `resume` and the two below it make the model."""
    parser = argparse.ArgumentParser(
        description="Pretrain a small Falcon-RW on a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text", type=Path, help="documents apart by <|endoftext|>; .xz or plain")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on in OUT.work")
    parser.add_argument(
        "--sources", type=Path, help="Markdown for the card: where the text is from"
    )
    parser.add_argument("--save-minutes", type=float, default=5, help="between checkpoints")
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=40_000_000)
    parser.add_argument("--vocab", type=int, default=6144, help="tokens of the tokenizer")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--microbatch", type=int, default=8, help="rows at once: memory and speed")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak; linear to 0")
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(words: list[str] | None = None) -> int:
    args = options().parse_args(words)
    wanted = Stop()
    try:
        pretrain(args, Console(stderr=True, soft_wrap=True), wanted)
    except InterviewMateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 130 if wanted.signals else 0


class Stop:
    """True once Ctrl-C or SIGTERM asked to stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        if self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)

    def __call__(self) -> bool:
        return bool(self.signals)


def pretrain(args: argparse.Namespace, console: Console, stop: Callable[[], bool]) -> None:
    """The whole way from the text to the folder, or to a checkpoint when `stop` says so."""
    backend.prepare()
    work = args.out.with_name(f"{args.out.name}.work")
    begin(args, work)
    tokens, held_out = prepare_tokens(args, work, console)
    model = build_model(args)
    num_parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    console.print(f"{num_parameters:,} parameters, {len(tokens):,} tokens to learn from")
    with backend.memory_limits():
        state = train(args, work, model, tokens, held_out, console, stop)
        if state.step < total_steps(args):
            console.print(f"stopped after step {state.step}; go on with --resume")
            return
        write_folder(args, work, model, tokens, held_out)
    console.print(f"{args.out} is written; {work} can be removed")


def begin(args: argparse.Namespace, work: Path) -> None:
    """Keep the recipe in the work folder, or hold a resumed run to the one it began with."""
    apart = ("text", "out", "resume", "sources", "save_minutes", "microbatch")
    recipe = {name: value for name, value in vars(args).items() if name not in apart}
    recipe["text_sha256"] = hashlib.sha256(args.text.read_bytes()).hexdigest()
    if args.out.exists():
        raise TrainingError(f"{args.out} is there already.\nRemove it, or choose another --out.")
    if checkpoints(work) and not args.resume:
        raise TrainingError(f"{work} holds a run.\nGo on with --resume, or remove it.")
    path = work / "recipe.json"
    began = read_json(path) if path.is_file() else recipe
    if changed := [name for name, value in recipe.items() if began[name] != value]:
        raise TrainingError(
            f"{work} began with other values of: {', '.join(changed)}.\n"
            "Give the same, or remove that folder."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def prepare_tokens(
    args: argparse.Namespace, work: Path, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """The text as uint16 ids to learn from and held out; made once."""
    path, files = work / "tokenizer" / "tokenizer.json", [work / "train.npy", work / "valid.npy"]
    if not all(file.is_file() for file in (path, *files)):
        open_text = lzma.open if args.text.suffix == ".xz" else open
        with open_text(args.text, "rt", encoding="utf-8") as file:
            pieces = file.read().split(END)
        documents = [document.strip("\n") for document in pieces if document.strip()]
        held_out = documents[::HELD_OUT_EVERY]
        del documents[::HELD_OUT_EVERY]
        console.print(f"{len(documents):,} documents to learn from, {len(held_out):,} held out")
        train_tokenizer(documents, args.vocab, path.parent)
        tokenizer = Tokenizer.from_file(str(path))
        for name, texts in zip(files, (documents, held_out), strict=True):
            with atomic_file(name) as temporary:
                np.save(temporary, encode(tokenizer, texts, console))
        write_json(work / "held_out.json", {"bytes": sum(len(t.encode()) for t in held_out)})
    return np.load(files[0]), np.load(files[1])


def train_tokenizer(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE as GPT-2 has it; the last id is the only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    if tokenizer.get_vocab_size() != vocab_size:
        raise TrainingError(
            f"The text yields {tokenizer.get_vocab_size()} tokens, expected {vocab_size}.\n"
            "Give more text, or a smaller --vocab."
        )
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
    folder.mkdir(exist_ok=True)
    write_json(folder / "tokenizer_config.json", settings | {"model_max_length": 2048})
    write_json(folder / "special_tokens_map.json", special)
    tokenizer.save(str(folder / "tokenizer.json"))


def encode(tokenizer: Tokenizer, documents: list[str], console: Console) -> np.ndarray:
    """Ids of the documents one after the other, each closed by the end token."""
    end, parts = np.array([tokenizer.token_to_id(END)]), []
    with progress_bar(console) as bar:
        for start in bar.track(range(0, len(documents), 100), description="encoding"):
            for encoding in tokenizer.encode_batch(documents[start : start + 100]):
                parts += [encoding.ids, end]
    return np.concatenate(parts).astype(np.uint16)


def progress_bar(console: Console) -> Progress:
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


def config(args: argparse.Namespace, end_id: int) -> dict[str, Any]:
    """config.json, with the keys that tell a Falcon-RW from the other Falcons."""
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "alibi": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "bias": True,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "hidden_dropout": 0.0,
        "hidden_size": args.hidden,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "multi_query": False,
        "new_decoder_architecture": False,
        "num_attention_heads": args.heads,
        "num_hidden_layers": args.layers,
        "parallel_attn": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": args.vocab,
    }


def build_model(args: argparse.Namespace) -> Model:
    """A Falcon-RW in float32 with GPT-2's start: what adds to the residual begins smaller."""
    mx.random.seed(args.seed)
    model = Model(ModelArgs.from_dict(config(args, args.vocab - 1)))
    start = {}
    for name, array in tree_flatten(model.parameters()):
        if array.ndim == 2:
            adds = name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight"))
            scale = 0.02 / math.sqrt(2 * args.layers) if adds else 0.02
            start[name] = scale * mx.random.normal(array.shape)
        elif name.endswith("bias"):
            start[name] = mx.zeros_like(array)
    model.load_weights(list(start.items()), strict=False)
    mx.eval(model.parameters())
    # Kernels that are faster than MLX's own would be switched on here.
    return model


def total_steps(args: argparse.Namespace) -> int:
    return math.ceil(args.tokens / (args.rows * args.width))


def train(
    args: argparse.Namespace,
    work: Path,
    model: Model,
    tokens: np.ndarray,
    held_out: np.ndarray,
    console: Console,
    stop: Callable[[], bool],
) -> State:
    """Train to the last step or until `stop`, from the newest checkpoint if there is one."""
    optimizer = Muon(args.vocab, args.weight_decay)
    add_microbatch, update = compile_step(model, optimizer, args.max_grad_norm)
    compiled_loss = compile_loss(model)
    state = restore(work, model, optimizer) if args.resume and checkpoints(work) else State()
    rows = packed_rows(tokens, args.vocab - 1, args.width, args.seed, state.step * args.rows)
    sample = rows_in_order(held_out, args.vocab - 1, args.width)[:64]
    last, first, saved = total_steps(args), state.step, time.monotonic()
    clock = saved
    with progress_bar(console) as bar:
        task = bar.add_task("", total=last, completed=first)
        while state.step < last and not stop():
            for group in split(list(islice(rows, args.rows)), args.microbatch):
                mx.eval(add_microbatch(*collate_rows(group).arrays()))
            rate = learning_rate_at(state.step, last, args.learning_rate, "linear", args.warmup)
            numbers = update(mx.array(rate))
            mx.eval(numbers, model.trainable_parameters(), optimizer.state)
            check_finite(numbers, state, work)
            state.step += 1
            now = time.monotonic()
            line = progress_line(args, state.step, first, now - clock, numbers["loss"].item(), rate)
            bar.update(task, completed=state.step, description=line)
            if not console.is_terminal and state.step % 20 == 0:
                console.print(line)
            if state.step == last or stop() or now - saved > 60 * args.save_minutes:
                save(work, state, model, optimizer)
                loss, _ = evaluate(compiled_loss, sample, args.microbatch)
                console.print(f"step {state.step}/{last}  saved; held-out sample {loss:.4f}")
                saved = time.monotonic()
    return state


def split(rows: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def check_finite(numbers: dict[str, mx.array], state: State, work: Path) -> None:
    if not numbers["is_finite"].item():
        raise TrainingError(
            f"Step {state.step + 1}: the loss or a gradient is not finite.\n"
            f"Remove {work}/checkpoints and train with a lower --learning-rate."
        )


def progress_line(
    args: argparse.Namespace, step: int, first: int, elapsed_s: float, loss: float, rate: float
) -> str:
    """Step, loss and speed, and the time that the steps left will take at this speed."""
    tokens_per_s = (step - first) * args.rows * args.width / elapsed_s
    left_s = (total_steps(args) - step) * args.rows * args.width / tokens_per_s
    left = f"{left_s // 3600:.0f}:{left_s % 3600 // 60:02.0f} h left"
    where = f"step {step}/{total_steps(args)}  loss {loss:.3f}  lr {rate:.1e}"
    return f"{where}  {tokens_per_s:.0f} tokens/s  {left}"


def save(work: Path, state: State, model: Model, optimizer: Muon) -> None:
    weights = dict(tree_flatten(model.parameters()))
    moments = dict(tree_flatten(optimizer.state))
    # The groups bear the names of a LoRA run's: here all weights are what is trained.
    save_checkpoint(work, state, {"adapter": weights, "optimizer": moments})


def restore(work: Path, model: Model, optimizer: Muon) -> State:
    """Put the newest checkpoint into model and optimizer, in place."""
    state, tensors = load_checkpoint(checkpoints(work)[-1])
    model.load_weights(list(tensors["adapter"].items()))
    moments = tensors["optimizer"]
    optimizer.state.update(tree_map_with_path(lambda name, _: moments[name], optimizer.state))
    return state


def evaluate(
    compiled_loss: Callable[..., Any], rows: list[np.ndarray], microbatch: int
) -> tuple[float, float]:
    """Mean loss a token, and its sum, in nats."""
    loss_sum, num_tokens = 0.0, 0
    for _, same_width in groupby(rows, key=len):  # the last row is shorter
        for group in split(list(same_width), microbatch):
            loss, tokens = compiled_loss(*collate_rows(group).arrays())
            loss_sum, num_tokens = loss_sum + loss.item(), num_tokens + tokens.item()
    return loss_sum / num_tokens, loss_sum


def write_folder(
    args: argparse.Namespace, work: Path, model: Model, tokens: np.ndarray, held_out: np.ndarray
) -> None:
    """The folder as the Hub would have it. Its numbers are those of the weights it holds."""
    settings = config(args, args.vocab - 1)
    weights = {name: w.astype(mx.bfloat16) for name, w in tree_flatten(model.parameters())}
    with atomic_folder(args.out) as folder:
        write_tokenizer(folder, work / "tokenizer", read_tokenizer(work / "tokenizer"))
        write_json(folder / "config.json", settings)
        ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", ids)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
        written, tokenizer = load_base(folder, mx.float32)
        rows = rows_in_order(held_out, args.vocab - 1, args.width)
        mean, total = evaluate(compile_loss(written), rows, args.microbatch)
        num_bytes = read_json(work / "held_out.json")["bytes"]
        figures = {
            "held-out loss": f"{mean:.4f} nats a token",
            "held-out perplexity": f"{math.exp(mean):.2f}",
            "bits per byte": f"{total / math.log(2) / num_bytes:.4f}",
        }
        card = model_card(args, written, tokenizer, len(tokens), len(held_out), figures)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """What `sha256sum -c SHA256SUMS` reads."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def model_card(
    args: argparse.Namespace,
    model: Model,
    tokenizer: Any,
    num_tokens: int,
    num_held_out: int,
    figures: dict[str, str],
) -> str:
    """README.md: what the model is, how it was made, how good it is, and what it is not."""
    num_parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    seen = total_steps(args) * args.rows * args.width
    facts = {
        "parameters": f"{num_parameters:,}, the tied head counted once; stored in bfloat16",
        "shape": f"{args.layers} layers, hidden size {args.hidden}, {args.heads} heads of "
        f"{args.hidden // args.heads}, {args.vocab} tokens",
        "text": f"{num_tokens:,} tokens, a hundredth of the documents ({num_held_out:,} tokens) "
        "held out",
        "tokens seen": f"{seen:,}: {seen / num_tokens:.1f} epochs, {total_steps(args):,} steps of "
        f"{args.rows} packed rows of {args.width} tokens",
        "optimizer": "Muon for the matrices of the blocks, AdamW for the rest; learning rate "
        f"{args.learning_rate:g}, {args.warmup:.0%} warmup, then linear to 0; weight decay "
        f"{args.weight_decay:g}; gradients clipped to {args.max_grad_norm:g}; seed {args.seed}",
        **figures,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    samples = "\n\n".join(f"> **{start}**{more}" for start, more in sample(model, tokenizer))
    sources = args.sources.read_text(encoding="utf-8") if args.sources else "Not stated."
    return CARD.format(
        name=args.out.name, width=args.width, table=table, samples=samples, sources=sources.strip()
    )


def sample(model: Model, tokenizer: Any) -> list[tuple[str, str]]:
    """How the model goes on from a few prompts, drawn with a fixed seed; none picked out."""
    mx.random.seed(0)
    sampler = make_sampler(temp=0.7, top_p=0.9)
    texts = [generate(model, tokenizer, p, max_tokens=80, sampler=sampler) for p in PROMPTS]
    return [(p, text.replace("\n", "\n> ")) for p, text in zip(PROMPTS, texts, strict=True)]


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A Falcon-RW small enough to ship with a package and to train on in a minute: the architecture of
`tiiuae/falcon-rw-1b` in every respect (ALiBi, fused query, key and value, biases, tied head), at
a hundredth of its size, trained from nothing by `scripts/pretrain.py` of InterviewMate MLX. It is
for demos, tests and first steps without a network.

## Recipe and figures

| | |
| --- | --- |
{table}

The held-out figures are those of the stored weights, computed in float32 over whole documents cut
into rows of {width} tokens, so that a token sees at most {width} tokens before it.

## Samples

Temperature 0.7, top-p 0.9, seed 0, 80 tokens, the first draw of each:

{samples}

## Limits

It writes English that holds together for a clause or a sentence, on machine learning and
software. It does not know what is true, does not reason or calculate, follows no instructions,
and loses its thread within a paragraph. It has read technical documentation in English only. It
may repeat sentences of that text. Do not use what it says; use it to see that a pipeline works.

## Sources and licences

The model's files are under Apache-2.0. The text it was trained on stays under the licences of its
authors, and is not part of this folder.

{sources}
"""


if __name__ == "__main__":
    sys.exit(main())
