"""The examples run as a reader runs them, without a network, and write where they say."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import interviewmate_mlx
from interviewmate_mlx.adapter.folder import Adapter

CHECKOUT = Path(interviewmate_mlx.__file__).parent.parent
EXAMPLES = sorted((CHECKOUT / "examples").glob("*.py"))


def run(name: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run an example in an empty folder, with a Hub that cannot be reached."""
    (folder / "tmp").mkdir()
    # MLX keeps the kernels that it has compiled for a CPU there: a minute's work.
    kernels = Path(tempfile.gettempdir()) / "mlx"
    kernels.mkdir(exist_ok=True)
    (folder / "tmp" / "mlx").symlink_to(kernels)
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    here = folder / "here"
    here.mkdir()
    script = CHECKOUT / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), *words],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def written(folder: Path) -> set[str]:
    return {path.name for path in (folder / "here").iterdir()}


def test_own_data_trains_on_rows_of_its_own_and_answers(tmp_path):
    said = run("own_data", tmp_path, "--out", "mine").stdout
    assert "rows: 8 train, 1 valid, 3 test\n" in said
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    assert said.partition("What is a transaction?\n")[2].strip()
    assert written(tmp_path) == {"mine"}
    adapter = Adapter.open(tmp_path / "here" / "mine" / "adapter")
    assert adapter.config.base == "mini"


def test_own_loop_stops_at_its_condition_and_goes_on_to_the_end(tmp_path):
    said = run("own_loop", tmp_path).stdout
    (stopped,) = re.findall(r"good enough after step (\d+): a loss of (\d\.\d+)", said)
    assert int(stopped[0]) < 18
    assert float(stopped[1]) <= 2.0
    steps = [int(step) for step in re.findall(r"\] step (\d+)/18 ", said)]
    assert steps == list(range(1, 19))
    assert f"from step {stopped[0]} of 18\n" in said
    assert "18 steps: training loss" in said
    # The temporary folder is gone.
    assert written(tmp_path) == set()
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["mlx"]


@pytest.mark.usefixtures("with_torch")
def test_peft_round_trip_finds_the_same_logits(tmp_path):
    done = run("peft_round_trip", tmp_path)
    (changed,) = re.findall(r"changes logits by up to ([\d.e+-]+)", done.stdout)
    assert float(changed) > 0.01
    differences = re.findall(r"logits differ by at most ([\d.e+-]+)", done.stdout)
    assert len(differences) == 2
    assert all(float(difference) <= 1e-4 for difference in differences)
    assert "Unable to fetch" not in done.stderr
    assert written(tmp_path) == set()


def test_example_without_torch_says_what_to_install(tmp_path):
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError('No module named peft')\n")
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "examples" / "peft_round_trip.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'pip install ".[cpu,test]"' in done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_run_here_and_named_in_the_docs(path):
    assert f'run("{path.stem}", ' in Path(__file__).read_text(encoding="utf-8")
    pages = "".join(page.read_text("utf-8") for page in (CHECKOUT / "docs").glob("*.md"))
    assert f"examples/{path.name}" in pages
