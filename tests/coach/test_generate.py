"""Answers: three programs on one converted folder agree, and an adapter changes them."""

import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from checkpoints import tiny_falcon, write_checkpoint
from mlx_lm.utils import load_model, quantize_model, save
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import Adapter, adapter_weights, save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.coach.generate import answer, load_coach, stream_answer
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.errors import AdapterError, ConfigError, ModelError
from interviewmate_mlx.model.lora import add_lora, lora_layers, merge_lora
from interviewmate_mlx.training.loop import train

QUESTION = "What is a validation set?"


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """An adapter whose update is not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_coach(str(tiny_base), None)
    mx.random.seed(1)
    add_lora(model, ["query_key_value", "dense"], 4, 16)
    for _, layer in lora_layers(model):
        layer.lora_B.weight = mx.random.normal(layer.lora_B.weight.shape) * 0.3
    config = AdapterConfig(str(tiny_base), 4, 16.0, targets=("query_key_value", "dense"))
    save_adapter(folder, adapter_weights(model), config)
    return folder


def transformers_answer(folder, count: int, adapter=None) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt["input_ids"]
    out = model.generate(**prompt, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def mlx_lm_answer(folder, count: int) -> str:
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(folder)]
    command += ["--trust-remote-code", "--prompt", QUESTION, "--max-tokens", str(count)]
    command += ["--temp", "0", "--verbose", "True"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split("==========")[1].strip()


def test_three_programs_agree_on_greedy_text(tiny_base):
    model, tokenizer = load_coach(str(tiny_base), None, dtype="float32")
    ours = answer(model, tokenizer, QUESTION, Sampling(max_tokens=40))
    assert len(ours) > 20
    assert transformers_answer(tiny_base, 40) == ours
    assert mlx_lm_answer(tiny_base, 40) == ours


def test_adapter_answers_as_in_peft_and_as_merged(tiny_base, adapter):
    model, tokenizer = load_coach(None, adapter)  # the base that the adapter names
    ours = answer(model, tokenizer, QUESTION, Sampling(max_tokens=40))
    base, _ = load_coach(str(tiny_base), None)
    assert answer(base, tokenizer, QUESTION, Sampling(max_tokens=40)) != ours
    assert transformers_answer(tiny_base, 40, adapter) == ours
    merge_lora(model)
    assert answer(model, tokenizer, QUESTION, Sampling(max_tokens=40)) == ours


def test_answer_ends_at_the_true_end_token_and_not_at_the_config_s(tiny_base):
    model, tokenizer = load_coach(str(tiny_base), None)
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id}

    class Scripted:
        """Says token 2, which the Hub's config.json calls the end, then the true end token."""

        layers, args = model.layers, model.args
        script = iter([2, tokenizer.eos_token_id, 5])

        def make_cache(self):
            return model.make_cache()

        def __call__(self, inputs, cache=None):
            logits = model(inputs, cache) * 0
            logits[:, -1, next(self.script) if inputs.shape[1] == 1 else 0] = 1.0
            return logits

    text = answer(Scripted(), tokenizer, QUESTION, Sampling(max_tokens=3))
    assert text == tokenizer.decode([2]).strip()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_are_never_generated(tmp_path, temperature):
    """The embedding has more rows than the tokenizer has tokens, and they are the likeliest."""
    reference = tiny_falcon(vocab_size=400)
    with torch.no_grad():
        reference.transformer.word_embeddings.weight[384:] *= 1000
    folder = convert(write_checkpoint(tmp_path / "hub", reference), tmp_path / "base").path
    model, tokenizer = load_coach(folder)
    prompt = mx.array(encode_question(tokenizer, QUESTION))
    assert int(model(prompt[None])[0, -1].argmax()) >= 384
    sampling = Sampling(max_tokens=20, temperature=temperature)
    assert len(tokenizer.encode(answer(model, tokenizer, QUESTION, sampling))) > 5


