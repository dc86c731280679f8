"""The contract of `imate-mlx`: help, exit codes, which stream says what, signals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import mlx.core as mx
import pytest
from safetensors.numpy import load_file

from interviewmate_mlx.cli import main
from interviewmate_mlx.coach import generate

# The console script, as a process of its own; it needs nothing on PATH.
IMATE = [sys.executable, "-W", "error", "-c", "from interviewmate_mlx.cli import main; main()"]


CONTEXT = click.Context(main)


def all_commands(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(CONTEXT):
            sub = command.get_command(CONTEXT, name)
            assert sub
            yield from all_commands(sub, f"{path} {name}".strip())


COMMANDS = dict(all_commands(main))


@pytest.fixture
def small(tiny_base: Path, questions: Path) -> list[object]:
    """Options of a run of three steps."""
    return ["--model", tiny_base, "--set", f"data.path={questions}", "--set", "train.epochs=1"]


# help


@pytest.mark.parametrize("path", COMMANDS)
def test_help_shows_an_example_that_is_right(imate, path):
    text = imate(*path.split(), "--help").stdout
    assert text.startswith("Usage: imate-mlx")
    if path and isinstance(COMMANDS[path], click.Group):
        return  # its commands have their own
    examples = re.findall(r"^ +(?:Example: )?imate-mlx (.+)$", text, flags=re.MULTILINE)
    assert examples, "no example"
    for example in examples:
        words = shlex.split(example)
        command, name = main, "imate-mlx"
        while isinstance(command, click.Group):
            name = words.pop(0)
            command = command.get_command(CONTEXT, name)
        assert path in ("", next(p for p, c in COMMANDS.items() if c is command))
        command.make_context(name, words)  # refuses what it does not know


def test_help_loads_no_mlx():
    script = """
import sys
from interviewmate_mlx.cli import main
for words in ["--help"], ["train", "--help"], ["data", "preview", "-h"], ["--version"]:
    main(words, standalone_mode=False)
