"""The adapter folder, compared with PEFT in both directions."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import our_model, tiny_falcon
from peft import LoraConfig, PeftModel, get_peft_model

from interviewmate_mlx.adapter.config import (
    CONFIG_FILE,
    AdapterConfig,
    read_content,
    read_peft_config,
)
from interviewmate_mlx.adapter.folder import (
    WEIGHTS_FILE,
    Adapter,
    adapter_weights,
    save_adapter,
)
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.model.falcon import Model
from interviewmate_mlx.model.lora import add_lora, lora_layers, merge_lora

IDS = np.random.default_rng(0).integers(0, 384, (2, 25))
ALL_LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

# Options of PEFT's LoraConfig that this package reads.
PEFT_OPTIONS = {
    "one_layer": {"layers_to_transform": 1},
    "some_layers": {"layers_to_transform": [0], "target_modules": ["query_key_value", "dense"]},
    "layers_of_a_pattern": {"layers_to_transform": [1], "layers_pattern": "h"},
    "excluded_names": {
        "target_modules": ["query_key_value", "dense"],
        "exclude_modules": ["dense"],
    },
    "excluded_pattern": {"exclude_modules": r".*\.0\..*"},
    "plain": {},
    "several targets": {"target_modules": ALL_LINEAR},
    "rslora": {"use_rslora": True},
    "regular expression": {"target_modules": r".*\.h\.1\.(self_attention|mlp)\.dense.*"},
    "rank pattern": {
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"dense": 2, r"h\.0\.self_attention\.query_key_value": 6},
    },
    "alpha pattern": {
        "target_modules": ALL_LINEAR,
        "alpha_pattern": {r"h\.1\..*": 32, "dense_4h_to_h": 3},
    },
    "dropout": {"lora_dropout": 0.1},
}


def read_adapter_config(folder):
    return read_peft_config(folder, read_content(folder))


def their_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def their_adapter(folder, dtype=torch.float32, **options) -> np.ndarray:
    """Write an adapter of random matrices with PEFT; return the logits of PEFT with it.

    PEFT reads the adapter again for the logits: it sorts the config's patterns when it
    writes them, and the first that matches counts.
    """
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]} | options
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    model = get_peft_model(tiny_falcon(), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "lora_" in name:
                parameter.copy_(parameter.to(dtype))
    model.save_pretrained(str(folder))
    if dtype != torch.float32:
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        safetensors.torch.save_file(halved, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return their_logits(PeftModel.from_pretrained(tiny_falcon(), str(folder)).eval())


def our_adapter(folder, targets=("query_key_value",), **options) -> Model:
    config = AdapterConfig(base="tiny", rank=4, alpha=8.0, targets=tuple(targets), **options)
    model = our_model()
    add_lora(model, targets, 4, 8.0, rslora=config.rslora)
    for _, layer in lora_layers(model):
        layer.lora_B.weight = mx.random.normal(layer.lora_B.weight.shape) * 0.1
    save_adapter(folder, adapter_weights(model), config)
    return model


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
def test_adapter_made_by_peft_gives_the_logits_of_peft_here(tmp_path, options):
    expected = their_adapter(tmp_path, **options)
    model = our_model()
    before = np.array(model(mx.array(IDS)))
    Adapter.open(tmp_path).apply(model)
    model.eval()
    np.testing.assert_allclose(np.array(model(mx.array(IDS))), expected, atol=1e-4, rtol=0)
    assert np.abs(before - expected).max() > 0.01  # the adapter does something
    merge_lora(model)
    np.testing.assert_allclose(np.array(model(mx.array(IDS))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapter_is_read_into_float32(tmp_path, dtype):
    expected = their_adapter(tmp_path, dtype)
    model = our_model()
    Adapter.open(tmp_path).apply(model)
    assert {a.dtype for a in adapter_weights(model).values()} == {mx.float32}
    np.testing.assert_allclose(np.array(model(mx.array(IDS))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [["query_key_value"], ALL_LINEAR])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_made_here_gives_our_logits_in_peft(tmp_path, targets, rslora):
    model = our_adapter(tmp_path, targets, rslora=rslora)
    expected = np.array(model(mx.array(IDS)))
    loaded = PeftModel.from_pretrained(tiny_falcon(), str(tmp_path)).eval()
    np.testing.assert_allclose(their_logits(loaded), expected, atol=1e-4, rtol=0)
    merged = loaded.merge_and_unload()
    np.testing.assert_allclose(their_logits(merged), expected, atol=1e-4, rtol=0)


def test_file_has_exactly_the_keys_of_peft(tmp_path):
    their_adapter(tmp_path / "theirs")
    our_adapter(tmp_path / "ours")
    files = [safetensors.torch.load_file(tmp_path / n / WEIGHTS_FILE) for n in ("theirs", "ours")]
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in files]
    assert shapes[0] == shapes[1]


def test_folder_is_read_back_as_it_was_written(tmp_path):
    config = AdapterConfig("b", 4, 8.5, 0.1, ("dense",), True, {"a": 2}, {"a": 3.0})
    save_adapter(tmp_path, {}, config)
    assert read_adapter_config(tmp_path) == config


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", 1),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", "h"),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("lora_bias", True),
        ("target_parameters", ["x"]),
        ("exclude_modules", [1]),
        ("exclude_modules", "(dense"),
        ("trainable_token_indices", [1]),
        ("peft_type", "IA3"),
        ("r", 0),
        ("lora_alpha", "8"),
        ("lora_dropout", 1),
        ("target_modules", []),
        ("target_modules", None),
        ("rank_pattern", {"a": "b"}),
        ("rank_pattern", {"a": 2.5}),
        ("rank_pattern", {"a": 0}),
        ("rank_pattern", {"a": float("inf")}),
        ("alpha_pattern", {"a": float("nan")}),
        ("r", float("nan")),
        ("r", float("inf")),
        ("r", 2.5),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("-inf")),
        ("lora_alpha", 10**400),
        ("lora_dropout", float("nan")),
        ("use_rslora", 1),
        ("use_rslora", "false"),
        ("use_rslora", None),
    ],
)
def test_unsupported_option_is_refused_by_name(tmp_path, key, value):
    our_adapter(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(AdapterError, match=f"{key}: got"):
        Adapter.open(tmp_path).apply(our_model())


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("target_modules", "h.(0", "missing ), unterminated subpattern"),
        ("target_modules", "*dense", "nothing to repeat"),
        ("rank_pattern", {"[dense": 2}, "unterminated character set"),
        ("alpha_pattern", {"dense": 2, "+": 3}, "nothing to repeat"),
        ("alpha_pattern", {"(?i)dense": 2}, "global flags not at the start of the expression"),
        ("rank_pattern", {"a{99999999999999999999}": 2}, "the repetition number is too large"),
    ],
)
def test_invalid_regular_expression_is_refused_in_the_words_of_re(tmp_path, key, value, reason):
    our_adapter(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(tmp_path)
    assert f"{key}: got " in str(caught.value)
    assert f"expected a regular expression: {reason}\n" in str(caught.value)


@pytest.mark.parametrize("value", [True, 0, 1.5, "x", [0], {"a": None}])
def test_key_of_a_newer_peft_is_refused(tmp_path, value):
    our_adapter(tmp_path)
    edit_config(tmp_path, use_hyperlora=value)
    with pytest.raises(AdapterError, match=r"use_hyperlora: got .*written by a newer PEFT"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unused_key_of_a_newer_peft_is_ignored(tmp_path, value):
    our_adapter(tmp_path)
    expected = read_adapter_config(tmp_path)
    edit_config(tmp_path, use_hyperlora=value)
    assert read_adapter_config(tmp_path) == expected


def test_every_key_of_this_peft_is_known(tmp_path):
    our_adapter(tmp_path)
    ours = json.loads((tmp_path / CONFIG_FILE).read_text())
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    edit_config(tmp_path, **dict.fromkeys(names - set(ours), "x"), r="x")
    with pytest.raises(AdapterError, match="r: got 'x'") as caught:
        read_adapter_config(tmp_path)
    assert "newer PEFT" not in str(caught.value)


def test_rank_larger_than_a_layer_is_refused(tmp_path):
    their_adapter(tmp_path, r=65)
    with pytest.raises(AdapterError, match="query_key_value: got rank 65, expected at most 64"):
        Adapter.open(tmp_path).apply(our_model())


def test_dora_without_its_magnitudes_is_refused(tmp_path):
    their_adapter(tmp_path)
    edit_config(tmp_path, use_dora=True)
    with pytest.raises(AdapterError, match="lora_magnitude_vector: got nothing"):
        Adapter.open(tmp_path).apply(our_model())


def test_absent_rank_and_alpha_are_8_as_in_peft(tmp_path):
    our_adapter(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    del content["r"], content["lora_alpha"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    config = read_adapter_config(tmp_path)
    assert (config.rank, config.alpha) == (8, 8.0)


def rewrite(folder, change):
    tensors = change(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


FIRST = "base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight"
MISFITS = {
    "missing key": (lambda t: {k: v for k, v in t.items() if k != FIRST}, "got nothing"),
    "surplus key": (lambda t: t | {"base_model.model.x": torch.ones(1)}, "x: unexpected key"),
    "lower case": (lambda t: {k.replace("lora_A", "lora_a"): v for k, v in t.items()}, "lora_a"),
    "no prefix, other name": (lambda t: {"w." + k: v for k, v in t.items()}, "w.base_model"),
    "wrong rank": (lambda t: t | {FIRST: torch.ones(5, 64)}, r"got \(5, 64\), expected \(4, 64\)"),
    "transposed": (lambda t: t | {FIRST: t[FIRST].T.contiguous()}, r"got \(64, 4\)"),
    "not a number": (lambda t: t | {FIRST: t[FIRST] * float("nan")}, "NaN or infinity"),
    "integers": (lambda t: t | {FIRST: t[FIRST].int()}, "got int32, expected one of float32"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_adapter_that_does_not_fit_is_refused_and_the_model_unchanged(tmp_path, change, message):
    our_adapter(tmp_path)
    rewrite(tmp_path, change)
    model = our_model()
    before = np.array(model(mx.array(IDS)))
    with pytest.raises(AdapterError, match=message):
        Adapter.open(tmp_path).apply(model)
    assert not list(lora_layers(model))
    np.testing.assert_array_equal(np.array(model(mx.array(IDS))), before)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}"]
)
def test_damaged_file_is_refused(tmp_path, content):
    our_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=r"damaged|does not fit"):
        Adapter.open(tmp_path).apply(our_model())


def test_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="No adapter in"):
        Adapter.open(tmp_path).apply(our_model())


def test_exported_copy_has_no_checkpoints(tmp_path):
    our_adapter(tmp_path / "run")
    for name in ("README.md", "run.toml", "checkpoints/step-000001.safetensors", ".hidden"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    Adapter.open(tmp_path / "run").export(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {WEIGHTS_FILE, CONFIG_FILE, "README.md", "run.toml"}
    with pytest.raises(AdapterError, match="already exists"):
        Adapter.open(tmp_path / "run").export(tmp_path / "copy")
    (tmp_path / "run" / "README.md").write_text("new")
    Adapter.open(tmp_path / "run").export(tmp_path / "copy", replace=True)
    assert (tmp_path / "copy" / "README.md").read_text() == "new"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Where a copy may not go, with or without `replace`; relative to the folder that holds `run`.
NO_EXPORTS = {
    "own files": ("mine", "is not an exported adapter"),
    "a run with checkpoints": ("other", "is not an exported adapter"),
    "a file": ("file", "is not an exported adapter"),
    "the source": ("run", "is the adapter to be copied, or contains it"),
    "a link to the source": ("link", "is the adapter to be copied, or contains it"),
    "a parent of the source": (".", "is the adapter to be copied, or contains it"),
    "the source's checkpoints": ("run/checkpoints", "is not an exported adapter"),
}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("out", "reason"), NO_EXPORTS.values(), ids=NO_EXPORTS)
def test_nothing_but_an_exported_adapter_is_replaced(tmp_path, out, reason, replace):
    for name in ("run", "other"):
        our_adapter(tmp_path / name)
        (tmp_path / name / "checkpoints").mkdir()
        (tmp_path / name / "checkpoints" / "state").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / CONFIG_FILE).write_text("{}")  # the parent looks like an export
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=reason) as caught:
        Adapter.open(tmp_path / "run").export(tmp_path / out, replace=replace)
    assert "--force" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("replace", [False, True])
def test_export_into_an_empty_folder_is_allowed(tmp_path, replace):
    our_adapter(tmp_path / "run")
    (tmp_path / "copy").mkdir()
    Adapter.open(tmp_path / "run").export(tmp_path / "copy", replace=replace)
    assert read_adapter_config(tmp_path / "copy") == read_adapter_config(tmp_path / "run")


def test_what_a_system_leaves_in_a_folder_is_no_content(tmp_path):
    our_adapter(tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", "Thumbs.db", "._run.toml"):
        (out / name).write_bytes(b"x")
    Adapter.open(tmp_path / "adapter").export(out)
    assert (out / WEIGHTS_FILE).is_file()
