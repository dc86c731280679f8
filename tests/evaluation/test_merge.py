"""Merged models against base and adapter, against PEFT's own merging, and quantised."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import tiny_falcon, write_checkpoint
from mlx_lm.utils import load_model
from networks import write_network
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import AdapterError, ConfigError
from interviewmate_mlx.evaluation import survival
from interviewmate_mlx.evaluation.merge import merge
from interviewmate_mlx.training.loop import train

IDS = np.random.default_rng(0).integers(3, 384, (1, 20))


def random_adapter(folder: Path, base: Path, reference, seed: int, **settings) -> Path:
    """A PEFT adapter that changes much, as PEFT saves it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **settings},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(copy.deepcopy(reference), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(params=["falcon", "llama", "gemma3_text"])
def setting(request, tmp_path):
    """A base, transformers' own of it, and two adapters."""
    base = tmp_path / "base"
    if request.param == "falcon":
        reference = tiny_falcon(heads=4, head_dim=16, layers=2).float().eval()
        convert(write_checkpoint(tmp_path / "source", reference), base, dtype="float32")
    else:
        reference = write_network(base, request.param)
    adapters = [
        random_adapter(tmp_path / name, base, reference, seed)
        for seed, name in enumerate(("one", "two"))
    ]
    return base, reference, adapters


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = Base.open(folder).load(mx.float32)
    if adapter:
        Adapter.open(adapter).apply(model)
    return np.array(model.eval()(mx.array(IDS)))


def of_transformers(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


# Float32 sums of some hundred products, in another order; logits below 30.
ATOL = 2e-4


def test_merged_model_gives_the_logits_of_base_and_adapter_everywhere(setting, tmp_path):
    base, _, (adapter, _) = setting
    expected = logits(base, adapter)
    assert np.abs(expected - logits(base)).max() > 0.1  # so the adapter matters
    merged = merge([adapter], tmp_path / "merged")
    assert merged.nbytes < (tmp_path / "merged" / "model.safetensors").stat().st_size
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=ATOL)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(of_transformers(loaded), expected, atol=ATOL)
    stock, _ = load_model(tmp_path / "merged", trust_remote_code=True)
    if "gemma3" not in str(json.loads((base / "config.json").read_text())["model_type"]):
        np.testing.assert_allclose(np.array(stock(mx.array(IDS))), expected, atol=ATOL)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5], [0.6]])