heavy = {"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "torch", "rich"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# exit codes and streams


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "Usage: imate-mlx [OPTIONS] [COMMAND] [ARGS]..."),
        ("data", "Usage: imate-mlx data [OPTIONS] COMMAND [ARGS]..."),
        ("nonsense", "No such command 'nonsense'."),
        ("--nonsense", "No such option '--nonsense'."),
        ("--verbose", "--verbose goes with --version."),
        ("train --nonsense", "No such option '--nonsense'."),
        ("train A", "Got unexpected extra argument (A)"),
        ("train --resume --force", "--resume goes on with a run, --force replaces it: choose one."),
        ("convert", "Missing argument 'SOURCE'."),
        ("convert x --dtype int8", "Invalid value for '--dtype': 'int8' is not one of"),
        ("generate", "Give a question, - for stdin, or --questions FILE"),
        ("generate ' '", "The question is empty."),
        ("generate x --max-tokens 0", "Invalid value for '--max-tokens': 0 is not in the range"),
        ("generate x --temperature -1", "Invalid value for '--temperature': -1.0 is not in the"),
        ("generate x --top-p 0", "Invalid value for '--top-p': 0.0 is not in the range 0<x<=1"),
        ("generate x --seed -1", "Invalid value for '--seed': -1 is not in the range"),
        ("generate x --dtype int8", "Invalid value for '--dtype': 'int8' is not one of"),
        ("export x", "Give --out FOLDER, --push REPO, or both."),
        ("export x --out y --private", "--private is for --push."),
        ("export x --push y --force", "--force is for --out."),
        ("bench --steps 0", "Invalid value for '--steps': 0 is not in the range x>=1."),
        ("bench --warmup -1", "Invalid value for '--warmup': -1 is not in the range x>=0."),
        ("data preview x --row 0", "Invalid value for '--row': 0 is not in the range x>=1."),
        ("data preview x --split dev", "Invalid value for '--split': 'dev' is not one of"),
        ("data preview x --max-length 7", "Invalid value for '--max-length': 7 is not in the"),
        ("data preview x --train-on x", "Invalid value for '--train-on': 'x' is not one of"),
        ("data split x", "Missing option '--out'."),
        ("data split x --out y --shares 1 2 3", "Invalid value for '--shares': 2.0 is not in the"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(imate, words, said):
    result = imate(*shlex.split(words), code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: imate-mlx")
    assert said in result.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train --run D",
            "ConfigError: No run 'D': expected A, B, C, mini, alpaca, dpo, or the path of a .toml",
        ),
        ("train --run x.toml", "ConfigError: Cannot read the run x.toml: No such file or directo"),
        ("train --set lora.rnak=1", "ConfigError: The run A is not valid:\n  unknown key lor"),
        ("train --set data.path=nowhere", "DataError: No data at nowhere."),
        ("train --set data.path=QUESTIONS --model ''", "ConfigError: The run A is not valid"),
        ("train --set data.path=QUESTIONS --model here/is/none", "ModelError: No model at here/is"),
        ("train TRAIN --set lora.targets=q_proj", "AdapterError: LoRA targets that match no"),
        (
            "train TRAIN --set data.max_length=8",
            "DataError: QUESTIONS: of 12 rows none has a token",
        ),
        ("train TRAIN --resume", "TrainingError: Nothing to resume in adapters/run_A"),
        ("train TRAIN --out FILE", "TrainingError: FILE is a file."),
        (
            "train TRAIN --out FILE/adapter",
            "StorageError: Cannot write FILE/adapter: Not a directory",
        ),
        ("bench TRAIN --set nonsense", "ConfigError: The run A is not valid:\n  nonsense: ex"),
        ("generate x", "ConfigError: No base: name one (mini, a folder, or a Hub id"),
        ("generate x --model FILE", "ModelError: No model at FILE"),
        ("generate x --model QUESTIONS", "ModelError: No model at QUESTIONS"),
        ("generate x --model CHECKPOINT", "ModelError: CHECKPOINT holds no model*.safetensors: "),
        ("generate x --model BASE --adapter nowhere", "AdapterError: No adapter in nowhere"),
        ("convert FILE", "ModelError: FILE holds no config.json."),
        ("convert /nowhere", "ModelError: No model at /nowhere: no such folder"),
        (
            "convert CHECKPOINT --revision v2",
            "ConfigError: A revision is for Hub ids, and CHECKPOINT is a",
        ),
        (
            "convert CHECKPOINT --out QUESTIONS",
            "ModelError: QUESTIONS already exists, and no con",
        ),
        ("convert CHECKPOINT --out QUESTIONS --force", "ModelError: QUESTIONS already exists"),
        ("convert CHECKPOINT --out CHECKPOINT", "ModelError: CHECKPOINT holds the source"),
        ("convert CHECKPOINT --out FILE/x", "StorageError: Cannot write FILE/x"),
        ("export nowhere --out x", "AdapterError: No adapter in nowhere"),
        ("export QUESTIONS --out x", "AdapterError: No adapter in QUESTIONS"),
        ("data check nowhere", "DataError: No data at nowhere."),
        (
            "data check FILE",
            "DataError: FILE: got a nameless file, expected .jsonl or .json, .csv, .tsv or "
            ".parquet.",
        ),
        ("data preview QUESTIONS --model BASE --row 13", "ConfigError: --row: got 13, expected at"),
        ("data preview QUESTIONS --model nowhere", "ModelError: No model at nowhere"),
        ("data split nowhere.jsonl --out x", "DataError: No data at nowhere.jsonl"),
    ],
)
def test_users_mistake_exits_with_1_and_one_message(
    imate, words, said, tiny_base, tiny_checkpoint, questions, tmp_path
):
    file = tmp_path / "file"
    file.touch()
    places = {
        "TRAIN": f"--model {tiny_base} --set data.path={questions}",
        "BASE": tiny_base,
        "CHECKPOINT": tiny_checkpoint,
        "QUESTIONS": questions,
        "FILE": file,
    }
    for name, place in places.items():
        words, said = words.replace(name, str(place)), said.replace(name, str(place))
    result = imate(*shlex.split(words), code=1)
    assert result.stdout == ""
    assert result.stderr.startswith(said)
    assert "Traceback" not in result.stderr
    assert not Path("adapters").exists()
    assert list(Path().iterdir()) == [Path("file")], "a command that fails leaves nothing behind"


def test_console_script_is_this_command():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="imate-mlx")
    assert script.load() is main


def test_process_exits_with_the_code():
    environment = os.environ | {"INTERVIEWMATE_DEVICE": "tpu"}
    for words, code in (["--version"], 0), (["--version", "--verbose"], 1), (["--nonsense"], 2):
        done = subprocess.run([*IMATE, *words], capture_output=True, text=True, env=environment)
        assert (done.returncode, bool(done.stdout)) == (code, code == 0)
        assert "Traceback" not in done.stderr