def test_sampling_follows_its_seed(tiny_base):
    model, tokenizer = load_coach(str(tiny_base), None)
    texts = [
        answer(model, tokenizer, QUESTION, Sampling(30, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    greedy = answer(model, tokenizer, QUESTION, Sampling(30))
    assert answer(model, tokenizer, QUESTION, Sampling(30, temperature=1.0, top_p=1e-6)) == greedy


def test_pieces_make_up_the_answer_and_stop_at_max_tokens(tiny_base):
    model, tokenizer = load_coach(str(tiny_base), None)
    pieces = list(stream_answer(model, tokenizer, QUESTION, Sampling(max_tokens=12)))
    whole = answer(model, tokenizer, QUESTION, Sampling(max_tokens=12))
    assert "".join(pieces).strip() == whole
    assert len(pieces) <= 12
    longer = answer(model, tokenizer, QUESTION, Sampling(max_tokens=24))
    assert longer.startswith(whole[:-3])  # the last bytes may be half a character
    assert len(longer) > len(whole)


def test_quantised_folder_is_served(tiny_checkpoint, tmp_path):
    source = write_checkpoint(tmp_path / "hub", tiny_falcon(heads=2, head_dim=32))
    folder = convert(source, tmp_path / "exact").path
    model, config = load_model(folder, trust_remote_code=True)
    model, config = quantize_model(model, config, group_size=64, bits=8)
    _, tokenizer = load_coach(str(folder), None)
    save(tmp_path / "quantised", folder, model, tokenizer, config)
    coach, tokenizer = load_coach(str(tmp_path / "quantised"), None)
    assert isinstance(coach.layers[0].mlp.dense_h_to_4h, nn.QuantizedLinear)
    exact, _ = load_coach(str(folder), None)
    first = [m(_ids(tokenizer))[:, -1].argmax().item() for m in (coach, exact)]
    assert first[0] == first[1]


def _ids(tokenizer):
    return mx.array([encode_question(tokenizer, QUESTION)])


def test_missing_base_or_adapter_is_named(tmp_path, tiny_base):
    with pytest.raises(ConfigError, match="No base"):
        load_coach(None, None)
    with pytest.raises(ModelError, match="No model at"):
        load_coach(str(tmp_path / "none"), None)
    with pytest.raises(AdapterError, match="No adapter in"):
        load_coach(str(tiny_base), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="Convert it first"):
        load_coach(str(tmp_path), None)


def test_adapter_of_other_weights_is_warned_of_and_of_another_dtype_is_not(
    tmp_path, tiny_checkpoint, questions
):
    # Weights that were bfloat16 once, as the Hub's are.
    hub = write_checkpoint(tmp_path / "hub", tiny_falcon(seed=5).to(torch.bfloat16))
    bases = {
        dtype: convert(hub, tmp_path / dtype, dtype=dtype).path
        for dtype in ("bfloat16", "float32", "float16")
    }
    assert len({Base.open(folder).weights_hash for folder in bases.values()}) == 1
    other = convert(tiny_checkpoint, tmp_path / "other").path
    assert Base.open(other).weights_hash != Base.open(bases["float32"]).weights_hash

    run = load_run(
        "A", [f"model.base={bases['bfloat16']}", f"data.path={questions}", "train.epochs=1"]
    )
    out = tmp_path / "adapter"
    for _ in train(run, out):
        pass
    for folder in bases.values():
        load_coach(str(folder), out)  # a warning would be an error here
    with pytest.warns(UserWarning, match=r"adapter was trained on other weights than those in"):
        load_coach(str(other), out)
    copy = Adapter.open(out).export(tmp_path / "copy")
    assert Adapter.open(copy).base_hash == Base.open(bases["float32"]).weights_hash


def test_weights_that_training_touched_are_told_from_those_before(tmp_path, tiny_base):
    weights = mx.load(str(tiny_base / "model.safetensors"))
    name = "transformer.h.1.mlp.dense_4h_to_h.weight"
    weights[name] = weights[name] + 1e-3 * mx.random.normal(weights[name].shape)
    trained = shutil.copytree(tiny_base, tmp_path / "trained")
    mx.save_safetensors(str(tmp_path / "new.safetensors"), weights)
    (tmp_path / "new.safetensors").replace(trained / "model.safetensors")
    assert Base.open(trained).weights_hash != Base.open(tiny_base).weights_hash
