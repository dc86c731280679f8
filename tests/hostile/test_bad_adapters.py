"""Adapters that lie: refused with the file, what it says and what it should say."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
from refusals import Bad, check, listing
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "transformer.h.0.self_attention.query_key_value.lora_A.weight"
FULL = f"base_model.model.{KEY}"
GENERATE = "generate 'What is a loss?' --model BASE --adapter IN"


def bad(name: str, change: Callable[[Path], object], *says: str, words: str = GENERATE) -> Bad:
    return Bad(name, change, words, "AdapterError", says)


def config(name: str, *says: str, words: str = GENERATE, **changes: object) -> Bad:
    def change(folder: Path) -> None:
        value = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(value | changes))

    return bad(name, change, *says, words=words)


def tensors(name: str, change: Callable[[dict[str, Any]], object], *says: str, **more: str) -> Bad:
    def apply(folder: Path) -> None:
        loaded = load_file(folder / WEIGHTS)
        change(loaded)
        save_file(loaded, folder / WEIGHTS, metadata={"format": "pt"})

    return bad(name, apply, *says, **more)


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def link(file: str, target: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return change


def poison(value: float) -> Callable[[dict[str, Any]], object]:
    def change(loaded: dict[str, Any]) -> None:
        loaded[FULL][1, 7] = value

    return change


EXPORT = "export IN --out copy"
SAID = f"IN/{CONFIG} has settings that are not supported"
ADAPTERS = [
    # the folder
    bad("no config", lambda f: (f / CONFIG).unlink(), f"No adapter in IN: it has no {CONFIG}"),
    bad("no weights", lambda f: (f / WEIGHTS).unlink(), f"IN has no {WEIGHTS}"),
    bad(
        "a pickle for weights",
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "Adapters in pickle files (adapter_model.bin) are not read",
    ),
    bad(
        "folder for weights",
        lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()],
        f"IN has no {WEIGHTS}",
    ),
    bad(
        "folder for a config",
        lambda f: [(f / CONFIG).unlink(), (f / CONFIG).mkdir()],
        f"Cannot read IN/{CONFIG}: Is a directory",
    ),
    bad("config elsewhere", link(CONFIG, "/etc/hostname"), f"{CONFIG}: links to /etc/hostname"),
    bad("weights elsewhere", link(WEIGHTS, "../x"), f"IN has no {WEIGHTS}"),
    bad(
        "card elsewhere",
        link("README.md", "/etc/passwd"),
        "README.md: links to /etc/passwd, expected a file in the folder",
        words=EXPORT,
    ),
    # its config
    bad("half a config", write(CONFIG, b'{"r":'), f"IN/{CONFIG} is not JSON: Expecting value"),
    bad("config is a list", write(CONFIG, b"[]"), "got a JSON list, expected an object"),
    bad(
        "config in UTF-16",
        write(CONFIG, "{}".encode("utf-16")),
        f"IN/{CONFIG} is not JSON: 'utf-8'",
    ),
    bad("deep config", write(CONFIG, b"[" * 99_999), "nested too deeply"),
    bad("config of 2 MB", write(CONFIG, b" " * (2 << 20)), "larger than 1 MB"),
    bad("5000 digits", write(CONFIG, b'{"r":' + b"9" * 5000 + b"}"), "limit (4300 digits)"),
    bad("another kind", write(CONFIG, b'{"peft_type": "IA3"}'), "peft_type: got 'IA3', expected"),
    config("rank of a text", SAID, "r: got '8', expected a whole number", r="8"),
    config("rank 0", "r: got 0, expected a whole number of at least 1", r=0),
    config("rank of a half", "r: got 1.5, expected a whole number", r=1.5),
    config("rank of a bool", "r: got True, expected a whole number", r=True),
    config("alpha NaN", "lora_alpha: got nan, expected a finite number", lora_alpha=float("nan")),
    config("alpha infinite", "lora_alpha: got inf, expected a finite", lora_alpha=float("inf")),
    config("alpha of a list", "lora_alpha: got [16], expected a finite number", lora_alpha=[16]),
    config("dropout 1", "lora_dropout: got 1, expected from 0 to below 1", lora_dropout=1),
    config("rslora of a text", "use_rslora: got 'no', expected true or false", use_rslora="no"),
    config("DoRA of a text", "use_dora: got 'no', expected true or false", use_dora="no"),
    config("modules to save", "modules_to_save: got ['x'], expected None", modules_to_save=["x"]),
    config("a newer PEFT", "use_next: got 1, expected no such key", use_next=1),
    config(
        "base of a list", "base_model_name_or_path: got ['x'], exp", base_model_name_or_path=["x"]
    ),
    config("no targets", "target_modules: got [], expected names", target_modules=[]),
    config("targets of numbers", "target_modules: got [1], expected names", target_modules=[1]),
    config("targets of a map", "target_modules: got {}, expected names", target_modules={}),
    config("targets that match nothing", "target_modules: ['q_proj']", target_modules=["q_proj"]),
    config("pattern that matches nothing", "target_modules: 'x.*'", target_modules="x.*"),
    config("broken pattern", "expected a regular expression: ", target_modules="(((("),
    config("pattern of 2000 letters", "2000 characters, expected", target_modules="a" * 2000),
    config("pattern of a billion", "at most 1000 repeats", target_modules="(a{9999}){9999}"),
    config("broken rank pattern", "rank_pattern: got '[', expected", rank_pattern={"[": 2}),
    config("rank pattern of texts", "rank_pattern: got {'x': 'y'}, exp", rank_pattern={"x": "y"}),
    config("alpha pattern of a list", "alpha_pattern: got [1], expected", alpha_pattern=[1]),
    # its weights
    config(
        "wrong rank", "IN does not fit this model", f"{KEY}: got (2, 64), expected (8, 64)", r=8
    ),
    config("rank beyond reason", f"{KEY}: got (2, 64), expected (1000000000, 64)", r=10**9),
    config(
        "other targets",
        "transformer.h.0.mlp.dense_h_to_4h.lora_A.weight: got nothing, expected (2, 64)",
        f"{KEY}: unexpected key",
        target_modules=["dense_h_to_4h"],
    ),
    tensors("of another base", lambda t: t.update({FULL: np.ones((2, 99), "f4")}), "(2, 99), exp"),
    tensors("a matrix missing", lambda t: t.pop(FULL), f"{KEY}: got nothing, expected (2, 64)"),
    tensors(
        "a surplus key",
        lambda t: t.update(evil=np.ones(3, "f4")),
        "evil: unexpected key",
    ),
    tensors(
        "keys that match nothing",
        lambda t: [t.update({name.lower(): t.pop(name)}) for name in list(t)],
        f"{KEY}: got nothing",
        f"{KEY.lower()}: unexpected key",
    ),
    tensors(
        "with the prefix and without",
        lambda t: t.update({KEY: t[FULL]}),
        "the same matrix with and without the prefix",
    ),
    tensors("NaN", poison(np.nan), f"IN/{WEIGHTS} holds NaN or infinity", KEY),
    tensors("infinity", poison(np.inf), "holds NaN or infinity", KEY),
    tensors("NaN, exported", poison(np.nan), "holds NaN or infinity", KEY, words=EXPORT),
    tensors("NaN, pushed", poison(np.nan), "holds NaN", KEY, words="export IN --push me/x"),
    tensors("integers", lambda t: t.update({FULL: np.ones((2, 64), "i4")}), "got int32, expected"),
    bad("half the weights", lambda f: os.truncate(f / WEIGHTS, 900), f"IN/{WEIGHTS} is damaged"),
    bad("no bytes", write(WEIGHTS, b""), "claims 0 bytes in a file of 0"),
    bad("header of 2**62", write(WEIGHTS, b"\xff" * 7 + b"\x3f{}"), "is damaged: ", "expected"),
    bad(
        "offsets beyond the file",
        write(
            WEIGHTS,
            fuzzing.with_header(
                json.dumps(
                    {FULL: {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}
                ).encode()
            ),
        ),
        "is damaged: ",
        "expected 45",
    ),
    bad(
        "name that steers the terminal",
        write(WEIGHTS, fuzzing.with_header(b'{"\\u001b[2J": 1}', data=b"")),
        "a name that cannot be printed",
    ),
    bad("a pickle in disguise", write(WEIGHTS, fuzzing.torch_archive(fuzzing.STATE)), "is damaged"),
    # the base that it names
    Bad(
        "base that is not there",
        lambda f: (f / CONFIG).write_text(
            (f / CONFIG).read_text().replace("base_model_name_or_path", "revision")
        ),
        "generate 'What is a loss?' --adapter IN",
        "ConfigError",
        ("No base: name one",),
    ),
]


@pytest.mark.parametrize("bad", ADAPTERS, ids=str)
def test_bad_adapter_is_refused(bad, tmp_path, adapter, tiny_base):
    def make(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        bad.make(folder)

    check(Bad(bad.name, make, bad.words, bad.error, bad.says), tmp_path, {"BASE": tiny_base})


def test_the_copies_are_good_before_they_are_changed(imate, adapter, tiny_base):
    imate("generate", "x", "--model", tiny_base, "--adapter", adapter, "--max-tokens", "1")
    imate("export", adapter, "--out", "copy")


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_pattern_that_would_take_years_is_given_up(tmp_path, adapter, tiny_base, key, monkeypatch):
    monkeypatch.setattr("interviewmate_mlx.adapter.config._MAX_MATCHING_S", 0.01)
    pattern = "(.|.)*[^a-z_.0-9A-Z]"
    changes = {key: pattern if key == "target_modules" else {pattern: 2}}
    slow = config("slow", "cannot be matched with transformer.h.0", "one by one", **changes)

    def make(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        slow.make(folder)

    check(Bad("", make, GENERATE, "AdapterError", slow.says), tmp_path, {"BASE": tiny_base})


def test_push_sends_nothing_that_a_link_leads_to(tmp_path, adapter):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "README.md").symlink_to("/etc/passwd")
    before = listing(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    check(
        Bad(
            "",
            lambda _: None,
            "export ADAPTER --push me/coach",
            "AdapterError",
            ("README.md: links to /etc/passwd",),
        ),
        root,
        {"ADAPTER": folder},
    )
    shutil.rmtree(root)
    assert listing(tmp_path) == before