def test_reader_who_goes_away_is_no_error(tmp_path):
    with started(["--version", "--verbose"], tmp_path) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_device_that_is_not_known_is_refused():
    environment = os.environ | {"INTERVIEWMATE_DEVICE": "tpu"}
    words = [*IMATE, "data", "check", "x"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == (
        "BackendError: INTERVIEWMATE_DEVICE: got 'tpu', expected cpu or gpu.\n"
        "Correct it, or unset it.\n"
    )


# a run from end to end


def test_training_writes_an_adapter_and_says_each_thing_on_its_stream(imate, small, tiny_base):
    result = imate("train", *small)
    out = Path("adapters/run_A")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "metrics.jsonl",
        "run.toml",
        "summary.json",
    ]
    shapes = {
        name: array.shape for name, array in load_file(out / "adapter_model.safetensors").items()
    }
    path = "base_model.model.transformer.h.{}.self_attention.query_key_value.lora_{}.weight"
    assert shapes == {
        path.format(layer, letter): shape
        for layer in (0, 1)
        for letter, shape in (("A", (8, 64)), ("B", (192, 8)))
    }

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert result.stdout.splitlines()[0].strip() == f"run_A on {tiny_base}"
    assert f"{summary['final_loss']:.4f}" in result.stdout
    assert result.stdout.endswith(f"\nadapter: {out}\n")

    said = result.stderr.splitlines()
    assert said[:2] == ["12 rows to train on, 4 to validate on", "3 steps, 3 an epoch"]
    assert re.fullmatch(r"about \d+ [kM]B of memory at the peak", said[2])
    assert re.fullmatch(r"about \d+ [kM]B of disk for checkpoints", said[3])
    starts = [line.split("  ")[0] for line in said[4:]]
    assert starts == ["step 0/3", "step 1/3", "step 2/3", "step 3/3", "step 3/3"]
    assert said[-1] == f"step 3/3  validation loss {summary['best_valid_loss']:.4f}  best so far"

    assert imate("generate", "What is a loss?", "--adapter", out).stderr == ""
    # Whoever gets the copy finds nothing at these paths.
    said = imate("export", out, "--out", "copy").stderr
    assert f"a path of this machine: {tiny_base}\n" in said
    assert "data by its path: " in said
    assert said.count("warning: ") == 2


def test_json_stands_alone_on_stdout(imate, small, tiny_checkpoint, questions):
    for words in (
        ["train", *small],
        ["bench", *small, "--steps", 1],
        ["convert", tiny_checkpoint],
        ["data", "check", questions],
    ):
        stdout = imate(*words, "--json").stdout
        assert isinstance(json.loads(stdout), dict)
        assert stdout.count("\n") == 1
        assert stdout.endswith("}\n")


