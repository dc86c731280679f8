"""A token of the Hub is on no page that this package writes, and in no line that it prints."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hub_server import TOKEN, USER, HubServer

from interviewmate_mlx.cli import main

# The library's own, where it uploads without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# One that the Hub of the tests takes, one that it does not, and one of an older form.
TOKENS = [TOKEN, "hf_PlantedSecret0123456789abcdefghij", "api_org_PlantedSecret0123456789"]
PASSWORD = "PlantedPassword0123456789"


def written(folder: Path) -> str:
    """All that a folder's files and their names hold, but for the file of the token itself."""
    texts = []
    for path in sorted(folder.rglob("*")):
        texts.append(str(path.relative_to(folder)))
        if path.is_file() and path.name not in ("token", "stored_tokens"):
            texts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(texts)


def assert_without_secrets(*texts: str) -> None:
    for text in texts:
        for secret in (*TOKENS, PASSWORD):
            assert secret not in text
            assert secret[4:] not in text


@pytest.fixture
def hub(
    tiny_checkpoint: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[HubServer]:
    """A Hub with a model and a data set, and an empty folder to work in."""
    with HubServer({"me/tiny": tiny_checkpoint, "datasets/me/rows": questions}) as server:
        server.isolate(monkeypatch, tmp_path / "home")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield server


@pytest.fixture(params=["environment", "file"])
def plant(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Put a token where users have it."""

    def put(token: str) -> None:
        if request.param == "environment":
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            (tmp_path / "home").mkdir(exist_ok=True)
            (tmp_path / "home/token").write_text(token)

    return put


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.output


def test_no_option_takes_a_token():
    """On a command line it would be in the shell's history and in every list of processes."""

    def options(command: click.Command) -> Iterator[str]:
        for parameter in command.params:
            yield from parameter.opts
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    secret = {"token", "password", "secret", "login", "key"}
    assert [option for option in options(main) if secret & set(option.split("-"))] == []


def test_token_is_in_nothing_that_a_whole_job_writes_or_prints(
    hub, plant, tmp_path, caplog, monkeypatch
):
    plant(TOKEN)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    said = []
    with caplog.at_level(logging.DEBUG, logger="interviewmate_mlx"):
        for words in (
            "convert me/tiny",
            "train --model me/tiny --set data.path=me/rows --set train.epochs=1 --out adapter",
            "generate x --adapter adapter --max-tokens 2 --json",
            f"export adapter --out copy --push {USER}/coach",
        ):
            code, output = run(*words.split())
            assert code == 0, output
            said.append(output)
    assert any(request.authorized for request in hub.requests), "the token was never used"
    names = {path.name for path in (tmp_path / "work/adapter").iterdir()}
    assert {"README.md", "summary.json", "metrics.jsonl", "run.toml"} <= names
    uploaded = hub.uploaded[f"{USER}/coach"]
    pushed = "\n".join(content.decode("latin-1") for content in uploaded.values())
    assert_without_secrets(*said, caplog.text, written(tmp_path), pushed)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("status", [401, 403, 500])
def test_token_is_in_no_message_of_a_hub_that_refuses(
    hub, plant, tmp_path, caplog, monkeypatch, token, status
):
    plant(token)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail(status, "/", message=f"Bearer {token} is not welcome, nor is hf_{token[4:]}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes(b"")
    said = []
    with caplog.at_level(logging.DEBUG, logger="interviewmate_mlx"):
        for words in ("convert me/tiny", "data check me/rows", "generate x --model me/tiny"):
            code, output = run(*words.split())
            assert code == 1
            said.append(output)
    assert_without_secrets(*said, caplog.text, written(tmp_path))


@pytest.mark.parametrize("status", [0, 401, 500], ids=["no network", "401", "500"])
def test_password_in_the_hubs_address_is_in_no_message(
    hub, tiny_checkpoint, tmp_path, monkeypatch, caplog, status
):
    monkeypatch.setattr("time.sleep", lambda _: None)
    address = hub.endpoint.replace("://", f"://user:{PASSWORD}@")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_ENDPOINT", address)
    if status:
        hub.fail(status, "/")
    else:
        hub.__exit__()
    for words in ("convert me/tiny", "data check me/rows"):
        code, output = run(*words.split())
        assert code == 1
        assert "***@127.0.0.1" in output or status == 500  # which names the host alone
        assert_without_secrets(output, caplog.text, written(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        f"convert https://user:{TOKEN}@huggingface.co/me/tiny",
        f"train --model {TOKEN}/x --set data.path=me/rows",
        f"train --set data.path={TOKEN}",
        f"train --set {TOKEN}=1",
        f"generate x --model me/{TOKEN}",
        f"data check {TOKEN}.jsonl",
        f"export {TOKEN} --out x",
    ],
)
def test_token_that_was_pasted_in_a_wrong_place_is_not_said_again(hub, tmp_path, words):
    code, output = run(*words.split())
    assert code == 1
    assert_without_secrets(output, written(tmp_path))


def test_token_is_in_no_line_of_a_process(tiny_base, questions, tmp_path):
    """A run, and one that fails, with every variable that holds a token."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKENS[1])
    secrets = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), TOKENS[1])
    environment = os.environ | secrets | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    work = tmp_path / "work"
    work.mkdir()
    train = f"train --model {tiny_base} --set data.path={questions} --set train.epochs=1 --out a"
    script = (
        "from interviewmate_mlx.cli import main\n"
        f"main({train.split()}, standalone_mode=False)\n"
        "main(['convert', 'me/tiny'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert (work / "a/summary.json").is_file()
    assert_without_secrets(done.stdout, done.stderr, written(tmp_path))
    shutil.rmtree(work)
