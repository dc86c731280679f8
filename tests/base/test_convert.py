"""Conversion, compared with transformers and torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import hub_config, old_config, tiny_falcon, write_checkpoint, write_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.utils import load as mlx_lm_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.data.templates import CHAT_TEMPLATE
from interviewmate_mlx.errors import ModelError, StorageError, WeightsError
from interviewmate_mlx.model import falcon

END = 383  # the tokenizer's <|endoftext|>; the configuration says 2
IDS = torch.tensor([[5, 17, 300, 42, 8, 8, 99, 250]])

logging.disable_progress_bar()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models" / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_json(path: Path, **changes: Any) -> None:
    """Set keys; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))


def refusal(source: Path, out: Path, kind: type[ModelError] = WeightsError, **options: Any) -> str:
    """The message of a refused conversion; checks that it leaves nothing behind.

    The test's folder is removed from the paths, because it contains the test's name.
    """
    with pytest.raises(kind) as caught:
        convert(source, out, **options)
    assert not out.exists()
    assert not out.parent.exists() or not any(out.parent.iterdir())
    return str(caught.value).replace(str(source.parent), "")


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


# --- the same numbers ----------------------------------------------------------


def test_bin_and_shards_convert_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_falcon(layers=3).to(torch.bfloat16)
    weights = {}
    for format in ("bin", "sharded_bin", "safetensors", "sharded"):
        source = write_checkpoint(tmp_path / format, model, format)
        done = convert(source, tmp_path / "out" / format, source_name="a/b", revision="abc")
        files = contents(done.path)
        del files["conversion.json"], files["config.json"]
        weights[format] = files
    first = weights.pop("bin")
    for format, files in weights.items():
        assert files == first, format
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_gives_the_same_logits_on_source_and_result(
    source: Path, out: Path, dtype: torch.dtype
) -> None:
    model = tiny_falcon(heads=6, bias=False).to(dtype)
    write_checkpoint(source, model)
    done = convert(source, out)
    assert done.dtype == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    assert torch.equal(logits(out), logits(source))


def test_result_describes_itself(source: Path, out: Path) -> None:
    model = tiny_falcon().to(torch.bfloat16)
    write_checkpoint(source, model)
    done = convert(source, out, source_name="owner/name", revision="abc")
    count = sum(p.numel() for p in model.parameters())
    assert (done.path, done.num_parameters, done.dtype) == (out, count, "bfloat16")
    assert done.nbytes == 2 * count
    assert not done.already_there
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = list(file.keys())
    args = falcon.ModelArgs.from_dict(json.loads((out / "config.json").read_text()))
    expected = dict(tree_flatten(falcon.Model(args).parameters()))
    assert set(names) == set(expected)
    record = json.loads((out / "conversion.json").read_text())
    assert (record["source"], record["revision"]) == ("owner/name", "abc")
    assert (record["dtype"], record["trim_vocab"]) == ("bfloat16", False)
    assert record["num_parameters"] == count
    assert (out / "falcon.py").read_bytes() == Path(falcon.__file__).read_bytes()


def test_tensors_lie_in_the_order_of_the_model(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon(layers=11), "sharded")
    convert(source, out)
    with (out / "model.safetensors").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    assert header_bytes % 8 == 0  # the format requires aligned tensors
    names = [name for name in header if name != "__metadata__"]
    assert names[0] == "transformer.word_embeddings.weight"
    assert names[-2:] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)
    offsets = [header[name]["data_offsets"] for name in names]
    assert offsets == sorted(offsets)


