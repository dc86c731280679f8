"""What is built and handed out: the files in it, and that it trains where there is no checkout."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from interviewmate_mlx import __version__

CHECKOUT = Path(__file__).parent.parent
PACKAGE = "interviewmate_mlx"
DATA = ("interview", "interview-1000", "interview-dialogues", "interview-preferences")
SHIPPED = {"configs": "configs"} | {f"data/{name}": f"data/{name}" for name in DATA}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation nothing is downloaded: hatchling is here.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files and nothing else."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--no-compile", "--target", str(target), str(wheel)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def expected_files() -> dict[str, Path]:
    """What the wheel holds of the package, by name, and where each file lies here."""
    ours = [p for p in (CHECKOUT / PACKAGE).rglob("*") if p.suffix == ".py" or p.name == "py.typed"]
    ours += (CHECKOUT / PACKAGE / "mini").iterdir()
    ours += (CHECKOUT / PACKAGE / "serve" / "page").iterdir()
    ours += (path for path in (CHECKOUT / PACKAGE / "doctor").rglob("*") if path.is_file())
    files = {path.relative_to(CHECKOUT).as_posix(): path for path in ours}
    for source, target in SHIPPED.items():
        for path in (CHECKOUT / source).rglob("*"):
            if path.is_file():
                files[f"{PACKAGE}/{target}/{path.relative_to(CHECKOUT / source).as_posix()}"] = path
    return files


def test_wheel_holds_the_package_with_runs_questions_and_mini_and_nothing_else(wheel):
    expected = expected_files()
    assert f"{PACKAGE}/mini/model.safetensors" in expected
    assert f"{PACKAGE}/configs/run_a.toml" in expected
    assert f"{PACKAGE}/data/interview/train.jsonl" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == set(expected)
        assert all(archive.read(name) == path.read_bytes() for name, path in expected.items())


def test_wheel_says_what_it_is(wheel):
    assert wheel.name == f"{PACKAGE}-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"{PACKAGE}-{__version__}.dist-info"
        scripts = ConfigParser()
        scripts.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert dict(scripts["console_scripts"]) == {"imate-mlx": f"{PACKAGE}.cli:main"}
        assert archive.read(f"{info}/licenses/LICENSE") == (CHECKOUT / "LICENSE").read_bytes()


def test_source_distribution_can_be_tested(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    tests = {p.relative_to(CHECKOUT).as_posix() for p in (CHECKOUT / "tests").rglob("*.py")}
    assert tests <= names
    assert {"pyproject.toml", "Makefile", "LICENSE", "README.md", "configs/run_a.toml"} <= names
    assert {f"{PACKAGE}/mini/{p.name}" for p in (CHECKOUT / PACKAGE / "mini").iterdir()} <= names


SCRIPT = """
import sys
from interviewmate_mlx.cli import main

for words in (
    ["train", "--run", "A", "--model", sys.argv[1], "--json",
     "--set", "train.epochs=1", "--set", "train.grad_accumulation=64",
     "--set", "data.max_length=96", "--set", "data.train_on=all"],
    ["generate", "What is overfitting?", "--adapter", "adapters/run_A", "--max-tokens", "8"],
    ["convert", "mini", "--json"],
):
    if code := main(words, standalone_mode=False):
        sys.exit(code)
loaded = (m for name, m in sys.modules.items() if name.startswith("interviewmate_mlx"))
print("\\n".join(module.__file__ for module in loaded), file=sys.stderr)
"""


def test_installed_wheel_trains_the_shipped_run_and_answers(installed, tiny_base, tmp_path):
    # Without `site` no .pth file is followed, so an editable install is out of reach.
    libraries = [path for path in sys.path if path.endswith("-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), *libraries])}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-W", "error", "-c", SCRIPT, str(tiny_base)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stderr.splitlines() if line.endswith(".py")]
    assert len(loaded) > 20
    assert all(Path(file).is_relative_to(installed) for file in loaded)

    summary, *answer, converted = done.stdout.splitlines()
    rows = {
        split: len(
            (installed / PACKAGE / f"data/interview/{split}.jsonl").read_bytes().splitlines()
        )
        for split in ("train", "valid")
    }
    said = json.loads(summary)
    assert said["run"] == "run_A"
    assert (said["train_rows"], said["valid_rows"]) == (rows["train"], rows["valid"])
    assert said["steps"] == -(-rows["train"] // 64)
    assert "".join(answer).strip()
    assert json.loads(converted)["num_parameters"] > 1_000_000

    adapter = load_file(tmp_path / "adapters/run_A/adapter_model.safetensors")
    trained = [array for name, array in adapter.items() if "lora_B" in name]
    assert len(trained) == 2
    assert all(np.abs(array).max() > 0 for array in trained)
