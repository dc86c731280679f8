"""Pretrain a small Falcon-RW on a text: the tokenizer, the model, a folder as the Hub has it.

    python scripts/pretrain.py text.txt.xz --out models/small --tokens 4.5e6

This made `mini`, the base inside the package. The text is UTF-8, plain or .xz, its
documents apart by `<|endoftext|>`; every hundredth is held out. What is not finished
lies in OUT.work: Ctrl-C saves there, and --resume goes on as if nothing had happened.
"""

import argparse
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from pretrain_folder import evaluate, falcon_config, write_folder
from pretrain_text import Text, prepare_text, progress_bar
from rich.console import Console

from interviewmate_mlx.data.packing import collate_groups, packed_rows, rows_in_order
from interviewmate_mlx.errors import InterviewMateError, TrainingError
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.training.checkpoint import State, checkpoints, load_newest, save_checkpoint
from interviewmate_mlx.training.loop import restore
from interviewmate_mlx.training.optimizer import Muon, learning_rate_at
from interviewmate_mlx.training.step import AddMicrobatches, Update, compile_loss, compile_step
from interviewmate_mlx.weights.converted import write_json
from interviewmate_mlx.weights.json_file import read_json

# What can differ when a run goes on: it changes speed, or the card, and not the weights' recipe.
FREE = ("text", "out", "resume", "sources", "save_minutes", "microbatch")
PLAIN_LINE_STEPS = 20
SAMPLE_ROWS = 32  # of the held-out ones, at each checkpoint: a trend for little time


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pretrain a small Falcon-RW on a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("text", type=Path, help="documents apart by <|endoftext|>; plain or .xz")
    add("--out", type=Path, required=True, help="folder to write")
    add("--resume", action="store_true", help="go on with what is in OUT.work")
    add("--sources", type=Path, help="Markdown for the card: where the text is from")
    add("--save-minutes", type=float, default=5, help="between checkpoints")
    add("--microbatch", type=int, default=4, help="rows at once: memory and speed")
    add("--tokens", type=float, default=40e6, help="to train on, repeated ones counted")
    add("--rows", type=int, default=16, help="of a step")
    add("--width", type=int, default=256, help="tokens of a row")
    add("--vocab", type=int, default=6144, help="tokens of the tokenizer")
    add("--hidden", type=int, default=384, help="hidden size")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=6)
    add("--learning-rate", type=float, default=5e-3, help="its peak; then linear to 0")
    add("--warmup", type=float, default=0.02, help="share of the steps")
    add("--weight-decay", type=float, default=0.1)
    add("--max-grad-norm", type=float, default=1.0)
    add("--seed", type=int, default=0)
    return parser


def main(words: list[str] | None = None) -> int:
    args = options().parse_args(words)
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        pretrain(args, Console(stderr=True, soft_wrap=True), lambda: bool(asked))
    except InterviewMateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 130 if asked else 0


def pretrain(args: argparse.Namespace, console: Console, stop: Callable[[], bool]) -> None:
    """The whole way from the text to the folder, or to a checkpoint when `stop` says so."""
    backend.prepare()
    work = args.out.with_name(f"{args.out.name}.work")
    keep_recipe(args, work)
    text = prepare_text(args.text, args.vocab, work, console)
    model, optimizer = build_model(args), Muon(args.vocab, args.weight_decay)
    if backend.machine().device == "cpu":
        use_cpu_kernels(model)
    num_parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    console.print(f"{num_parameters:,} parameters, {len(text.train):,} tokens to learn from")
    with backend.memory_limits(), backend.cpu_streams() as streams:
        state = train(args, work, text, model, optimizer, streams, console, stop)
        if state.step < total_steps(args):
            console.print(f"interrupted after step {state.step}; --resume goes on")
            return
        write_folder(args, text, model, state.step)
    console.print(f"{args.out} is written; {work} can be removed")


