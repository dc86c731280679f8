"""Make the reference values of `imate-mlx doctor` again, with transformers, torch and PEFT.

    python scripts/make_doctor.py                 # into the package
    python scripts/make_doctor.py --out FOLDER    # elsewhere, to compare

The same numbers come out each time, but for the last digits of float32.

Shape letters: V vocabulary, L length, H heads.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from interviewmate_mlx.files import atomic_folder
from interviewmate_mlx.results.doctor_checks import FOLDER, draw_lora, draw_weights, integers

VOCAB = 320
HEAD_DIM = 64  # the size that fused kernels of attention are made for
SETTINGS: dict[str, Any] = {
    "networks": {
        name: {
            "model_type": "falcon",
            "vocab_size": VOCAB,
            "hidden_size": heads * HEAD_DIM,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "alibi": True,
            "bias": bias,
            "multi_query": False,
            "parallel_attn": False,
            "new_decoder_architecture": False,
            "seed": heads,
        }
        for name, heads, layers, bias in (("four_heads", 4, 3, True), ("three_heads", 3, 2, False))
    },
    "lengths": [1, 7, 33, 130, 257],
    "alibi_heads": [3, 4, 32],
    "padded": {"rows": 3, "more": 2},  # tokens that follow each prompt
    "training": {
        "targets": ["query_key_value", "dense_h_to_4h"],
        "rank": 4,
        "alpha": 8,
        "seed": 11,
        "steps": 40,
        "peak": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "max_grad_norm": 3.0,
        "weight_decay": 0.01,
    },
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
}
# As PEFT writes it: another scale for one of the targets.
ADAPTER = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"dense_h_to_4h": 12}}


def ids(seed: int, length: int) -> np.ndarray:
    """Token ids: (L,) int32."""
    raw = np.random.PCG64([100, seed]).random_raw(length)
    return (raw % np.uint64(VOCAB)).astype(np.int32)


def network(name: str) -> FalconForCausalLM:
    """transformers' Falcon with the drawn weights, float32, in eval mode."""
    config = {key: value for key, value in SETTINGS["networks"][name].items() if key != "seed"}
    model = FalconForCausalLM(FalconConfig(**config)).eval()
    state = {n: tuple(t.shape) for n, t in model.state_dict().items() if n != "lm_head.weight"}
    drawn = draw_weights(SETTINGS["networks"][name]["seed"], state)
    missing = model.load_state_dict({n: torch.tensor(a) for n, a in drawn.items()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    model.tie_weights()
    return model


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Token ids (L,) -> logits (L, V) float32."""
    with torch.no_grad():
        return model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()


def logit_values(name: str) -> dict[str, np.ndarray]:
    """Of a random text of each length: ids, some positions, and the logits there."""
    model = network(name)
    values: dict[str, np.ndarray] = {}
    for length in SETTINGS["lengths"]:
        tokens = ids(length, length)
        positions = np.array(sorted({0, length // 2, length - 1}), dtype=np.int32)
        values |= {
            f"{name}/{length}/ids": tokens,
            f"{name}/{length}/positions": positions,
            f"{name}/{length}/logits": logits(model, tokens)[positions],
        }
    return values


def greedy_values(name: str = "four_heads", count: int = 32) -> dict[str, np.ndarray]:
    """A prompt with its greedy text, and the logits that each of its tokens was chosen by."""
    model, prompt = network(name), ids(285, 11)
    text = model.generate(
        torch.tensor(prompt[None].astype(np.int64)),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].numpy()
    chosen_by = logits(model, text)[len(prompt) - 1 : -1]
    two = np.sort(chosen_by, axis=-1)[:, -2:]
    assert (two[:, 1] - two[:, 0]).min() > 1e-3, "it hangs on a rounding: draw another prompt"
    return {"greedy/ids": text.astype(np.int32), "greedy/logits": chosen_by}


def padded_values(name: str = "three_heads") -> dict[str, np.ndarray]:
    """Rows of unequal length, and the logits at the last tokens of each, computed alone."""
    model, more = network(name), SETTINGS["padded"]["more"]
    values: dict[str, np.ndarray] = {}
    for number, length in enumerate((3, 17, 9)):
        tokens = ids(1000 + number, length + more)
        values[f"padded/{number}/ids"] = tokens
        values[f"padded/{number}/logits"] = logits(model, tokens)[-more - 1 :]
    return values


def alibi_values() -> dict[str, np.ndarray]:
    """The bias that transformers gives keys at near and far positions, (H, L) for each H."""
    positions = np.array([0, 1, 2, 3, 100, 255, 256, 257, 1000, 2046, 2047], dtype=np.int32)
    values = {"alibi/positions": positions}
    for heads in SETTINGS["alibi_heads"]:
        mask = torch.ones(1, 2048, dtype=torch.long)
        bias = build_alibi_tensor(mask, heads, torch.float32).reshape(heads, 2048)
        values[f"alibi/{heads}"] = bias[:, torch.tensor(positions).long()].numpy()
    return values


def optimizer_values(steps: int = 5, size: int = 48) -> dict[str, np.ndarray]:
    """Parameters, gradients of very unequal size, and the parameters after each step."""
    start = integers(12, 0, (size,)) / 128
    gradients = integers(12, 1, (steps, size)) * 10.0 ** -(np.arange(size) ** 0.5)
    gradients = gradients.astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    chosen = SETTINGS["optimizer"]
    optimizer = torch.optim.AdamW(
        [parameter], lr=chosen["learning_rate"], weight_decay=chosen["weight_decay"]
    )
    after = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        after.append(parameter.detach().numpy().copy())
    return {
        "optimizer/start": start,
        "optimizer/gradients": gradients,
        "optimizer/after": np.stack(after),
    }


def with_lora(model: FalconForCausalLM, seed: int, **config: Any) -> peft.PeftModel:
    """PEFT's model with drawn LoRA matrices."""
    targets = SETTINGS["training"]["targets"]
    lora = peft.LoraConfig(
        lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", **config
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), lora)
    matrices = {our_name(n): p for n, p in wrapped.named_parameters() if p.requires_grad}
    drawn = draw_lora(seed, {name: tuple(p.shape) for name, p in matrices.items()})
    with torch.no_grad():
        for name, parameter in matrices.items():
            parameter.copy_(torch.tensor(drawn[name]))
    return wrapped


def our_name(name: str) -> str:
    """PEFT's name of a LoRA matrix -> its path in the model."""
    return name.removeprefix("base_model.model.").replace(".default", "")


def adapter_values(out: Path) -> dict[str, np.ndarray]:
    """An adapter that PEFT writes into `adapter/`, and logits with it."""
    model = with_lora(network("three_heads"), 13, **ADAPTER).eval()
    folder = out / "adapter"
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    tokens = ids(13, 24)
    return {"adapter/ids": tokens, "adapter/logits": logits(model, tokens)}


def training_values() -> dict[str, np.ndarray]:
    """Eight rows, where in each the learned part starts, and the loss of each update.

    A row at a time; the sum of the losses is divided by the tokens of the whole step.
    """
    chosen = SETTINGS["training"]
    lengths, starts = (8, 17, 12, 16, 9, 24, 5, 15), (3, 8, 1, 12, 2, 11, 4, 6)
    rows = [ids(2000 + number, length) for number, length in enumerate(lengths)]
    model = with_lora(
        network("three_heads"), chosen["seed"], r=chosen["rank"], lora_alpha=chosen["alpha"]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=chosen["peak"], weight_decay=chosen["weight_decay"]
    )
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, int(chosen["warmup_ratio"] * chosen["steps"]), chosen["steps"]
    )
    losses, norms = [], []
    for step in range(chosen["steps"]):
        mine = range(4) if step % 2 == 0 else range(4, 8)
        num_tokens = sum(lengths[row] - starts[row] for row in mine)
        total = 0.0
        for row in mine:
            tokens = torch.tensor(rows[row].astype(np.int64))
            scores = model(input_ids=tokens[None]).logits[0, starts[row] - 1 : -1]
            loss = torch.nn.functional.cross_entropy(scores, tokens[starts[row] :], reduction="sum")
            (loss / num_tokens).backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, chosen["max_grad_norm"]).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total / num_tokens)
    assert min(norms) < chosen["max_grad_norm"] < max(norms)  # clipping is at work, not always
    values = {f"training/{number}": row for number, row in enumerate(rows)}
    return values | {
        "training/starts": np.array(starts, dtype=np.int32),
        "training/losses": np.array(losses, dtype=np.float32),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="by default, the package's own")
    out = parser.parse_args(words).out
    torch.set_num_threads(1)  # so that sums have one order; so small matrices are faster so, too
    # A folder that exists already is replaced once the new one is whole.
    with atomic_folder(out, replace=True) as folder:
        values = {
            **logit_values("four_heads"),
            **logit_values("three_heads"),
            **greedy_values(),
            **padded_values(),
            **alibi_values(),
            **optimizer_values(),
            **training_values(),
            **adapter_values(folder),
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in values.items()}
        save_file(arrays, folder / "reference.safetensors")
        made_with = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        text = json.dumps({"made_with": made_with} | SETTINGS, indent=1)
        (folder / "settings.json").write_text(text + "\n", encoding="utf-8")
        for path in folder.rglob("*.*"):
            path.chmod(0o644)  # safetensors files are for their owner alone


if __name__ == "__main__":
    main()