def test_mlx_lm_loads_the_result_with_its_own_model_file(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    convert(source, out)
    model, tokenizer = mlx_lm_load(str(out), trust_remote_code=True)
    assert type(model).__module__ == "custom_model"
    ours = np.array(model(mx.array(IDS.numpy())))
    np.testing.assert_allclose(ours, logits(source).numpy(), atol=1e-4)
    assert tokenizer.eos_token_ids == {END}


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("original", ["float32", "bfloat16", "float16"])
def test_casts_equal_those_of_torch(source: Path, out: Path, original: str, target: str) -> None:
    model = tiny_falcon(layers=1)
    weight = model.transformer.word_embeddings.weight.data.view(-1)
    tiny = 2.0 ** -np.arange(1, 150)  # through the subnormals of all three dtypes
    ties = 1 + np.arange(4096) * 2.0**-12  # halfway between two numbers of float16 and bfloat16
    weight[: len(tiny)] = torch.tensor(tiny, dtype=torch.float32)
    weight[1000:5096] = torch.tensor(ties, dtype=torch.float32)
    weight[6000:6004] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    weight[6004] = 65519.0  # the largest whole number before float16 overflows
    model = model.to(getattr(torch, original))
    weight = model.transformer.word_embeddings.weight.data.view(-1)
    if original != "float16":
        weight[6004] = 65280.0  # exact in bfloat16 and in float16
    write_checkpoint(source, model)
    convert(source, out, dtype=target)
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = model.state_dict()[name].to(getattr(torch, target))
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


@pytest.mark.parametrize("original", ["float32", "bfloat16"])
def test_number_too_large_for_float16_is_refused_by_name(
    source: Path, out: Path, original: str
) -> None:
    model = tiny_falcon().to(getattr(torch, original))
    model.transformer.h[1].mlp.dense_h_to_4h.bias.data[3] = 70000.0
    write_checkpoint(source, model)
    message = refusal(source, out, dtype="float16")
    assert "transformer.h.1.mlp.dense_h_to_4h.bias" in message


def test_nan_stays_nan_in_every_dtype(source: Path, out: Path) -> None:
    model = tiny_falcon(layers=1)
    weight = model.transformer.ln_f.weight.data
    weight.view(torch.int32)[:3] = torch.tensor([0x7F800001, -1, 0x7FFFFFFF])
    write_checkpoint(source, model)
    for dtype in ("bfloat16", "float16"):
        convert(source, out.with_name(dtype), dtype=dtype)
        converted = load_file(out.with_name(dtype) / "model.safetensors")
        assert converted["transformer.ln_f.weight"].isnan().tolist() == [True] * 3 + [False] * 61


def test_unknown_dtype_is_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    assert "float8" in refusal(source, out, ModelError, dtype="float8")


# --- configuration and tokenizer -----------------------------------------------


def test_both_files_have_the_true_end_token(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    assert json.loads((source / "config.json").read_text())["eos_token_id"] == 2
    convert(source, out)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((out / name).read_text())
        assert (settings["eos_token_id"], settings["bos_token_id"]) == (END, END)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == END
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == END


@pytest.mark.parametrize("without", ["tokenizer.json", "vocab.json", "special_tokens_map.json"])
def test_end_token_is_found_without_one_of_the_files(source: Path, out: Path, without: str) -> None:
    write_checkpoint(source, tiny_falcon())
    (source / without).unlink()
    convert(source, out)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == END
    assert AutoTokenizer.from_pretrained(out).eos_token_id == END


def test_end_token_is_found_in_the_special_tokens_map_alone(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    change_json(source / "tokenizer_config.json", eos_token=None, bos_token=None, unk_token=None)
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": False}
    change_json(source / "special_tokens_map.json", eos_token=token)
    convert(source, out)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == END
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"  # not every loader reads the map


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_found_where_they_are_named(source: Path, out: Path, place: str) -> None:
    write_checkpoint(source, tiny_falcon(vocab_size=400))
    (source / "tokenizer.json").unlink()
    change_json(source / "tokenizer_config.json", eos_token="<|end|>")
    if place == "added_tokens.json":
        (source / place).write_text(json.dumps({"<|end|>": 384}))
    else:
        change_json(source / place, added_tokens_decoder={"384": {"content": "<|end|>"}})
    convert(source, out)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 384


def test_pad_token_of_the_tokenizer_is_written_and_no_other(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    change_json(source / "config.json", pad_token_id=3)
    convert(source, out)
    assert "pad_token_id" not in json.loads((out / "config.json").read_text())
    change_json(source / "tokenizer_config.json", pad_token="#")
    convert(source, out, force=True)
    hash_id = json.loads((source / "vocab.json").read_text())["#"]
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == hash_id


def test_chat_template_is_seen_by_transformers_and_mlx_lm(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    convert(source, out)
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHAT_TEMPLATE
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    _, wrapper = mlx_lm_load(str(out), trust_remote_code=True)
    plain = AutoTokenizer.from_pretrained(source)
    expected = plain.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=False)
    for tokenizer in (AutoTokenizer.from_pretrained(out), wrapper):
        assert tokenizer.apply_chat_template(chat, tokenize=False) == expected


def test_tokenizer_encodes_as_before(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    convert(source, out)
    text = "Question: What is gradient descent?\n\n\tdéjà vu <|endoftext|>"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert after.encode(text) == before.encode(text)
    assert after.decode(after.encode(text)) == text


def test_nothing_in_the_result_makes_a_loader_run_code(source: Path, out: Path) -> None:
    sentinel = source.parent / "ran"
    write_checkpoint(source, tiny_falcon(), config=old_config(tiny_falcon()))
    code = f"open({str(sentinel)!r}, 'w')\nclass RWConfig: pass\nclass T: pass\n"
    for name in ("configuration_RW.py", "modelling_RW.py", "tokenization_RW.py", "falcon.py"):
        (source / name).write_text(code)
    change_json(
        source / "tokenizer_config.json",
        tokenizer_class="RWTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_RW.T", None]},
    )
    convert(source, out)
    assert not list(out.glob("*_RW.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True).eos_token_id == END
    assert not sentinel.exists()


@pytest.mark.parametrize("names", ["old", "half old"])
def test_old_names_are_translated(source: Path, out: Path, names: str) -> None:
    model = tiny_falcon(heads=4, layers=3)
    config = old_config(model)
    if names == "half old":
        config |= {"model_type": "falcon", "new_decoder_architecture": False}
    config["n_embed"] = config.pop("hidden_size")
    write_checkpoint(source, model, config=config)
    convert(source, out)
    written = AutoConfig.from_pretrained(out)
    assert (written.num_hidden_layers, written.num_attention_heads) == (3, 4)
    assert json.loads((out / "config.json").read_text())["new_decoder_architecture"] is False
    assert not set(json.loads((out / "config.json").read_text())) & {"n_layer", "n_head", "n_embed"}
    with torch.no_grad():
        assert torch.equal(logits(out), model(IDS).logits)


def test_old_and_new_name_that_disagree_are_refused(source: Path, out: Path) -> None:
    model = tiny_falcon()
    write_checkpoint(source, model, config=hub_config(model) | {"n_layer": 5})
    message = refusal(source, out, ModelError)
    assert "n_layer is 5, num_hidden_layers is 2" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("multi_query", True),
        ("parallel_attn", True),
        ("alibi", False),
        ("new_decoder_architecture", True),
        ("n_head_kv", 8),
        ("hidden_size", None),
        ("model_type", "lama"),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_another_architecture_is_refused_by_its_key(
    source: Path, out: Path, key: str, value: Any
) -> None:
    write_checkpoint(source, tiny_falcon())
    change_json(source / "config.json", **{key: value})
    named = {"n_head_kv": "num_kv_heads"}.get(key, key)
    assert named in refusal(source, out, ModelError)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, "config.json"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[1]", "got a JSON list, expected an object"),
        ("generation_config.json", b"\xff", "generation_config.json is not JSON"),
        ("tokenizer_config.json", b"{}", ""),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer.json", b'{"model": {"vocab": {"<|endoftext|>": "b"}}}', "tokenizer"),
    ],
)
def test_damaged_or_missing_json_is_refused(
    source: Path, out: Path, name: str, content: bytes | None, says: str
) -> None:
    write_checkpoint(source, tiny_falcon())
    (source / "special_tokens_map.json").unlink()
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    assert says in refusal(source, out, ModelError)


def test_folder_without_tokenizer_is_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon(), tokenizer_size=None)
    assert "tokenizer.json" in refusal(source, out, ModelError)
    write_tokenizer(source)
    for name in ("tokenizer.json", "merges.txt"):
        (source / name).unlink()
    assert "tokenizer.json" in refusal(source, out, ModelError)


def test_end_token_that_the_tokenizer_does_not_have_is_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    change_json(source / "tokenizer_config.json", eos_token="</s>")
    assert "'</s>'" in refusal(source, out, ModelError)


def test_tokenizer_larger_than_the_embedding_is_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon(vocab_size=383))
    message = refusal(source, out, ModelError)
    assert "384" in message
    assert "383" in message


# --- the head, and the vocabulary ------------------------------------------------


@pytest.mark.parametrize("head", ["shared", "equal", "absent"])
def test_tied_head_may_be_there_or_not(source: Path, out: Path, head: str) -> None:
    model = tiny_falcon()
    state = dict(model.state_dict())
    if head == "equal":
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    if head == "absent":
        del state["lm_head.weight"]
    write_checkpoint(source, model, state=state)
    convert(source, out)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(logits(out), model(IDS).logits)


@pytest.mark.parametrize("change", ["one number", "shape", "dtype"])
def test_tied_head_that_differs_is_refused(source: Path, out: Path, change: str) -> None:
    model = tiny_falcon()
    state = dict(model.state_dict())
    head = state["lm_head.weight"].clone()
    if change == "one number":
        head[-1, -1] += 1e-6
    state["lm_head.weight"] = {"shape": head[:-1], "dtype": head.half()}.get(change, head)
    write_checkpoint(source, model, state=state)
    assert "lm_head.weight" in refusal(source, out, dtype="float32")


def test_untied_head_is_kept(source: Path, out: Path) -> None:
    model = tiny_falcon(tie_word_embeddings=False)
    write_checkpoint(source, model)
    done = convert(source, out)
    assert done.num_parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(out), logits(source))
    weights = load_file(out / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.word_embeddings.weight"])


def test_untied_head_that_is_missing_is_refused(source: Path, out: Path) -> None:
    model = tiny_falcon()
    write_checkpoint(source, model, "safetensors")
    change_json(source / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight: missing" in refusal(source, out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["bin", "safetensors"])
def test_trimmed_vocabulary_is_the_tokenizers(
    source: Path, out: Path, tied: bool, format: Any
) -> None:
    model = tiny_falcon(vocab_size=400, tie_word_embeddings=tied)
    write_checkpoint(source, model, format)
    done = convert(source, out, trim_vocab=True)
    assert AutoConfig.from_pretrained(out).vocab_size == 384
    assert torch.equal(logits(out), logits(source)[..., :384])
    rows = 1 if tied else 2
    whole = sum(p.numel() for p in model.parameters())
    assert done.num_parameters == whole - rows * 16 * model.config.hidden_size


def test_trimming_nothing_changes_nothing(tmp_path: Path, source: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    convert(source, tmp_path / "whole")
    convert(source, tmp_path / "trimmed", trim_vocab=True)
    whole, trimmed = (contents(tmp_path / name) for name in ("whole", "trimmed"))
    del whole["conversion.json"], trimmed["conversion.json"]
    assert whole == trimmed


# --- weights that do not fit, or are damaged, or unsafe ---------------------------


def test_all_faults_are_listed_at_once(source: Path, out: Path) -> None:
    model = tiny_falcon()
    state = dict(model.state_dict())
    del state["transformer.ln_f.bias"]
    block = "transformer.h.1.self_attention"
    state["transformer.h.0.self_attention.maskbias"] = torch.zeros(3)
    state[f"{block}.dense.weight"] = torch.zeros(64, 63)
    state[f"{block}.dense.bias"] = torch.zeros(64, dtype=torch.int8)
    state["transformer.ln_f.weight"] = torch.ones(64, dtype=torch.bfloat16)
    write_checkpoint(source, model, state=state)
    message = refusal(source, out)
    assert "  transformer.ln_f.bias: missing\n" in message
    assert "  transformer.h.0.self_attention.maskbias: unknown\n" in message
    assert f"  {block}.dense.weight: got (64, 63), expected (64, 64)\n" in message
    assert f"  {block}.dense.bias: got int8, expected one of " in message
    assert "  transformer.ln_f.weight: got bfloat16, expected float32" in message


def test_mixed_dtypes_are_converted_when_one_is_chosen(source: Path, out: Path) -> None:
    model = tiny_falcon()
    state = dict(model.state_dict())
    state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].bfloat16()
    write_checkpoint(source, model, state=state)
    assert "for mixed dtypes, choose one" in refusal(source, out)
    convert(source, out, dtype="float32")
    converted = load_file(out / "model.safetensors")["transformer.ln_f.weight"]
    assert torch.equal(converted, state["transformer.ln_f.weight"].float())


def test_transposed_tensors_are_written_row_by_row(source: Path, out: Path) -> None:
    model = tiny_falcon()
    state = {name: t.mT.contiguous().mT for name, t in model.state_dict().items() if t.ndim == 2}
    state = dict(model.state_dict()) | state
    assert not state["transformer.word_embeddings.weight"].is_contiguous()
    write_checkpoint(source, model, state=state)
    convert(source, out, trim_vocab=True)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_pickle_that_names_a_command_is_refused_and_runs_nothing(source: Path, out: Path) -> None:
    model = tiny_falcon()
    state = dict(model.state_dict()) | {"evil": Touch(source.parent / "ran")}
    write_checkpoint(source, model, state=state)
    assert "system" in refusal(source, out)
    assert not (source.parent / "ran").exists()


@pytest.mark.parametrize(
    ("format", "name"), [("bin", "pytorch_model.bin"), ("safetensors", "model.safetensors")]
)
def test_truncated_weights_are_refused(source: Path, out: Path, format: Any, name: str) -> None:
    write_checkpoint(source, tiny_falcon(), format)
    whole = (source / name).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (source / name).write_bytes(whole[:length])
        assert f"/source/{name} " in refusal(source, out)


def damaged_header(change: str, header: dict[str, Any]) -> bytes:
    name = "transformer.ln_f.bias"
    entry = header[name]
    match change:
        case "gap":
            del header[name]
        case "overlap":
            entry["data_offsets"] = [0, 256]
        case "beyond":
            entry["data_offsets"] = [n + 10**9 for n in entry["data_offsets"]]
        case "negative":
            entry["data_offsets"] = [-256, 0]
        case "size":
            entry["shape"] = [65]
        case "dtype":
            entry["dtype"] = "F8_E5M2"
        case "no dtype":
            del entry["dtype"]
        case "list":
            header[name] = [1]
        case "twice":
            text = json.dumps(header)
            return (text[:-1] + f', "{name}": {json.dumps(entry)}}}').encode()
        case "text":
            return b"not json at all"
    return json.dumps(header).encode()


@pytest.mark.parametrize(
    "change",
    ["gap", "overlap", "beyond", "negative", "size", "dtype", "no dtype", "list", "twice", "text"],
)
def test_damaged_safetensors_are_refused(source: Path, out: Path, change: str) -> None:
    write_checkpoint(source, tiny_falcon(), "safetensors")
    path = source / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = damaged_header(change, json.loads(data[8:end]))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert "/source/model.safetensors is not a valid" in refusal(source, out)


def test_git_lfs_pointer_is_refused_as_weights(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (source / "pytorch_model.bin").write_text(pointer)
    assert "git lfs pull" in refusal(source, out)


def test_folder_without_weights_is_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    (source / "pytorch_model.bin").unlink()
    message = refusal(source, out)
    assert "model.safetensors or pytorch_model.bin" in message


def test_safetensors_are_preferred(source: Path, out: Path) -> None:
    model = tiny_falcon()
    write_checkpoint(source, model, "safetensors")
    (source / "pytorch_model.bin").write_bytes(b"damaged")
    convert(source, out)
    assert torch.equal(logits(out), logits(source))


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "model-1/x-of-1.safetensors", "x", 3]
)
def test_index_that_points_elsewhere_is_refused(source: Path, out: Path, shard: Any) -> None:
    write_checkpoint(source, tiny_falcon(), "sharded")
    (source / "model-1").mkdir()
    shutil.copyfile(next(source.glob("model-*-of-*")), source / "model-1" / "x-of-1.safetensors")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.ln_f.bias"] = shard
    path.write_text(json.dumps(index))
    assert "/source/model.safetensors.index.json" in refusal(source, out)


@pytest.mark.parametrize("format", ["sharded", "sharded_bin"])
def test_missing_and_surplus_shards_are_reported_together(
    source: Path, out: Path, format: Any
) -> None:
    write_checkpoint(source, tiny_falcon(), format)
    shards = sorted(p for p in source.iterdir() if "-of-" in p.name)
    surplus = shards[0].with_name(shards[0].name.replace("00001", "00009"))
    shutil.copyfile(shards[0], surplus)
    shards[1].unlink()
    message = refusal(source, out)
    assert f"{shards[1].name}: in the index, but not in the folder" in message
    assert f"{surplus.name}: in the folder, but not in the index" in message


def test_shards_that_disagree_with_their_index_are_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon(), "sharded")
    shards = sorted(source.glob("model-*"))
    extra = load_file(shards[0]) | {
        "extra": torch.zeros(1),
        "transformer.ln_f.bias": torch.ones(64),
    }
    save_file(extra, shards[0], {"format": "pt"})
    moved = load_file(shards[1])
    lost = sorted(moved)[0]
    del moved[lost]
    save_file(moved, shards[1], {"format": "pt"})
    message = refusal(source, out)
    assert f"extra: in {shards[0].name}, but the index says no file" in message
    assert "transformer.ln_f.bias: in " in message
    assert f"{lost}: in the index, but in no file" in message


