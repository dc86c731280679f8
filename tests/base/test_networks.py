"""Folders of other networks than Falcon-RW: opened, converted, quantised."""

import json
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from checkpoints import tiny_falcon, write_checkpoint
from hub_server import HubServer
from mlx_lm.utils import load_model
from networks import edit_config, write_network
from transformers import AutoModelForCausalLM

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.base.record import origin_of
from interviewmate_mlx.data.prompts import encode
from interviewmate_mlx.errors import ModelError, WeightsError

IDS = np.random.default_rng(0).integers(3, 384, (1, 20))


def logits(base: Base | Path, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    base = base if isinstance(base, Base) else Base.open(base)
    return np.array(base.load(dtype)(mx.array(IDS)).astype(mx.float32))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_network(tmp_path / "source", "llama", num_hidden_layers=2)
    return tmp_path / "source"


def test_files_are_taken_as_they_are(source, tmp_path):
    """By a link: a copy of a large model would take its space twice."""
    converted = convert(source, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    assert os.path.samefile(weights, source / "model.safetensors")
    assert converted.nbytes == sum(a.nbytes for a in mx.load(str(weights)).values())
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(source))
    assert convert(source, tmp_path / "out").already_there


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converted_folder_loads_in_transformers(dtype, max_shard_size, tmp_path):
    reference = write_network(tmp_path / "source", "qwen2", num_hidden_layers=2)
    for path in (tmp_path / "source").glob("model*"):
        path.unlink()
    reference.save_pretrained(tmp_path / "source", max_shard_size=max_shard_size)
    convert(tmp_path / "source", tmp_path / "out", dtype=dtype)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        expected = loaded.eval()(torch.tensor(IDS)).logits.numpy()
        original = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, atol=2e-4)
    # A bfloat16 has 8 bits: each weight moves by up to 0.4 %.
    np.testing.assert_allclose(expected, original, atol=0.3 if dtype else 1e-6)


def test_chat_template_of_the_source_stays(source, tmp_path):
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    convert(source, tmp_path / "out")
    kept = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    assert kept == "{{ messages[0]['content'] }}"