def test_run_is_not_replaced_unasked(imate, small):
    imate("train", *small)
    out = Path("adapters/run_A")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = imate("train", *small, code=1)
    assert result.stderr == (
        f"TrainingError: {out} is not empty.\n"
        "Resume its run, replace it, or choose another folder.\n"
        "Options for that: --resume, --force, --out.\n"
    )
    # Forced, but the new run cannot start.
    imate("train", *small, "--force", "--set", "data.path=nowhere", code=1)
    imate("train", *small, "--force", "--model", "no/such/base", code=1)
    imate("train", *small, "--force", "--set", "lora.targets=q_proj", code=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_force_does_not_replace_what_is_no_run(imate, small):
    Path("photos").mkdir()
    Path("photos/1.jpg").write_bytes(b"x")
    result = imate("train", *small, "--out", "photos", "--force", code=1)
    assert result.stderr.startswith("TrainingError: photos holds no run of this package")
    assert Path("photos/1.jpg").read_bytes() == b"x"
    Path("empty").mkdir()
    imate("train", *small, "--out", "empty", "--force")
    assert Path("empty/summary.json").is_file()


# signals


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """An `imate-mlx` process, which does not outlive the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*IMATE, *words], cwd=folder, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Read the process's stderr up to the line that begins with these words."""
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(words):
            return line
    raise AssertionError(f"{words!r} was not said, but:\n{''.join(said)}")


def test_interrupted_process_says_how_to_go_on_and_that_finishes_the_run(
    imate, tiny_base, questions, tmp_path
):
    words = ["train", "--model", str(tiny_base), "--set", f"data.path={questions}"]
    words += ["--set", "train.epochs=50", "--set", "validate.every=1000"]
    # Rows of one length: a single variant to compile, and many quick steps.
    words += ["--set", "data.max_length=16", "--set", "data.train_on=all"]
    halves = [*words, "--out", "my runs/halves"]
    with started(halves, tmp_path) as process:
        wait_for(process, "step 7/150")
        process.send_signal(signal.SIGINT)
        wait_for(process, "finishing this step, then saving; once more to stop at once")
        last = wait_for(process, "interrupted after step ")
        command = wait_for(process, "Go on with: ").removeprefix("Go on with: ")
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout, stderr) == (130, "", "")
    step = int(re.findall(r"\d+", last)[0])
    assert 7 <= step < 150
    out = tmp_path / "my runs/halves"
    assert (out / f"checkpoints/step-{step:06d}.safetensors").is_file()

    assert shlex.split(command) == ["imate-mlx", *halves, "--resume"]
    done = subprocess.run(
        [*IMATE, *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}\n" in done.stderr
    imate(*words, "--out", "whole")
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_step_and_saves(imate, small, signal_after, monkeypatch, number):
    words = ["train", *map(str, small), "--set", "train.epochs=9", "--force"]
    monkeypatch.setattr(sys, "argv", ["imate-mlx", *words])
    with signal_after(2, number):
        before = signal.getsignal(number)
        result = imate(*words, code=130)
        assert signal.getsignal(number) is before
    assert result.stdout == ""
    assert "everything is saved" in result.stderr
    go_on = [*words[:-1], "--resume"]
    assert result.stderr.endswith(f"\nGo on with: imate-mlx {shlex.join(go_on)}\n")
    imate(*go_on)
    assert json.loads(Path("adapters/run_A/summary.json").read_text())["steps"] == 27


def test_second_signal_stops_without_saving(imate, small, signal_after):
    words = ["train", *small, "--set", "train.epochs=9"]
    with signal_after(5, signal.SIGINT, signal.SIGINT):
        result = imate(*words, code=130)
    assert result.stderr.endswith("\ninterrupted\n")
    assert "everything is saved" not in result.stderr
    out = Path("adapters/run_A")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003.safetensors"]
    imate(*words, "--resume")
    assert mx.load(str(out / "checkpoints/step-000027.safetensors"))


def test_second_interrupt_stops_a_process_at_once(tiny_base, questions, tmp_path):
    rows = (questions / "train.jsonl").read_text(encoding="utf-8").splitlines()
    long = [json.dumps({"text": " ".join(rows)})] * 16
    (tmp_path / "train.jsonl").write_text("\n".join(long), encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text(rows[0], encoding="utf-8")
    words = ["train", "--model", str(tiny_base), "--set", f"data.path={tmp_path}"]
    words += ["--set", "train.grad_accumulation=16", "--set", "train.epochs=1000"]
    with started(words, tmp_path) as process:
        wait_for(process, "step 0/1000  validation loss")
        # One after the other at the same moment, so that no step can end between them.
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        wait_for(process, "interrupted\n")
        assert process.wait() == 130
    assert not (tmp_path / "adapters/run_A/checkpoints").exists()


def test_interrupt_before_the_first_step_has_nothing_to_save(imate, small, monkeypatch):
    from interviewmate_mlx.training import loop

    def prepare(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came to nothing")

    monkeypatch.setattr(loop, "prepare", prepare)
    assert imate("train", *small, code=130).stderr == "interrupted\n"
    assert list(Path().iterdir()) == []


def test_control_characters_of_an_answer_do_not_reach_the_terminal(imate, tiny_base, monkeypatch):
    monkeypatch.setattr(
        generate, "stream_answer", lambda *_: iter(["\x1b[31m", "red\x07\n", "é\t."])
    )
    said = imate("generate", "What is a mean?", "--model", tiny_base).stdout
    assert said == "[31mred\né\t.\n"


def test_only_options_that_a_command_has_are_named(imate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = "Give the folder of an adapter that was trained here or with PEFT.\n"
    asked = imate("generate", "Why?", "--adapter", "none", code=1).stderr
    assert asked.endswith(missing + "Options for that: --adapter.\n")
    assert imate("evaluate", "none", code=1).stderr.endswith(missing)  # it takes them as they are
    # Those of a command below another.
    Path("rows.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    Path("mine.jsonl").write_text("mine")
    refused = imate("data", "convert", "rows.jsonl", "--out", "mine.jsonl", code=1).stderr
    assert refused.endswith("Options for that: --force, --out.\n")
