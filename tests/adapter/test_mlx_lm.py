"""Adapters of mlx-lm's own tuner: read, turned into PEFT folders, and written."""

import copy
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import tiny_falcon, write_checkpoint
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
from networks import write_network
from peft import PeftModel

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import Adapter, adapter_weights, save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.coach.generate import answer, load_coach
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.model.lora import add_lora

IDS = np.random.default_rng(0).integers(3, 384, (1, 20))
ATOL = 2e-4


@pytest.fixture(params=["falcon", "llama"])
def base(request, tmp_path):
    """A base's folder, and transformers' own network of it."""
    folder = tmp_path / "base"
    if request.param == "falcon":
        reference = tiny_falcon(heads=4, head_dim=16, layers=3).float().eval()
        convert(write_checkpoint(tmp_path / "source", reference), folder, dtype="float32")
    else:
        reference = write_network(folder, "llama")
    return folder, reference


def write_theirs(
    folder: Path, base: Path, num_layers: int, dora: bool = False, **settings
) -> np.ndarray:
    """An adapter as mlx-lm's trainer saves it; the logits of base and adapter in mlx-lm."""
    model, _ = load_model(base, trust_remote_code=True)
    model.freeze()
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.1, **settings}
    linear_to_lora_layers(model, num_layers, parameters, use_dora=dora)
    trained = tree_flatten(model.trainable_parameters(), destination={})
    mx.random.seed(3)
    arrays = {name: 0.1 * mx.random.normal(array.shape) for name, array in trained.items()}
    arrays |= {name: mx.abs(a) * 5 + 0.5 for name, a in arrays.items() if name.endswith(".m")}
    model.load_weights(list(arrays.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
    config |= {"model": str(base), "iters": 100, "learning_rate": 1e-5}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return np.array(model.eval()(mx.array(IDS)))


def ours(base: Path, adapter: Path) -> np.ndarray:
    model = Base.open(base).load(mx.float32)
    Adapter.open(adapter).apply(model)
    return np.array(model.eval()(mx.array(IDS)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("num_layers", [2, -1])
def test_adapter_of_mlx_lm_is_read_and_becomes_a_peft_folder(base, num_layers, dora, tmp_path):
    folder, reference = base
    expected = write_theirs(tmp_path / "theirs", folder, num_layers, dora)
    np.testing.assert_allclose(ours(folder, tmp_path / "theirs"), expected, atol=ATOL)
    adapter = Adapter.open(tmp_path / "theirs")
    assert (adapter.config.rank, adapter.config.alpha, adapter.config.dropout) == (4, 12.0, 0.1)
    again = tmp_path / "again"
    adapter.export_as_mlx_lm(again, Base.open(folder).load(mx.float32))
    np.testing.assert_allclose(ours(folder, again), expected, atol=ATOL)
    model, _ = load_model(folder, trust_remote_code=True)
    load_adapters(model, again)
    np.testing.assert_allclose(np.array(model.eval()(mx.array(IDS))), expected, atol=ATOL)
    adapter.export(tmp_path / "peft")
    np.testing.assert_allclose(ours(folder, tmp_path / "peft"), expected, atol=ATOL)
    loaded = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "peft").eval()
    with torch.no_grad():
        logits = loaded(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=ATOL)


def test_chosen_layers_of_mlx_lm_are_understood(base, tmp_path):
    folder, _ = base
    key = "self_attn.q_proj" if "llama" in str((folder / "config.json").read_text()) else None
    key = key or "self_attention.dense"
    expected = write_theirs(tmp_path / "theirs", folder, 1, keys=[key])
    assert Adapter.open(tmp_path / "theirs").config.targets == (key.rpartition(".")[2],)
    np.testing.assert_allclose(ours(folder, tmp_path / "theirs"), expected, atol=ATOL)


def write_ours(folder: Path, base: Path) -> Path:
    """An adapter of this package that changes much."""
    model = Base.open(base).load(mx.float32)
    mx.random.seed(4)
    targets = tuple(model.attention_targets)
    add_lora(model, targets, rank=4, alpha=8)
    weights = {n: 0.3 * mx.random.normal(a.shape) for n, a in adapter_weights(model).items()}
    save_adapter(folder, weights, AdapterConfig(str(base), 4, 8.0, targets=targets))
    return folder


def test_exported_adapter_gives_mlx_lm_the_same_text(base, tmp_path, imate):
    folder, _ = base
    write_ours(tmp_path / "ours", folder)
    imate("export", tmp_path / "ours", "--as", "mlx-lm", "--out", tmp_path / "theirs")
    model, _ = load_model(folder, trust_remote_code=True)
    load_adapters(model, tmp_path / "theirs")
    got = np.array(model.eval()(mx.array(IDS)))
    np.testing.assert_allclose(got, ours(folder, tmp_path / "ours"), atol=ATOL)
    # mlx-lm's own loading and generating, on a prompt as ours puts it.
    if (folder / "falcon.py").is_file():
        model, tokenizer = load(
            str(folder), adapter_path=str(tmp_path / "theirs"), trust_remote_code=True
        )
        said = generate(model, tokenizer, "Question: Why?\nAnswer:", max_tokens=12)
        coach, own = load_coach(None, tmp_path / "ours", dtype="float32")
        assert said.strip() == answer(coach, own, "Why?", Sampling(max_tokens=12))
    # And back.
    np.testing.assert_allclose(ours(folder, tmp_path / "theirs"), got, atol=ATOL)


def test_what_mlx_lm_cannot_hold_is_refused(base, tmp_path):
    folder, _ = base
    model = Base.open(folder).load(mx.float32)
    add_lora(model, model.attention_targets, rank=4, alpha=8)
    weights = adapter_weights(model)
    first = {name: a for name, a in weights.items() if ".0." in name}
    targets = tuple(model.attention_targets)
    config = AdapterConfig(str(folder), 4, 8.0, targets=targets, layer_numbers=(0,))
    save_adapter(tmp_path / "first", first, config)
    with pytest.raises(AdapterError, match="expected the last ones"):
        Adapter.open(tmp_path / "first").export_as_mlx_lm(
            tmp_path / "out", Base.open(folder).build(mx.float32)
        )
    assert not (tmp_path / "out").exists()


BAD = {
    "another kind": ({"fine_tune_type": "ia3"}, "got 'ia3', expected 'lora' or 'dora'"),
    "whole weights": ({"fine_tune_type": "full"}, "fine_tune_type: got 'full'"),
    "no settings": ({"lora_parameters": None}, "lora_parameters.rank: got None"),
    "another rank": (
        {"lora_parameters": {"rank": 8, "scale": 1.0}},
        "got rank 4, expected 8",
    ),
    "a scale that is no number": (
        {"lora_parameters": {"rank": 4, "scale": "x"}},
        "lora_parameters.scale: got 'x'",
    ),
    "a dropout of one": (
        {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 1}},
        "lora_parameters.dropout: got 1, expected from 0 to below 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter_of_mlx_lm_is_refused(case, tmp_path):
    changes, expected = BAD[case]
    write_network(tmp_path / "base", "llama", num_hidden_layers=1)
    write_theirs(tmp_path / "theirs", tmp_path / "base", -1)
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")
    with pytest.raises(AdapterError) as caught:
        Adapter.open(tmp_path / "theirs")
    assert expected in str(caught.value)


def test_adapter_of_mlx_lm_without_its_matrices_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "num_layers": 1}', encoding="utf-8"
    )
    with pytest.raises(AdapterError, match=r"has no adapters\.safetensors"):
        Adapter.open(tmp_path)
