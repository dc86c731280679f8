"""Files of a run that are damaged or gone: what is whole is found, and the rest is said."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def interrupted(launchers, whole, tmp_path_factory) -> Path:
    """A run killed when steps 3 and 4 had been saved. Read only."""
    work = tmp_path_factory.mktemp("interrupted")
    saved = next(n for n, m in enumerate(whole.moments) if m.endswith("step-000002.safetensors"))
    removed = whole.moments.index("os.remove run/checkpoints/step-000002.safetensors")
    assert removed >= saved
    launchers.train(work, at=removed + 1)
    names = sorted(path.name for path in (work / "run/checkpoints").iterdir())
    assert names == ["step-000003.safetensors", "step-000004.safetensors"]
    return work


def flip(position: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "flipped in the last tensor": flip(-1),
    "flipped in the middle": flip(20_000),
    "flipped in the header": flip(60),
    "flipped in its length": flip(0),
    "nulls": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_resumed(
    launchers, whole, interrupted, tmp_path, damage
):
    work = tmp_path / "work"
    shutil.copytree(interrupted, work)
    newest = work / "run/checkpoints/step-000004.safetensors"
    damage(newest)
    damaged = newest.read_bytes()
    resumed = launchers.train(work, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert f"{newest.relative_to(work)} is damaged: " in resumed.stderr
    assert "it was set aside as step-000004.safetensors.damaged\n" in resumed.stderr
    assert "going on after step 3\n" in resumed.stderr
    aside = newest.with_name("step-000004.safetensors.damaged")
    assert aside.read_bytes() == damaged
    aside.unlink()
    assert whole.compare(work, "resumed") == ""


def test_every_flipped_byte_is_seen(interrupted, tmp_path):
    from interviewmate_mlx.errors import WeightsError
    from interviewmate_mlx.training.checkpoint import load_checkpoint

    original = interrupted / "run/checkpoints/step-000004.safetensors"
    state, _ = load_checkpoint(original)
    assert state.step == 4
    content, path = original.read_bytes(), tmp_path / "flipped.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    for position in [*range(0, header, 11), *range(header, len(content), 1009)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(WeightsError, match=r"^damaged: "):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "checkpoints/step-000003.safetensors",
        "checkpoints/step-000004.safetensors",
    ],
)
@pytest.mark.parametrize("is_empty", [False, True])
def test_file_that_is_gone_or_empty_is_made_again(
    launchers, whole, interrupted, tmp_path, name, is_empty
):
    work = tmp_path / "work"
    shutil.copytree(interrupted, work)
    (work / "run" / name).unlink()
    if is_empty:
        (work / "run" / name).touch()
    resumed = launchers.train(work, "--resume")
    assert resumed.code == 0, resumed.stderr
    for aside in (work / "run/checkpoints").glob("*.damaged"):
        aside.unlink()
    assert whole.compare(work, name) == ""


@pytest.mark.parametrize(
    ("names", "damage", "said"),
    [
        (
            ["checkpoints/step-000003.safetensors", "checkpoints/step-000004.safetensors"],
            cut,
            "TrainingError: run/checkpoints holds no checkpoint that is whole:\n"
            "  step-000004.safetensors: damaged: ",
        ),
        (
            ["checkpoints/step-000003.safetensors", "checkpoints/step-000004.safetensors"],
            Path.unlink,
            "TrainingError: Nothing to resume in run: its checkpoints are gone",
        ),
        (["run.toml"], Path.unlink, "TrainingError: Nothing to resume in run: it holds no run."),
        (["run.toml"], DAMAGES["empty"], "TrainingError: Cannot read run/run.toml: it is empty"),
        (["run.toml"], DAMAGES["nulls"], "TrainingError: Cannot read run/run.toml: "),
    ],
)
def test_what_cannot_be_made_again_is_said_in_one_message(
    launchers, interrupted, tmp_path, names, damage, said
):
    work = tmp_path / "work"
    shutil.copytree(interrupted, work)
    for name in names:
        damage(work / "run" / name)
    resumed = launchers.train(work, "--resume")
    assert (resumed.code, resumed.stdout) == (1, "")
    assert resumed.stderr.startswith(said)
    hints = ("train again into another folder.\nOptions for that: --out.\n", "Train a new one.\n")
    assert resumed.stderr.endswith(hints)
    assert not list((work / "run/checkpoints").glob("*.damaged"))


def test_what_a_power_cut_leaves_after_the_last_save_is_given_up(
    launchers, whole, interrupted, tmp_path
):
    """Blocks that were promised to the file and never written are nulls, or the old lines."""
    for number, rest in enumerate((bytes(900), bytes(90) + b"\n" + bytes(90), b'{"event": "st')):
        work = tmp_path / str(number)
        shutil.copytree(interrupted, work)
        with (work / "run/metrics.jsonl").open("ab") as file:
            file.write(rest)
        assert launchers.train(work, "--resume").code == 0
        assert whole.compare(work, "power cut") == ""


def test_lines_are_on_the_disk_before_the_checkpoint_that_counts_on_them(whole):
    for name in ("step-000002", "step-000003", "step-000004", "step-000006"):
        renamed = next(
            n for n, moment in enumerate(whole.moments) if name in moment and "os.rename" in moment
        )
        opened = max(n for n in range(renamed) if whole.moments[n] == "open run/metrics.jsonl")
        assert whole.moments[opened + 1] == "fsync /run/metrics.jsonl"
