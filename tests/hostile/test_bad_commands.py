"""Command lines that cannot be, and bad inputs of each kind met by a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import LIMITED, Bad, assert_refused, check, listing, prepare


def usage(words: str, *says: str) -> Bad:
    return Bad(words[:60], lambda _: None, words, "", says)


def mistake(name: str, words: str, error: str, *says: str) -> Bad:
    return Bad(name, lambda _: None, words, error, says)


USAGE = [
    usage("train --run A B", "Got unexpected extra argument (B)"),
    usage("train --epoch 3", "No such option '--epoch'", "--epochs"),
    usage("train --iters 3", "No such option '--iters'"),
    usage("train --epochs three", "'three' is not a valid float"),
    usage("train --seed 1.5", "'1.5' is not a valid integer"),
    usage("train --lr 1 --set train.learning_rate=2", "--lr is --set train.learning_rate"),
    usage("train --resume --force", "choose one"),
    usage("generate x --max-tokens 1e3", "'1e3' is not a valid integer"),
    usage("generate x --max-tokens 99999999999999999999x", "is not a valid integer"),
    usage("generate x --temperature nan", "nan is not a finite number"),
    usage("generate x --temperature inf", "is not a finite number"),
    usage("generate x --temperature 1 --top-p nan", "nan"),
    usage("generate x --seed 4294967296 --temperature 1", "is not in the range 0<=x<=4294967295"),
    usage("generate x --top-p 0.5", "need a --temperature above 0"),
    usage("generate ''", "The question is empty"),
    usage("generate '\udcff'", "The question is not in UTF-8"),
    usage("generate x y", "Got unexpected extra argument (y)"),
    usage("data", "Usage: imate-mlx data"),
    usage("data split rows.jsonl", "Missing option '--out'"),
    usage("data split x --out y --shares nan nan nan", "nan"),
    usage("data check x --max-length 64", "--max-length needs a --model"),
    usage("bench --steps 0", "0 is not in the range x>=1"),
    usage("export x", "Give --out FOLDER, --push REPO, or both"),
    usage("\udcff\udcfe", "No such command"),
]
COMMANDS = [
    mistake(
        "a base that is not there", "generate x --model here/nor/there", "ModelError", "No model at"
    ),
    mistake(
        "a home of nobody", "generate x --model '~nobody7/x'", "ConfigError", "no home folder here"
    ),
    mistake(
        "a base of control characters", "generate x --model 'a\x1b[2Jb'", "ModelError", "\\x1b"
    ),
    mistake("an impossible name", "generate x --model 'no spaces/here'", "HubError", "owner/name"),
    mistake("a convert of nothing", "convert nowhere", "ModelError", "No model at nowhere"),
    mistake(
        "a revision of a folder", "convert IN --revision x", "ConfigError", "A revision is for"
    ),
    mistake("a data set of nobody", "data check 'x y/z'", "HubError", "expected owner/name"),
    mistake("data that is not there", "data check nowhere", "DataError", "No data at nowhere"),
    mistake(
        "a run that is not there",
        "train --resume --out nowhere",
        "TrainingError",
        "it holds no run",
    ),
    mistake("a push of nothing", "export nowhere --push me/x", "AdapterError", "No adapter in now"),
    Bad(
        "a run of a folder that is no TOML",
        lambda folder: (folder / "run.toml").write_text("[lora"),
        "train --resume --out IN",
        "TrainingError",
        ("Cannot read IN/run.toml", "is not TOML: ", "Expected ']'"),
    ),
]


@pytest.mark.parametrize("bad", USAGE + COMMANDS, ids=lambda bad: ascii(bad.name))
def test_bad_command_line_is_refused(bad, tmp_path):
    check(bad, tmp_path)


def sparse(file: str, gigabytes: int):
    def make(folder: Path) -> None:
        with (folder / file).open("wb") as opened:
            opened.truncate(gigabytes << 30)

    return make


def sparse_folder(*files: str):
    def make(folder: Path) -> None:
        for file in files:
            sparse(file, 100)(folder)

    return make


# Each would take 100 GB if it were read as it stands.
BOMBS = [
    Bad(
        "run",
        sparse("run.toml", 100),
        "train --run IN/run.toml",
        "ConfigError",
        ("larger than 64 kB",),
    ),
    Bad(
        "rows",
        sparse("a.jsonl", 100),
        "data check IN/a.jsonl",
        "DataError",
        ("encoding: got UTF-16 or UTF-32",),  # zeros at its start; rows are read one by one
    ),
    Bad("config", sparse("config.json", 100), "convert IN", "ModelError", ("larger than 64 MB",)),
    Bad(
        "adapter",
        sparse_folder("adapter_config.json", "adapter_model.safetensors"),
        "export IN --out copy",
        "AdapterError",
        ("larger than 1 MB",),
    ),
]


def test_bombs_cost_no_memory(tmp_path):
    """A process for each, side by side: most of their time is for loading the libraries."""
    started = []
    for bad in BOMBS:
        root = tmp_path / bad.name
        root.mkdir()
        words = prepare(bad, root, {})
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", LIMITED, *words],
            cwd=root / "work",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        started.append((bad, root, listing(root), process))
    for bad, root, before, process in started:
        stdout, stderr = process.communicate()
        assert_refused(bad, process.returncode, stdout, stderr, root)
        assert listing(root) == before
