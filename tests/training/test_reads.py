"""On the way to the first step each file is opened once, the weights aside."""

import ctypes
import os
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interviewmate_mlx.coach.generate import load_coach
from interviewmate_mlx.config import load_run
from interviewmate_mlx.training.task import prepare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
IN_OPEN = 0x20  # sys/inotify.h


@contextmanager
def opened(*folders: Path) -> Iterator[Callable[[], Counter[str]]]:
    """Give a function that tells how often each file of some folders has been opened.

    The kernel counts, so libraries that read files from C++ or Rust count too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    watches = {
        libc.inotify_add_watch(descriptor, bytes(folder), IN_OPEN): folder for folder in folders
    }
    assert min(watches) > 0

    def count() -> Counter[str]:
        found: Counter[str] = Counter()
        data = os.read(descriptor, 1 << 20)
        while data:
            _, _, _, length = struct.unpack_from("iIII", data)
            found[data[16 : 16 + length].rstrip(b"\0").decode()] += 1
            data = data[16 + length :]
        return found - Counter({"": 10**6})  # the folders themselves

    try:
        yield count
    finally:
        os.close(descriptor)


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "base")


def test_files_of_base_and_data_are_read_once_before_the_first_step(base, questions):
    run = load_run("A", [f"model.base={base}", f"data.path={questions}"])
    with opened(base, questions) as count:
        prepare(run)
        found = count()
    weights = found.pop("model.safetensors")
    assert weights >= 1
    assert found == {
        "config.json": 1,
        "chat_template.jinja": 1,
        "tokenizer.json": 1,
        "tokenizer_config.json": 1,
        "special_tokens_map.json": 1,
        "vocab.json": 1,
        "merges.txt": 1,
        "train.jsonl": 1,
        "valid.jsonl": 1,
        "test.jsonl": 1,
    }


def test_files_of_base_and_adapter_are_read_once_before_the_first_answer(base, tiny_adapter):
    with opened(base, tiny_adapter) as count:
        load_coach(str(base), tiny_adapter)
        found = count()
    for weights in ("model.safetensors", "adapter_model.safetensors"):
        assert found.pop(weights) >= 1
    assert found["adapter_config.json"] == found["config.json"] == 1
    assert set(found.values()) == {1}