def test_weighted_adapters_equal_peft_s_linear_combination(setting, weights, tmp_path):
    _, reference, adapters = setting
    adapters = adapters[: len(weights)]
    model = PeftModel.from_pretrained(copy.deepcopy(reference), adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    names = [str(number) for number in range(len(weights))]
    model.add_weighted_adapter(names, weights, "sum", combination_type="linear")
    model.set_adapter("sum")
    merge(adapters, tmp_path / "merged", weights=weights)
    np.testing.assert_allclose(logits(tmp_path / "merged"), of_transformers(model), atol=ATOL)


def test_adapters_of_other_ranks_are_not_combined(setting, tmp_path):
    base, reference, (one, _) = setting
    other = random_adapter(tmp_path / "rank2", base, reference, 5, r=2)
    with pytest.raises(AdapterError, match="ranks differ"):
        merge([one, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_merging_into_a_quantised_base_comes_out_plain(dtype, tmp_path):
    reference = write_network(tmp_path / "plain", "llama", intermediate_size=128)
    convert(tmp_path / "plain", tmp_path / "base", quantization=Quantization.of(4, 32))
    adapter = random_adapter(tmp_path / "a", tmp_path / "base", reference, 0)
    merge([adapter], tmp_path / "merged", dtype=dtype)
    assert "quantization" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    expected = logits(tmp_path / "base", adapter)
    atol = 0.3 if dtype == "bfloat16" else ATOL
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=atol)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(of_transformers(loaded), expected, atol=atol)


def test_card_says_base_revision_and_licence(tmp_path):
    reference = write_network(tmp_path / "source", "llama", num_hidden_layers=1)
    (tmp_path / "source" / "README.md").write_text(
        "---\nlibrary_name: x\nlicense: apache-2.0\n---\n", encoding="utf-8"
    )
    convert(tmp_path / "source", tmp_path / "base", source_name="some/llama", revision="abc123")
    adapter = random_adapter(tmp_path / "a", tmp_path / "base", reference, 0)
    merge([adapter], tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: some/llama\n")
    assert "`some/llama` at revision `abc123`. Its licence is `apache-2.0`" in card


def test_only_what_was_merged_here_is_replaced(setting, tmp_path):
    base, _, (adapter, _) = setting
    out = tmp_path / "merged"
    merge([adapter], out)
    with pytest.raises(AdapterError, match="exists"):
        merge([adapter], out)
    merge([adapter], out, replace=True)
    with pytest.raises(AdapterError, match="no merge wrote it"):
        merge([adapter], base, replace=True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, questions):
    """A small base and an adapter that has learned its rows."""
    folder = tmp_path_factory.mktemp("survival")
    write_network(folder / "base", "llama", intermediate_size=128, initializer_range=0.05)
    settings = [f"model.base={folder / 'base'}", f"data.path={questions}", "train.epochs=6"]
    settings += ["train.learning_rate=5e-3", "lora.targets=all-linear", "lora.dropout=0"]
    list(train(load_run("A", settings), folder / "adapter"))
    return folder


def test_quantising_the_merged_weights_says_what_is_left_of_the_adapter(learned, tmp_path):
    quantization = Quantization.of(8, 32)
    merged = merge([learned / "adapter"], tmp_path / "merged", quantization=quantization)
    assert merged.survival
    assert merged.survival.merged < merged.survival.base - 0.5
    assert 0.9 < merged.survival.share < 1.1  # eight bits keep nearly all
    opened = Base.open(tmp_path / "merged")
    assert opened.quantization == quantization
    expected = logits(learned / "base", learned / "adapter")
    error = np.abs(logits(tmp_path / "merged") - expected).max()
    assert error < 0.1 * np.abs(expected).max()


def test_quantising_that_loses_the_adapter_is_refused(learned, tmp_path, monkeypatch):
    """Losses of the base, plain and quantised, and of the merged model: 0.4 of 1 is left."""
    losses = iter([3.0, 3.1, 2.0, 2.7])
    monkeypatch.setattr(survival, "_loss", lambda *_: next(losses))
    with pytest.raises(AdapterError) as caught:
        merge([learned / "adapter"], tmp_path / "merged", quantization=Quantization.of(2, 32))
    assert "40% of the adapter's effect on the loss would be left, expected at least 50%" in str(
        caught.value
    )
    assert not (tmp_path / "merged").exists()


def test_adapter_without_an_effect_is_not_measured(learned, tmp_path, monkeypatch):
    losses = iter([3.0, 3.0, 3.1, 3.1])
    monkeypatch.setattr(survival, "_loss", lambda *_: next(losses))
    with pytest.raises(AdapterError, match="does not lower the loss on these rows"):
        merge([learned / "adapter"], tmp_path / "merged", quantization=Quantization.of(4, 32))


def test_adapter_without_rows_needs_data_to_be_quantised(setting, tmp_path):
    _, _, (adapter, _) = setting
    with pytest.raises(AdapterError, match="does not say what it was trained on"):
        merge([adapter], tmp_path / "merged", quantization=Quantization.of(8, 32))


def test_adapters_of_other_bases_are_not_merged(setting, tmp_path):
    _, reference, (one, _) = setting
    other = random_adapter(tmp_path / "other", tmp_path / "elsewhere", reference, 3)
    with pytest.raises(ConfigError, match="different bases"):
        merge([one, other], tmp_path / "merged")


_PEAK = """
import resource, sys
from pathlib import Path
from interviewmate_mlx.evaluation import survival
from interviewmate_mlx.evaluation.merge import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge([Path(sys.argv[1])], Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_merging_takes_a_tensor_s_memory_and_not_the_model_s(tmp_path):
    reference = write_network(
        tmp_path / "base", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=16
    )
    adapter = random_adapter(tmp_path / "a", tmp_path / "base", reference, 0)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", _PEAK, str(adapter), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    taken = int(done.stdout) * unit
    assert size > 200e6
    assert taken < 0.6 * size  # all of it would be more than once its size
