"""Pretrain a small Falcon-RW on a text: a tokenizer, an empty base, and this package's training.

    python scripts/pretrain.py text.txt.xz --out models/small --tokens 16e6

A text is UTF-8, plain or .xz, with `<|endoftext|>` between its documents; every hundredth
document is held out. With --then, a second text joins in for a second stage, in which the learning
rate falls to 0. Each stage is a run with `train.weights = "all"` below OUT.work: Ctrl-C saves
there, and --resume goes on as if nothing had happened. With --from, a base that this script made
is trained on; with --unlikelihood, to repeat itself less.
"""

import argparse
import hashlib
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
from pretrain_folder import shape_of, write_folder, write_start
from pretrain_text import mix, prepare_texts
from pretrain_unlikelihood import use_unlikelihood
from rich.console import Console

from interviewmate_mlx.base.converted import write_json
from interviewmate_mlx.cli.signals import StopOnSignal
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.data.batches import WIDTH_STEP
from interviewmate_mlx.errors import InterviewMateError, TrainingError
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.results.terminal import show
from interviewmate_mlx.training.events import Finished
from interviewmate_mlx.training.loop import opened, run_task

# What may differ when a run goes on: it changes the card, or what is kept, but not the weights.
FREE = ("text", "then", "start", "out", "resume", "sources", "save_every")


class Stage(NamedTuple):
    """A run of its own."""

    data: Path
    num_tokens: float
    schedule: str
    warmup: float


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
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--tokens", type=float, default=40e6, help="to train on, repeated ones counted")
    add("--from", dest="start", type=Path, metavar="FOLDER", help="a base to go on from")
    add("--blend", type=float, default=1.0, help="share of the new weights; the rest is --from's")
    add("--unlikelihood", type=float, default=0.0, help="weight of the term against repetition")
    add("--then", type=Path, help="a second text, for a second stage")
    add("--then-tokens", type=float, default=0, help="of the second stage")
    add("--then-share", type=float, default=1.0, help="of its tokens that are the second text's")
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
    try:
        with StopOnSignal() as stop:
            is_done = pretrain(args, Console(stderr=True, soft_wrap=True), stop)
    except InterviewMateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0 if is_done else 130


def pretrain(args: argparse.Namespace, console: Console, stop: StopOnSignal) -> bool:
    """The whole way from the text to the folder; false where a signal ended it."""
    work = args.out.with_name(f"{args.out.name}.work")
    if args.start:
        take_shape(args)
    keep_recipe(args, work)
    paths = [args.text, *([args.then] if args.then else [])]
    texts = prepare_texts(paths, args.vocab, work, console, args.start)
    planned = list(stages(args, work))
    base, num_steps = args.start or write_start(args, texts[0].tokenizer, work / "start"), 0
    for number, stage in enumerate(planned):
        run = run_of(args, base, stage)
        base = work / f"stage_{number}"
        finished = train(args, run, base, console, stop)
        num_steps += finished.step
        if finished.interrupted:
            console.print(f"interrupted after step {finished.step}; --resume goes on")
            return False
    write_folder(args, texts, base, num_steps)
    console.print(f"{args.out} is written; {work} can be removed")
    return True


def take_shape(args: argparse.Namespace) -> None:
    """The sizes of the base to go on from, in place of those that a new one would have."""
    for option, got in shape_of(args.start).items():
        given = getattr(args, option)
        if given not in (options().get_default(option), got):
            raise TrainingError(
                f"--{option} {given}: {args.start} has {got}.\nLeave --{option} out."
            )
        setattr(args, option, got)


def keep_recipe(args: argparse.Namespace, work: Path) -> None:
    """Check the recipe and keep it in the work folder; a resumed run is held to it."""
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
    if not args.tokens and not args.then:
        raise TrainingError("--tokens 0 leaves nothing to train on.")
    if not 0 < args.then_share <= 1:
        raise TrainingError(f"--then-share: got {args.then_share:g}, expected above 0, at most 1.")
    if args.unlikelihood and args.width % WIDTH_STEP:  # rows would be padded
        raise TrainingError(
            f"--width: got {args.width}, expected a multiple of {WIDTH_STEP} with --unlikelihood."
        )
    if args.blend != 1 and not args.start:
        raise TrainingError("--blend mixes with the weights of --from: give that too.")
    if args.out.exists():
        raise TrainingError(f"{args.out} exists already.\nRemove it, or choose another --out.")
    path = work / "recipe.json"
    if any(work.glob("stage_*")):
        if not args.resume:
            raise TrainingError(f"{work} holds a run.\nGo on with --resume, or remove it.")
    elif path.is_file() and read_json(path) != recipe:  # nothing is trained yet
        shutil.rmtree(work)
    began = read_json(path) if path.is_file() else recipe
    if changed := [name for name, value in recipe.items() if began.get(name) != value]:
        raise TrainingError(
            f"{work} began with other values of: {', '.join(changed)}.\n"
            "Give the same ones, or remove that folder."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)


def stages(args: argparse.Namespace, work: Path) -> Iterator[Stage]:
    """Up and level; and straight down to 0 in the last one."""
    schedule = "constant" if args.then else "linear"
    if args.tokens:
        yield Stage(work / "text_0", args.tokens, schedule, args.warmup)
    if args.then:
        data = mix(work, args.then_share, args.seed)
        yield Stage(data, args.then_tokens, "linear", 0.0 if args.tokens else args.warmup)


def run_of(args: argparse.Namespace, base: Path, stage: Stage) -> RunConfig:
    """A stage as a run."""
    return RunConfig().replace(
        name=args.out.name,
        model={"base": str(base.absolute()), "dtype": "float32"},
        data={"path": str(stage.data.absolute()), "max_length": args.width + 1, "pack": True},
        train={
            "weights": "all",
            "optimizer": "muon",
            "epochs": 1e9,  # as many as max_steps asks for
            "max_steps": math.ceil(stage.num_tokens / (args.rows * args.width)),
            "batch_size": args.rows,
            "grad_accumulation": 1,
            "learning_rate": args.learning_rate,
            "schedule": stage.schedule,
            "warmup_ratio": stage.warmup,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "save_every": args.save_every,
            "seed": args.seed,
        },
    )


def train(
    args: argparse.Namespace, run: RunConfig, out: Path, console: Console, stop: StopOnSignal
) -> Finished:
    """Train a stage to its end, from where it stands, or until a signal comes."""
    resume = (out / "run.toml").is_file()
    with opened(run, out, resume, False, None) as (task, saved):
        if args.unlikelihood:
            use_unlikelihood(task.model, args.unlikelihood, args.width)
        with task.memory_limits(), task.executor.opened():
            events = run_task(task, out, saved, lambda: stop.wanted)
            *_, last = show(events, console)
    assert isinstance(last, Finished)
    return last


if __name__ == "__main__":
    sys.exit(main())