def keep_recipe(args: argparse.Namespace, work: Path) -> None:
    """Write the recipe into the work folder, or hold a resumed run to the one it began with."""
    recipe: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in FREE}
    try:
        recipe["text_sha256"] = hashlib.sha256(args.text.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"Cannot read {args.text}: {error.strerror}.") from error
    if args.out.exists():
        raise TrainingError(f"{args.out} is there already.\nRemove it, or choose another --out.")
    if checkpoints(work) and not args.resume:
        raise TrainingError(f"{work} holds a run.\nGo on with --resume, or remove it.")
    path = work / "recipe.json"
    began = read_json(path) if path.is_file() else recipe
    if changed := [name for name, value in recipe.items() if began.get(name) != value]:
        raise TrainingError(
            f"{work} began with other values of: {', '.join(changed)}.\n"
            "Give the same ones, or remove that folder."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def build_model(args: argparse.Namespace) -> Model:
    """A Falcon-RW in float32 with GPT-2's start: what adds to the residual begins smaller."""
    mx.random.seed(args.seed)
    model = Model(ModelArgs.from_dict(falcon_config(args)))
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
    return model


def total_steps(args: argparse.Namespace) -> int:
    return math.ceil(args.tokens / (args.rows * args.width))


def train(
    args: argparse.Namespace,
    work: Path,
    text: Text,
    model: Model,
    optimizer: Muon,
    streams: Sequence[mx.Stream],
    console: Console,
    stop: Callable[[], bool],
) -> State:
    """Train to the last step or until `stop`, from the newest checkpoint if there is one."""
    compiled_step = compile_step(model, optimizer, args.max_grad_norm, streams)
    total_loss = compile_loss(model, streams)
    found = load_newest(work)
    state = restore(found, model, optimizer)[0] if found else State()
    sample = rows_in_order(text.held_out, text.end_id, args.width)[:SAMPLE_ROWS]
    first, last = state.step, total_steps(args)
    began = saved = time.monotonic()
    with progress_bar(console) as bar:
        task = bar.add_task("", total=last, completed=first)
        for numbers in steps(args, text, compiled_step, first):
            mx.eval(numbers, model.trainable_parameters(), optimizer.state)
            if not numbers["is_finite"].item():
                raise TrainingError(
                    f"Step {state.step + 1}: the loss or a gradient is not finite.\n"
                    f"Remove {work}, and train with a lower --learning-rate."
                )
            state.step += 1
            now = time.monotonic()
            speed = (state.step - first) * args.rows * args.width / (now - began)
            line = describe(args, state.step, numbers["loss"].item(), speed)
            bar.update(task, completed=state.step, description=line)
            is_over = stop() or state.step == last
            if not console.is_terminal and (is_over or state.step % PLAIN_LINE_STEPS == 0):
                console.print(line)
            if is_over or now - saved > 60 * args.save_minutes:
                save(work, state, model, optimizer)
                saved = time.monotonic()
            if is_over:
                break
            if saved > now:
                loss, _ = evaluate(total_loss, sample, args.microbatch)
                console.print(f"step {state.step}/{last}  saved  held-out sample {loss:.4f}")
    return state


def steps(
    args: argparse.Namespace,
    text: Text,
    compiled_step: tuple[AddMicrobatches, Update],
    first: int,
) -> Iterator[dict[str, mx.array]]:
    """Take the steps from `first` on, and yield what each update says, not yet evaluated."""
    add_microbatches, update = compiled_step
    last = total_steps(args)
    rows = packed_rows(text.train, text.end_id, args.width, args.seed, first * args.rows)
    for step in range(first, last):
        taken = list(islice(rows, args.rows))
        add_microbatches(collate_groups(taken, args.microbatch), [args.seed, step])
        rate = learning_rate_at(step, last, args.learning_rate, "linear", args.warmup)
        yield update(mx.array(rate))


def describe(args: argparse.Namespace, step: int, loss: float, tokens_per_s: float) -> str:
    """A step's line, with the time that those left will take."""
    last = total_steps(args)
    minutes = round((last - step) * args.rows * args.width / tokens_per_s / 60)
    left = f"{minutes // 60}h {minutes % 60:02d}m left"
    return f"step {step}/{last}  loss {loss:.3f}  {tokens_per_s:.0f} tokens/s  {left}"


def save(work: Path, state: State, model: Model, optimizer: Muon) -> None:
    weights = dict(tree_flatten(model.parameters()))
    moments = dict(tree_flatten(optimizer.state))
    # The groups bear the names of a LoRA run's: here what is trained is the whole model.
    save_checkpoint(work, state, {"adapter": weights, "optimizer": moments}, keep=2)


if __name__ == "__main__":
    sys.exit(main())
