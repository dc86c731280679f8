"""Writes the model card of an adapter: the README.md that the Hub shows."""

from pathlib import Path

from huggingface_hub import ModelCardData

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.files import atomic_file

CARD_FILE = "README.md"


def write_card(
    folder: Path,
    name: str,
    config: AdapterConfig,
    facts: dict[str, str],
    *,
    trained_on: str,
    base_hub_id: str | None,
    base_folder: str,
    base_hint: str = "",
) -> None:
    """Write the card of an adapter.

    Args:
        folder: the adapter's folder.
        name: of the run that trained it.
        config: the adapter's; the text names its `base`.
        facts: further rows of the card's table.
        trained_on: a sentence about the training data.
        base_hub_id: for the card's header; None if the base is not on the Hub.
        base_folder: the folder or Hub id that transformers loads the base from.
        base_hint: how to get that folder, if that takes a step.

    Raises:
        StorageError: it cannot be written.
    """
    header = ModelCardData(
        library_name="peft", tags=["lora", "mlx", "interviewmate"], base_model=base_hub_id
    )
    table = {
        "targets": ", ".join(config.targets),
        "rank, alpha, dropout": f"{config.rank}, {config.alpha:g}, {config.dropout:g}",
        **facts,
    }
    hint = f"# {base_hint}\n" if base_hint else ""
    text = f"""---
{header.to_yaml()}
---

# {name}: a LoRA adapter for {config.base}

{trained_on} `run.toml` in this folder repeats the run.

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in table.items())}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{hint}base = AutoModelForCausalLM.from_pretrained("{base_folder}")
tokenizer = AutoTokenizer.from_pretrained("{base_folder}")
model = PeftModel.from_pretrained(base, "PATH_OR_HUB_ID_OF_THIS_FOLDER")
prompt = tokenizer("Question: What is overfitting?\\nAnswer:", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=200, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0]))
```

This is a small model. It can be wrong and still sound sure. Check its answers before an interview.
"""
    with atomic_file(folder / CARD_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