def test_shards_without_an_index_are_refused(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon(), "sharded")
    (source / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in refusal(source, out)


def test_adapter_folder_is_not_taken_for_a_model(source: Path, out: Path) -> None:
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(source, out, ModelError)
    assert "no-such" in refusal(source.with_name("no-such"), out, ModelError)


# --- a second conversion, interruptions, full disks ---------------------------------


def test_second_conversion_says_so_and_writes_nothing(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    first = convert(source, out)

    def written() -> list[tuple[Path, int, int]]:  # reading changes the time of the last access
        found = [(path, path.stat()) for path in sorted([out, *out.iterdir()])]
        return [(path, stat.st_ino, stat.st_mtime_ns) for path, stat in found]

    before = written()
    second = convert(source, out)
    assert second.already_there
    assert (second.num_parameters, second.nbytes) == (first.num_parameters, first.nbytes)
    assert convert(source, out, dtype="float32").already_there  # the source is float32 anyway
    assert written() == before


def test_second_conversion_casts_nothing_whenever_the_files_were_made(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(source, tiny_falcon())
    convert(source, out)
    copy = source.with_name("copy")
    shutil.copytree(source, copy)  # elsewhere, with times of its own
    for path in copy.iterdir():
        os.utime(path)
    monkeypatch.setattr("interviewmate_mlx.base.convert.fit_falcon", None)
    assert convert(copy, out).already_there


@pytest.mark.parametrize("other", ["source", "dtype", "trim_vocab", "tokenizer", "damaged"])
def test_another_conversion_is_replaced_only_with_force(
    source: Path, out: Path, other: str
) -> None:
    write_checkpoint(source, tiny_falcon(vocab_size=400))
    convert(source, out)
    options: dict[str, Any] = {}
    match other:
        case "source":
            write_checkpoint(source, tiny_falcon(vocab_size=400, seed=1))
        case "dtype":
            options = {"dtype": "bfloat16"}
        case "trim_vocab":
            options = {"trim_vocab": True}
        case "tokenizer":
            write_tokenizer(source, 390)
        case "damaged":
            (out / "model.safetensors").write_bytes(b"")
    before = contents(out)
    with pytest.raises(ModelError, match="or replace it"):
        convert(source, out, **options)
    assert contents(out) == before
    (out / "stale.txt").write_text("of the first conversion")
    assert not convert(source, out, force=True, **options).already_there
    assert not (out / "stale.txt").exists()
    assert convert(source, out, **options).already_there
    reference = out.with_name("reference")
    convert(source, reference, **options)
    assert contents(out) == contents(reference)
    assert sorted(os.listdir(out.parent)) == ["out", "reference"]


def test_force_replaces_nothing_but_a_conversion(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ModelError, match="no conversion wrote it"):
            convert(source, out, force=force)
    assert contents(out) == {"thesis.txt": b"years of work"}
    with pytest.raises(ModelError):
        convert(source, out / "thesis.txt")


def test_empty_folder_is_filled(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    out.mkdir(parents=True)
    assert not convert(source, out).already_there


def test_source_is_never_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a" / "source", tiny_falcon())
    before = contents(source)
    for out in (source, tmp_path / "a", tmp_path / "a" / "x" / ".." / "source"):
        with pytest.raises(ModelError, match="holds the source"):
            convert(source, out, force=True)
    assert contents(source) == before


def test_failing_force_keeps_the_earlier_conversion(source: Path, out: Path) -> None:
    model = tiny_falcon()
    write_checkpoint(source, model)
    convert(source, out)
    before = contents(out)
    model.transformer.ln_f.weight.data[0] = 1e38
    write_checkpoint(source, model)
    with pytest.raises(WeightsError, match=r"ln_f\.weight"):
        convert(source, out, dtype="float16", force=True)
    assert contents(out) == before
    assert os.listdir(out.parent) == ["out"]


def test_interrupted_conversion_leaves_nothing(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt)
    assert not out.parent.exists()


def test_folder_that_another_writer_made_first_is_not_overwritten(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())

    def come_first(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "a.txt").write_text("the faster one")

    with pytest.raises(StorageError, match="it already exists"):
        convert(source, out, progress=come_first)
    assert contents(out) == {"a.txt": b"the faster one"}


def test_killed_conversion_leaves_no_folder_and_the_next_one_succeeds(
    source: Path, out: Path
) -> None:
    write_checkpoint(source, tiny_falcon())
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from interviewmate_mlx.base.convert import convert\n"
        "kill = lambda done, total: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not convert(source, out).already_there
    assert os.listdir(out.parent) == ["out"]


def test_progress_reaches_the_total(source: Path, out: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    calls: list[tuple[int, int]] = []
    result = convert(source, out, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (result.nbytes, result.nbytes)
    assert calls == sorted(calls)


def test_full_disk_is_noticed_before_anything_is_written(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(source, tiny_falcon())
    usage = shutil.disk_usage(source)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="are free"):
        convert(source, out)
    assert not out.parent.exists()


def test_folder_that_cannot_be_written_is_a_storage_error(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tiny_falcon())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Cannot write .*file/out"):
        convert(source, tmp_path / "file" / "out")


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, out: Path) -> None:
    blobs = write_checkpoint(tmp_path / "blobs", tiny_falcon())
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    convert(snapshot, out)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert torch.equal(logits(out), logits(blobs))


def test_converted_folder_converts_again(source: Path, out: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tiny_falcon().to(torch.bfloat16))
    convert(source, out)
    convert(out, tmp_path / "again")
    first, again = contents(out), contents(tmp_path / "again")
    del first["conversion.json"], again["conversion.json"]
    assert again == first


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_holds_only_pieces_of_a_tensor(source: Path, out: Path, dtype: str | None) -> None:
    model = tiny_falcon(layers=1)
    state = dict(model.state_dict())
    rows = 400_000  # 0.1 GB
    state["transformer.word_embeddings.weight"] = torch.zeros(rows, 64)
    state["lm_head.weight"] = torch.zeros(rows, 64)  # not shared, so that the two are compared
    write_checkpoint(source, model, state=state, config=hub_config(model) | {"vocab_size": rows})
    tracemalloc.start()
    try:
        convert(source, out, dtype=dtype)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 70e6
