"""Pretrain a small Falcon-RW on a text: the tokenizer, the model, a folder as the Hub has it.

    python scripts/pretrain.py text.txt.xz --out models/small --tokens 16e6

This made `mini`, the base inside the package. A text is UTF-8, plain or .xz, with
`<|endoftext|>` between its documents; every hundredth document is held out. With --then, a
second text joins in for a second stage, in which the learning rate falls to 0. What is not
finished lies in OUT.work: Ctrl-C saves there, and --resume goes on as if nothing had happened.
With --from, a base that this script made is trained on; with --unlikelihood, to repeat itself less.
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
from pretrain_folder import evaluate, falcon_config, shape_of, write_folder
from pretrain_optimizer import Muon
from pretrain_rows import collate_groups, packed_rows, rows_in_order
from pretrain_text import Text, prepare_texts, progress_bar
from pretrain_unlikelihood import use_unlikelihood
from rich.console import Console

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.converted import write_json
from interviewmate_mlx.errors import InterviewMateError, TrainingError
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.training.checkpoint import (
    State,
    checkpoints,
    load_newest,
    restore,
    save_checkpoint,
)
from interviewmate_mlx.training.optimizer import learning_rate_at
from interviewmate_mlx.training.step import Executor, Step, total_loss
from interviewmate_mlx.training.task import choose_executor, choose_kernels

# What may differ when a run goes on: it changes speed, or the card, but not the weights.
FREE = ("text", "then", "start", "out", "resume", "sources", "save_minutes", "microbatch")
RECIPE_FILE = "recipe.json"
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
    add("--from", dest="start", type=Path, metavar="FOLDER", help="a base to go on from")
    add("--blend", type=float, default=1.0, help="share of the new weights; the rest is --from's")
    add("--unlikelihood", type=float, default=0.0, help="weight of the term against repetition")
    add("--then", type=Path, help="a second text, for a second stage")
    add("--then-tokens", type=float, default=0, help="of the second stage")
    add("--then-share", type=float, default=1.0, help="of its rows that are the second text's")
    add("--rows", type=int, default=16, help="of a step")
    add("--width", type=int, default=256, help="tokens of a row")
    add("--vocab", type=int, default=6144, help="tokens of the tokenizer")
    add("--hidden", type=int, default=384, help="hidden size")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=6)
    add("--learning-rate", type=float, default=5e-3, help="its peak; in the last stage linear to 0")
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
    work = args.out.with_name(f"{args.out.name}.work")
    if args.start:
        take_shape(args)
    keep_recipe(args, work)
    paths = [args.text, *([args.then] if args.then else [])]
    texts = prepare_texts(paths, args.vocab, work, console, args.start)
    model, optimizer = build_model(args), Muon(args.vocab, args.weight_decay)
    choose_kernels(model, mx.float32)
    if args.unlikelihood:
        use_unlikelihood(model, args.unlikelihood, args.width)
    num_parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    console.print(f"{num_parameters:,} parameters, {len(texts[0].train):,} tokens to learn from")
    executor = choose_executor()
    memory_bytes = backend.machine().memory_bytes
    with backend.memory_limits(memory_bytes, memory_bytes // 2), executor.opened():
        state = train(args, work, texts, model, optimizer, executor, console, stop)
        if state.step < total_steps(args):
            console.print(f"interrupted after step {state.step}; --resume goes on")
            return
        if args.blend != 1:
            blend(model, args)
        write_folder(args, texts, model, state.step)
    console.print(f"{args.out} is written; {work} can be removed")


def keep_recipe(args: argparse.Namespace, work: Path) -> None:
    """Write the recipe into the work folder, or hold a resumed run to the one it began with."""
    recipe: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in FREE}
    weights = args.start and args.start / "model.safetensors"
    for name, path in (("text", args.text), ("then", args.then), ("from", weights)):
        if path:
            try:
                recipe[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise TrainingError(f"Cannot read {path}: {error.strerror}.") from error
    if bool(args.then) != bool(args.then_tokens):
        raise TrainingError("--then and --then-tokens go together: give both, or neither.")
    if args.blend != 1 and not args.start:
        raise TrainingError("--blend mixes with the weights of --from: give that too.")
    if args.out.exists():
        raise TrainingError(f"{args.out} exists already.\nRemove it, or choose another --out.")
    if checkpoints(work) and not args.resume:
        raise TrainingError(f"{work} holds a run.\nGo on with --resume, or remove it.")
    path = work / RECIPE_FILE
    began = read_json(path) if path.is_file() else recipe
    if changed := [name for name, value in recipe.items() if began.get(name) != value]:
        raise TrainingError(
            f"{work} began with other values of: {', '.join(changed)}.\n"
            "Give the same ones, or remove that folder."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def take_shape(args: argparse.Namespace) -> None:
    """The sizes of the base to go on from, in place of those that a new one would have."""
    for option, got in shape_of(args.start).items():
        given = getattr(args, option)
        if given not in (options().get_default(option), got):
            raise TrainingError(
                f"--{option} {given}: {args.start} has {got}.\nLeave --{option} out."
            )
        setattr(args, option, got)


def build_model(args: argparse.Namespace) -> Model:
    """A Falcon-RW in float32: that of --from, or a new one with GPT-2's start.

    There, what adds to the residual begins smaller.
    """
    if args.start:
        return Base.open(args.start).load(mx.float32)
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


def blend(model: Model, args: argparse.Namespace) -> None:
    """Put the model between what it was and what it became (https://arxiv.org/abs/2109.01903)."""
    before = dict(tree_flatten(build_model(args).parameters()))
    after = tree_flatten(model.parameters())
    share = args.blend
    model.load_weights([(name, (1 - share) * before[name] + share * w) for name, w in after])


def first_steps(args: argparse.Namespace) -> int:
    """Steps of the first stage."""
    return math.ceil(args.tokens / (args.rows * args.width))


def total_steps(args: argparse.Namespace) -> int:
    return first_steps(args) + math.ceil(args.then_tokens / (args.rows * args.width))


def train(
    args: argparse.Namespace,
    work: Path,
    texts: Sequence[Text],
    model: Model,
    optimizer: Muon,
    executor: Executor,
    console: Console,
    stop: Callable[[], bool],
) -> State:
    """Train to the last step or until `stop`, from the newest checkpoint if there is one."""
    model.train()
    step = Step(model, optimizer, args.max_grad_norm, executor)
    loss_of = total_loss(model, executor)
    state = State((work / RECIPE_FILE).read_text(encoding="utf-8"))
    if found := load_newest(work):
        restore(found, model, optimizer)
        state = found.state
    samples = [rows_in_order(t.held_out, t.end_id, args.width)[:SAMPLE_ROWS] for t in texts]
    first, last = state.step, total_steps(args)
    began = saved = time.monotonic()
    with progress_bar(console) as bar:
        task = bar.add_task("", total=last, completed=first)
        for numbers in steps(args, texts, step, first):
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
                model.eval()
                losses = [evaluate(loss_of, sample, args.microbatch)[0] for sample in samples]
                model.train()
                said = " ".join(f"{loss:.4f}" for loss in losses)
                console.print(f"step {state.step}/{last}  saved  held-out sample {said}")
    return state


def steps(
    args: argparse.Namespace, texts: Sequence[Text], step: Step, first: int
) -> Iterator[dict[str, mx.array]]:
    """Take the steps from `first` on, and yield what each update says, not yet evaluated."""
    turn, last = first_steps(args), total_steps(args)
    num_second = round(args.rows * args.then_share)  # of a late step's rows, from the second text
    num_late = max(0, first - turn)
    num_taken = min(first, turn) * args.rows + num_late * (args.rows - num_second)
    rows, more = (
        packed_rows(text.train, text.end_id, args.width, args.seed, taken)
        for text, taken in ((texts[0], num_taken), (texts[-1], num_late * num_second))
    )
    for number in range(first, last):
        later = num_second if number >= turn else 0
        taken = [*islice(rows, args.rows - later), *islice(more, later)]
        step.accumulate(collate_groups(taken, args.microbatch), [args.seed, number])
        mx.eval(step.sums)
        backend.share_cores(1)  # Muon's products get all of them
        yield step.update(learning_rate(args, number))


def learning_rate(args: argparse.Namespace, number: int) -> float:
    """Up, then level until the last stage, then straight down to 0."""
    turn, last = first_steps(args), total_steps(args)
    if not args.then_tokens:
        return learning_rate_at(number, last, args.learning_rate, "linear", args.warmup)
    if number < turn:
        return learning_rate_at(number, turn, args.learning_rate, "constant", args.warmup)
    return learning_rate_at(number - turn, last - turn, args.learning_rate, "linear", 0.0)


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
