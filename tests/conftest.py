"""What several tests share: a tiny base, a few questions, an adapter, the command line."""

# ruff: noqa: E402  what is set for the BLAS comes before it is loaded, and that before MLX and torch

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

# Under nohup or in a shell's background these are ignored, which processes started here inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Threads of a BLAS wait for each other on a busy machine: five times as long for such small
# matrices. Read when the library is loaded; the processes that tests start inherit it.
for _name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# Some GPUs multiply float32 with 11 significant bits, unless they are told not to.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx
from checkpoints import tiny_falcon, write_checkpoint
from kernel_header import precompiled

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import adapter_weights, save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.cli import main
from interviewmate_mlx.config import load_run
from interviewmate_mlx.model.lora import add_lora, lora_layers
from interviewmate_mlx.results import terminal
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.loop import train

# Of unequal length, so that rows fall into several widths; no two alike.
_QUESTIONS = {
    "What is a loss?": "It tells how far the answers of a model are from its examples.",
    "What is a mean?": "The sum of the values by their number.",
    "What is the gradient?": "The direction in which a function rises fastest. Training takes "
    "small steps against it, and the learning rate sets how long each of them is.",
    "What is a validation set?": "Rows that the model has not been trained on.",
    "What is supervised learning?": "Fitting a function to examples that bear labels, so that it "
    "also holds for examples that come later.",
    "What is a learning rate?": "The length of a step.",
    "What is attention?": "A sum over earlier tokens, in which scores say how much each counts.",
    "What is an example?": "One row of a data set.",
    "What is a label?": "What a person says that an example shows, such as a word or a number, "
    "and what a supervised model learns to say by itself.",
    "What is a token?": "Part of a word.",
    "What is a training set?": "All that a model sees while its parameters are being fitted.",
    "What is a model?": "A function with parameters; a large one has billions of them, and yet it "
    "maps its input to an output like any other.",
    "What is a hard idea?": "One that needs two examples.",
    "What is an epoch?": "One pass over every training row.",
    "What is a parameter?": "A number that training may change, unlike those that you set before.",
    "What is a minimum?": "A place from which each small step leads up.",
    "What is a softmax?": "It makes positive numbers with the sum one out of any scores.",
    "What is a score?": "A number that says how good something is.",
    "What is structure?": "What remains the same when the examples change.",
}


@pytest.fixture(autouse=True, scope="session")
def without_torch() -> Iterator[None]:
    """The processes that tests start find no torch, which takes seconds to import."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(Path(__file__).with_name("without_torch"))
        patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
        yield


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of this test find torch."""
    monkeypatch.delenv("PYTHONPATH")


@pytest.fixture(autouse=True)
def float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `auto` is bfloat16, which would hide what tests compare."""
    here = backend.machine
    if here().path == "gpu":
        monkeypatch.setattr(backend, "machine", lambda: replace(here(), dtype="float32"))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, and not by each worker
        stack = ExitStack()
        stack.enter_context(precompiled())
        config.add_cleanup(stack.close)


def question_rows() -> list[dict[str, str]]:
    """19 rows of a question and an answer."""
    return [{"question": asked, "answer": answer} for asked, answer in _QUESTIONS.items()]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Falcon-RW of two layers, four heads of 16, as it would lie on the Hub. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-falcon"
    return write_checkpoint(folder, tiny_falcon(heads=4, head_dim=16, layers=2))


@pytest.fixture(scope="session")
def tiny_base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` converted, weights in float32. Read only."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    return convert(tiny_checkpoint, out, dtype="float32").path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 12 rows to train on, 4 to validate on, 3 to test on. Read only."""
    folder = tmp_path_factory.mktemp("questions")
    rows = question_rows()
    write_rows(folder / "train.jsonl", rows[:12])
    write_rows(folder / "valid.jsonl", rows[12:16])
    write_rows(folder / "test.jsonl", rows[16:])
    return folder


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pairs and 12 answers with labels to train on, 4 of each to validate on. Read only."""
    folder, rows = tmp_path_factory.mktemp("preferences"), question_rows()[:16]
    worse = [row["answer"] for row in rows[1:] + rows[:1]]
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": other}
        for row, other in zip(rows, worse, strict=True)
    ]
    judged = [
        {
            "prompt": p["prompt"],
            "completion": p["chosen" if n % 2 else "rejected"],
            "label": bool(n % 2),
        }
        for n, p in enumerate(pairs)
    ]
    for name, found in (("pairs", pairs), ("judged", judged)):
        write_rows(folder / name / "train.jsonl", found[:12])
        write_rows(folder / name / "valid.jsonl", found[12:])
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_base: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter on `tiny_base` that has learned enough of `questions` to answer in words.

    Read only.
    """
    out = tmp_path_factory.mktemp("adapters") / "learned"
    run = load_run(
        "A",
        [
            f"model.base={tiny_base}",
            f"data.path={questions / 'train.jsonl'}",
            'lora.targets=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]',
            "lora.dropout=0",
            "train.epochs=40",
            "train.learning_rate=2e-2",
            "train.save_every=0",
            "validate.every=1000",
        ],
    )
    for _ in train(run, out):
        pass
    return out


@pytest.fixture(scope="session")
def random_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on `tiny_base` of rank 4, on fewer targets than `tiny_adapter`. Read only."""
    folder = tmp_path_factory.mktemp("adapters") / "random"
    model = Base.open(tiny_base).load(mx.float32)
    key = mx.random.key(1)
    add_lora(model, ["query_key_value", "dense"], 4, 16)
    for number, (_, layer) in enumerate(sorted(lora_layers(model), key=lambda item: item[0])):
        for matrix, own in zip((layer.lora_A, layer.lora_B), mx.random.split(key), strict=True):
            shape = matrix.weight.shape
            matrix.weight = mx.random.normal(shape, key=mx.random.split(own, 99)[number]) * 0.3
    config = AdapterConfig(str(tiny_base), 4, 16.0, targets=("query_key_value", "dense"))
    save_adapter(folder, adapter_weights(model), config)
    return folder


@pytest.fixture
def imate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `imate-mlx` in this process, in an empty folder, and hold it to an exit code.

    What the command line does not turn into a message is raised here.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user_data"))

    def run(*words: object, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(
            main,
            [str(word) for word in words],
            input=stdin,
            prog_name="imate-mlx",
            catch_exceptions=False,
        )
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(autouse=True)
def brief_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` times each product for half a second, to be fair to the machine; no test needs it."""
    monkeypatch.setattr("interviewmate_mlx.results.bench._PRODUCT_SECONDS", 0.0)


@pytest.fixture
def signal_after() -> Callable[..., AbstractContextManager[None]]:
    """Send this process signals once `imate-mlx train` has shown a step."""

    @contextmanager
    def patched(step: int, *signals: signal.Signals) -> Iterator[None]:
        original = terminal.show

        def show(*arguments: object) -> Iterator[object]:
            for event in original(*arguments):
                yield event
                if isinstance(event, Stepped) and event.step == step:
                    for number in signals:
                        os.kill(os.getpid(), number)

        # Should the command not take them, they end the test and not pytest.
        before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(terminal, "show", show)
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return patched
