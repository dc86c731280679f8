"""The command in surroundings that lack something: MLX, a terminal that shows all, open files."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

IMATE = str(Path(sys.executable).with_name("imate-mlx"))


def run(*words: str, code: int = 0, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(words), capture_output=True, text=True, **options)
    assert done.returncode == code, done.stderr
    return done


# In place of an environment into which no extra was installed.
WITHOUT_MLX = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlx":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "What is a loss?", "--model", "mini"],
        ["train", "--run", "mini"],
        ["bench", "--run", "mini"],
        ["doctor"],
        ["--version", "--verbose"],
    ],
    ids=lambda words: words[0],
)
def test_without_mlx_one_message_names_the_extras(tmp_path, words):
    program = f"{WITHOUT_MLX}\nfrom interviewmate_mlx.cli.main import main\nmain({words})"
    done = run(sys.executable, "-c", program, code=1, cwd=tmp_path)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "BackendError: MLX is not installed: on Linux the backend is an extra of its own.",
        'Install one: pip install "interviewmate-mlx[cpu]", or [cuda12] or [cuda13] for an '
        "NVIDIA GPU.",
    ]


def test_without_mlx_python_gets_the_same_message(tmp_path):
    program = f"{WITHOUT_MLX}\nimport interviewmate_mlx.training.loop"
    done = run(sys.executable, "-c", program, code=1, cwd=tmp_path)
    assert "BackendError: MLX is not installed" in done.stderr
    assert "interviewmate-mlx[cpu]" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_without_mlx_what_needs_none_works(tmp_path, words):
    program = f"{WITHOUT_MLX}\nfrom interviewmate_mlx.cli.main import main\nmain({words})"
    assert run(sys.executable, "-c", program, cwd=tmp_path).stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_preview_shows_what_the_terminal_can_and_escapes_the_rest(tmp_path, encoding):
    texts = {"question": "Was ist größer, 🦙 or 日本?", "answer": "Größer is the 🦙, naïvely."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(texts), encoding="utf-8")
    done = subprocess.run(
        [IMATE, "data", "preview", "rows.jsonl", "--model", "mini"],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    for char in "ö🦙日":
        try:
            shown = char.encode(encoding).decode(encoding)
        except UnicodeEncodeError:
            shown = char.encode("ascii", "backslashreplace").decode()
        assert shown in said
    assert "\N{REPLACEMENT CHARACTER}" not in said
    assert "?" not in said.replace("日本?", "").replace(r"\u65e5\u672c?", "")


def test_few_open_files_are_enough(tmp_path):
    """mlx-lm asks for 4,096 when it is imported, which is an error where fewer are allowed."""
    program = textwrap.dedent("""
        import resource, sys
        from interviewmate_mlx.cli.main import main
        import mlx_lm.utils
    """)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 2048))

    words = [IMATE, "generate", "What is a loss?", "--model", "mini", "--max-tokens", "2"]
    run(*words, cwd=tmp_path, preexec_fn=limit)
    run(IMATE, "--version", "--verbose", cwd=tmp_path, preexec_fn=limit)
    # It would be one without our care, or this shows nothing.
    run(sys.executable, "-c", program, code=1, cwd=tmp_path, preexec_fn=limit)