def test_tokens_of_images_beyond_the_embedding_are_left_out(source, tmp_path):
    """As in Gemma 3's text models, which share the tokenizer of those that see."""
    path = source / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    image = content["added_tokens"][0] | {"content": "<image>", "id": 400}
    content["added_tokens"].append(image)
    path.write_text(json.dumps(content), encoding="utf-8")
    convert(source, tmp_path / "out")
    tokenizer = Base.open(tmp_path / "out").tokenizer
    assert max(encode(tokenizer, "an <image> here")) < 384
    assert tokenizer.decode(encode(tokenizer, "an <image> here")) == "an <image> here"
    assert "<image>" in (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own
def test_hub_id_of_a_network_is_pulled_once(source, tmp_path, monkeypatch):
    (source / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with HubServer({"some/llama": source}) as hub:
        hub.isolate(monkeypatch, tmp_path / "home")
        np.testing.assert_array_equal(logits(Base.open("some/llama")), logits(source))
        asked = len(hub.requests)
        Base.open("some/llama")
        assert len(hub.requests) == asked
    origin = origin_of(tmp_path / "models/some/llama")
    assert (origin.source, origin.licence) == ("some/llama", "mit")
    assert len(origin.revision) == 40


def test_weights_of_another_network_are_refused(source, tmp_path):
    edit_config(source, intermediate_size=80)
    with pytest.raises(WeightsError, match="do not fit the llama"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trimming_is_for_falcon_alone(source, tmp_path):
    with pytest.raises(ModelError, match="trim_vocab is for Falcon-RW"):
        convert(source, tmp_path / "out", trim_vocab=True)


def test_code_of_the_source_is_not_named_in_the_copy(source, tmp_path):
    edit_config(source, auto_map={"AutoModelForCausalLM": "net.Net"})
    convert(source, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def falcon_source(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_falcon(heads=4, head_dim=16, layers=2))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["falcon", "llama", "gemma2", "mixtral"])
def test_quantised_folder_equals_mlx_s_own_quantisation(model_type, bits, tmp_path):
    """Also where experts are stacked under other names than the Hub's."""
    source = tmp_path / "source"
    if model_type == "falcon":
        falcon_source(source)
    else:
        write_network(source, model_type, hidden_size=64, intermediate_size=128)
    out = tmp_path / "out"
    converted = convert(
        source, out, dtype="bfloat16", quantization=Quantization.of(bits, group_size=32)
    )
    convert(source, tmp_path / "plain", dtype="bfloat16")
    expected = Base.open(tmp_path / "plain").load(mx.bfloat16)
    nn.quantize(expected, group_size=32, bits=bits)
    np.testing.assert_array_equal(
        logits(out, mx.bfloat16), np.array(expected(mx.array(IDS)).astype(mx.float32))
    )
    files = list(out.glob("model*.safetensors"))
    assert [file.name for file in files] == ["model.safetensors"]
    assert converted.nbytes <= files[0].stat().st_size < converted.nbytes + 100_000
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits}
    assert Base.open(out).quantization == Quantization.of(bits, 32)


@pytest.mark.parametrize("model_type", ["falcon", "llama"])
def test_stock_mlx_lm_loads_a_quantised_folder(model_type, tmp_path):
    source = tmp_path / "source"
    falcon_source(source) if model_type == "falcon" else write_network(source, model_type)
    convert(source, tmp_path / "out", quantization=Quantization.of(8, 32))
    model, _ = load_model(tmp_path / "out", trust_remote_code=True)
    np.testing.assert_allclose(
        np.array(model(mx.array(IDS))), logits(tmp_path / "out"), rtol=1e-4, atol=1e-4
    )


def test_quantised_folder_is_converted_as_it_is_and_not_again(tmp_path):
    for name, source in (("f", falcon_source(tmp_path / "f")), ("l", tmp_path / "l")):
        if name == "l":
            write_network(source, "llama")
        convert(source, tmp_path / f"{name}4", quantization=Quantization.of(4, 32))
        convert(tmp_path / f"{name}4", tmp_path / f"{name}again")
        np.testing.assert_array_equal(
            logits(tmp_path / f"{name}again"), logits(tmp_path / f"{name}4")
        )
        with pytest.raises(ModelError, match="quantised already, to 4 bits"):
            convert(tmp_path / f"{name}4", tmp_path / "x", dtype="float32")
        with pytest.raises(ModelError, match="quantised already, to 4 bits"):
            convert(tmp_path / f"{name}4", tmp_path / "x", quantization=Quantization.of(8, 32))


def test_other_quantisation_is_another_conversion(source, tmp_path):
    convert(source, tmp_path / "out", quantization=Quantization.of(4, 32))
    assert convert(source, tmp_path / "out", quantization=Quantization.of(4, 32)).already_there
    with pytest.raises(ModelError, match=r"quantization: got {.*4.*}, expected {.*8.*}"):
        convert(source, tmp_path / "out", quantization=Quantization.of(8, 32))


def test_layers_may_be_quantised_in_their_own_ways(source, tmp_path):
    """As mlx-lm's mixed recipes write them."""
    convert(source, tmp_path / "plain")
    model = Base.open(tmp_path / "plain").load(mx.float32)
    own = {"group_size": 64, "bits": 8}

    def choose(path, module):
        if not hasattr(module, "to_quantized") or path.endswith("k_proj"):
            return False
        return own if "v_proj" in path else True

    nn.quantize(model, group_size=32, bits=4, class_predicate=choose)
    weights = dict(nn.utils.tree_flatten(model.parameters()))
    (tmp_path / "plain" / "model.safetensors").unlink()
    mx.save_safetensors(str(tmp_path / "plain" / "model.safetensors"), weights)
    by_path = {f"model.layers.{n}.self_attn.v_proj": own for n in range(2)}
    edit_config(tmp_path / "plain", quantization={"group_size": 32, "bits": 4, **by_path})
    np.testing.assert_allclose(
        logits(tmp_path / "plain"), np.array(model(mx.array(IDS))), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"group_size": 64, "bits": 7}, "bits out of 2, 3, 4, 5, 6, 8"),
        ({"group_size": 48, "bits": 4}, "group_size out of 32, 64, 128"),
        ({"group_size": 64, "bits": 4, "mode": "nf4"}, "a mode out of affine"),
        ({"group_size": 32, "bits": 4, "x": {"bits": 4}}, "x: expected group_size out of"),
        ("4", "expected a table"),
    ],
)
def test_quantisation_that_mlx_does_not_have_is_refused(quantization, expected, source, tmp_path):
    convert(source, tmp_path / "out", quantization=Quantization.of(4, 32))
    edit_config(tmp_path / "out", quantization=quantization)
    with pytest.raises(ModelError) as caught:
        Base.open(tmp_path / "out")
    assert expected in str(caught.value)


def test_groups_that_divide_no_layer_are_refused(tmp_path):
    write_network(tmp_path / "s", "llama", hidden_size=48, intermediate_size=96)
    with pytest.raises(ModelError, match="No layer of this network can be quantised"):
        convert(tmp_path / "s", tmp_path / "out", quantization=Quantization.of(4, 128))
    assert not (tmp_path / "out").exists()


def test_fingerprints_tell_quantised_bases_apart(source, tmp_path):
    for bits in (4, 8):
        convert(source, tmp_path / str(bits), quantization=Quantization.of(bits, 32))
    hashes = {Base.open(tmp_path / str(bits)).weights_hash for bits in (4, 8)}
    assert len(hashes) == 2
    assert "" not in hashes
    assert Base.open(source).weights_hash not in hashes
