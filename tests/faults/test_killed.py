"""A process that dies at any moment loses nothing: the run ends as if it had not."""

import json
import shutil
import signal

import pytest
from conftest import write_rows


def first(moments: list[str], beginning: str, after: int = 0) -> int:
    return next(n for n in range(after, len(moments)) if moments[n].startswith(beginning))


def killed_moments(moments: list[str]) -> list[int]:
    """All moments of the first save, every twelfth of the others, and the end."""
    save = first(moments, "os.mkdir /run/checkpoints")
    end_of_save = first(moments, "open run/metrics.jsonl", after=save)
    last = len(moments) - 1
    return sorted({*range(0, last, 12), *range(save - 5, end_of_save + 1), last})


def torn_moments(moments: list[str]) -> list[int]:
    """Those at which half of a file, for each name, or half a line can be on the disk."""
    names = {}
    for number, moment in enumerate(moments):
        if moment.startswith("fsync") and ".tmp-" in moment:
            names.setdefault(moment.rpartition("/")[2], number)
    lines = [n for n, moment in enumerate(moments) if moment == "open run/metrics.jsonl"]
    return sorted([*names.values(), *lines[::5]])


def test_run_killed_at_any_moment_ends_as_if_it_was_not(launchers, whole, tmp_path):
    chosen = killed_moments(whole.moments)
    assert len(chosen) >= 30
    chosen = chosen[:: launchers.stride]

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {whole.moments[moment]}"
        killed = launchers.train(work, at=moment)
        if killed.code != -signal.SIGKILL:
            return f"{what}: not killed, but exit code {killed.code}"
        resumed = launchers.go_on(work)
        return whole.compare(work, what) if resumed.code == 0 else f"{what}: {resumed.stderr}"

    launchers.each(check, chosen)


def test_run_killed_with_half_a_file_written_ends_as_if_it_was_not(launchers, whole, tmp_path):
    chosen = torn_moments(whole.moments)
    assert len(chosen) >= 4 + 6 + 2
    chosen = chosen[:: launchers.stride]

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {whole.moments[moment]}"
        assert launchers.train(work, at=moment, act="tear").code == -signal.SIGKILL
        resumed = launchers.go_on(work)
        return whole.compare(work, what) if resumed.code == 0 else f"{what}: {resumed.stderr}"

    launchers.each(check, chosen)


def test_run_killed_again_and_again_ends_as_if_it_was_not(launchers, whole, tmp_path):
    """Each time a few moments later than where it went on, until it is through."""

    def check(stride: int) -> str:
        work, times = tmp_path / str(stride), 0
        while True:
            ended = launchers.go_on(work, at=stride + times)
            if ended.code == 0:
                break
            if ended.code != -signal.SIGKILL:
                return f"after {times} kills: {ended.stderr}"
            times += 1
        return whole.compare(work, f"{times} kills") if times >= 2 else "killed once alone"

    launchers.each(check, (45, 60)[:: launchers.stride])


def test_kill_while_a_run_is_replaced_leaves_one_that_can_be(launchers, whole, tmp_path):
    options = ["--set", "train.seed=7"]
    assert launchers.train(tmp_path / "old", *options).code == 0
    shutil.copytree(tmp_path / "old", tmp_path / "dry")
    moments = launchers.train(tmp_path / "dry", "--force").moments
    assert whole.compare(tmp_path / "dry", "replaced") == ""
    begin = first(moments, "os.r")
    end = first(moments, "os.rename /run/.metrics.jsonl", after=begin)
    assert end - begin >= 12

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {moments[moment]}"
        shutil.copytree(tmp_path / "old", work)
        assert launchers.train(work, "--force", at=moment).code == -signal.SIGKILL
        run = work / "run"
        force = ["--force"] if (run / "run.toml").exists() else []
        ended = launchers.train(work, *force)
        return whole.compare(work, what) if ended.code == 0 else f"{what}: {ended.stderr}"

    launchers.each(check, range(begin, end, 2 * launchers.stride))


def test_preferences_killed_at_any_moment_end_as_if_they_were_not(launchers, tmp_path):
    """Also before their reference is written, while it is, and after."""
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "A b c.", "rejected": f"D e {n}."} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("train.method=dpo", "data.train_on=answer", f"data.path={data}", "train.epochs=3")
    options = [word for setting in settings for word in ("--set", setting)]
    whole = launchers.whole(tmp_path / "whole", *options)
    assert "reference.safetensors" in whole.contents
    written = [n for n, moment in enumerate(whole.moments) if "reference.safetensors" in moment]

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {whole.moments[moment]}"
        assert launchers.train(work, *options, at=moment).code == -signal.SIGKILL
        began = ["--resume"] if (work / "run" / "run.toml").exists() else []
        ended = launchers.train(work, *options, *began)
        return whole.compare(work, what) if ended.code == 0 else f"{what}: {ended.stderr}"

    chosen = sorted({*written, *range(0, len(whole.moments), 15)})
    launchers.each(check, chosen[:: launchers.stride])


METHODS = {
    "whole": ["train.weights=all", "lora.dropout=0.05", "train.learning_rate=1e-3"],
    "whole, bfloat16, muon": [
        "train.weights=all",
        "train.optimizer=muon",
        "lora.dropout=0.05",
        "model.dtype=bfloat16",
    ],
    "dora and lora+": ["lora.dora=true", "lora.plus_ratio=4"],
    "pissa": ["lora.init=pissa"],
    "start_from": ["lora.start_from={first}"],
    "kto": ["train.method=kto", "data.path={rows}/judged.jsonl", "data.train_on=answer"],
    "orpo": ["train.method=orpo", "data.path={rows}/pairs.jsonl"],
}


@pytest.mark.parametrize("method", METHODS)
def test_each_way_to_learn_killed_ends_as_if_it_was_not(launchers, tmp_path, method):
    """Before, while and after it is saved, and at the end."""
    numbers = range(12)
    pairs = [{"prompt": f"{n}?", "chosen": "A b c.", "rejected": f"D e {n}."} for n in numbers]
    judged = [{"prompt": f"{n}?", "completion": "A b c.", "label": n % 2 == 0} for n in numbers]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    if method == "start_from":
        assert launchers.train(tmp_path / "first").code == 0
    places = {"rows": tmp_path, "first": tmp_path / "first" / "run"}
    settings = [setting.format(**places) for setting in METHODS[method]]
    options = [word for setting in settings for word in ("--set", setting)]
    whole = launchers.whole(tmp_path / "whole", *options)
    save = first(whole.moments, "os.mkdir /run/checkpoints")
    last = len(whole.moments) - 1
    chosen = {save + 4, save + 9, (save + last) // 2, last - 8, last}

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {whole.moments[moment]}"
        assert launchers.train(work, *options, at=moment).code == -signal.SIGKILL
        began = ["--resume"] if (work / "run" / "run.toml").exists() else []
        ended = launchers.train(work, *options, *began)
        return whole.compare(work, what) if ended.code == 0 else f"{what}: {ended.stderr}"

    launchers.each(check, sorted(chosen)[:: launchers.stride])
