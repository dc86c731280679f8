"""The main job, as a user types it: convert from the Hub, train Run A, PEFT, generate, export."""

import json
import logging

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import tiny_falcon, write_checkpoint
from hub_server import TOKEN, USER, HubServer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.hub import cache as hub_cache

FALCON = "tiiuae/falcon-rw-1b"


@pytest.fixture
def checkpoint(tmp_path):
    """The real layout: bfloat16 in one pickle, code beside it, the end token said to be 2."""
    folder = write_checkpoint(tmp_path / "hub", tiny_falcon(heads=6).to(torch.bfloat16), "bin")
    (folder / "modeling_falcon.py").write_text("raise SystemExit('code of the model was run')")
    (folder / "README.md").write_text("a model")
    return folder


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own upload
def test_whole_job_from_the_hub_and_back(
    checkpoint, questions, imate, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(hub_cache, "_PAUSES_S", (0.0, 0.0))
    caplog.set_level(logging.ERROR)
    with HubServer({FALCON: checkpoint}) as hub:
        hub.isolate(monkeypatch, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.cut("pytorch_model.bin", after=100_000)
        imate("convert", FALCON)
        asked = [request.range for request in hub.requests if request.storage]
        assert any(asked), "the cut download did not go on by range"

        # The run names its base by the Hub's id; it is in models/ by now.
        num_requests = len(hub.requests)
        small = ["--set", f"data.path={questions}", "--set", "train.learning_rate=1e-2"]
        summary = json.loads(imate("train", "--run", "A", *small, "--json").stdout)
        assert len(hub.requests) == num_requests
        assert summary["final_loss"] < summary["first_loss"] - 0.1
        assert summary["trainable_parameters"] == 2 * 8 * (96 + 3 * 96)
        adapter = tmp_path / "adapters" / "run_A"
        assert (
            json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
            == FALCON
        )

        # PEFT loads the adapter as it lies, on the converted folder and on the Hub's own files.
        converted = tmp_path / "models" / FALCON
        tokenizer = AutoTokenizer.from_pretrained(converted)
        ids = tokenizer("Question: What is a loss?\nAnswer:", return_tensors="pt")["input_ids"]
        base = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
        model = Base.open(converted).load(mx.float32)
        plain = np.array(model(mx.array(ids.numpy())))
        Adapter.open(adapter).apply(model)
        ours = np.array(model.eval()(mx.array(ids.numpy())))
        with torch.no_grad():
            np.testing.assert_allclose(ours, theirs(ids).logits.numpy(), atol=1e-4, rtol=0)
        assert np.abs(ours - plain).max() > 0.01

        asked = ["generate", "What is a loss?", "--adapter", adapter, "--max-tokens", 20]
        answer = json.loads(imate(*asked, "--json").stdout)["answer"]
        out = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        spoken = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == spoken.strip()

        repo = f"{USER}/interview-coach"
        imate("export", adapter, "--out", "copy", "--push", repo, "--private")
        assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()
        uploaded = hub.uploaded[repo]
        assert set(uploaded) >= {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "metrics.jsonl",
            "run.toml",
            "summary.json",
        }
        assert not any("checkpoints" in name for name in uploaded)
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        assert uploaded["adapter_model.safetensors"] == weights
