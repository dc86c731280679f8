"""Nothing that a model folder holds is run: each way to have code run leaves a sentinel, or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

HOSTILE = """
from pathlib import Path
Path({sentinel!r}).touch()
class Evil:
    def __init__(self, *args, **kwargs): pass
Model = ModelArgs = EvilConfig = EvilModel = EvilTokenizer = EvilTokenizerFast = Evil
"""
MODULES = [
    "falcon.py",
    "modeling_falcon.py",
    "configuration_falcon.py",
    "tokenization_falcon.py",
    "evil.py",
    "__init__.py",
    "setup.py",
    "conftest.py",
    "sitecustomize.py",
    "handler.py",
    "custom_generate/generate.py",
]
TEMPLATE = (
    "{{% for c in ().__class__.__base__.__subclasses__() %}}"
    "{{% if c.__name__ == 'catch_warnings' %}}"
    "{{{{ c()._module.__builtins__['open']({sentinel!r}, 'w') }}}}"
    "{{% endif %}}{{% endfor %}}"
    "{{{{ cycler.__init__.__globals__.os.system('touch {sentinel}') }}}}"
)


def change(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(value | changes))


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def arm(folder: Path, sentinel: Path) -> Path:
    """Every way to have code run that Hugging Face's libraries and mlx-lm know."""
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(HOSTILE.format(sentinel=str(sentinel)))
    template = TEMPLATE.format(sentinel=str(sentinel))
    classes = {
        "AutoConfig": "configuration_falcon.EvilConfig",
        "AutoModel": "modeling_falcon.EvilModel",
        "AutoModelForCausalLM": "modeling_falcon.EvilModel",
        "AutoTokenizer": ["tokenization_falcon.EvilTokenizer", "evil.EvilTokenizerFast"],
    }
    change(
        folder / "config.json",
        auto_map=classes,
        model_file="evil.py",
        custom_pipelines={"text-generation": {"impl": "evil.Evil", "pt": ["EvilModel"]}},
        trust_remote_code=True,
    )
    change(
        folder / "tokenizer_config.json",
        auto_map=classes,
        chat_template=template,
        trust_remote_code=True,
    )
    change(folder / "generation_config.json", custom_generate="evil.py", trust_remote_code=True)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates/tool_use.jinja").write_text(template)
    return folder


def test_the_trap_works(tmp_path, sentinel, tiny_checkpoint, monkeypatch):
    """Imported, or loaded with trust, the folder runs its code."""
    from mlx_lm.utils import load_model

    folder = arm(shutil.copytree(tiny_checkpoint, tmp_path / "model"), sentinel)
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(Exception):  # noqa: B017, PT011  the sentinel is what counts
        load_model(folder, trust_remote_code=True)
    assert sentinel.exists()


def test_convert_runs_nothing_and_takes_nothing_along(imate, tmp_path, sentinel, tiny_checkpoint):
    folder = arm(shutil.copytree(tiny_checkpoint, tmp_path / "model"), sentinel)
    imate("convert", folder, "--out", "out")
    assert not sentinel.exists()
    for path in Path("out").rglob("*"):
        assert str(sentinel).encode() not in path.read_bytes(), path
        assert b"auto_map" not in path.read_bytes() or path.name == "falcon.py", path
    names = {path.name for path in Path("out").iterdir()}
    assert names & {Path(name).name for name in MODULES} == {"falcon.py"}


def test_train_generate_and_export_run_nothing(
    imate, tmp_path, sentinel, tiny_base, questions, monkeypatch
):
    folder = arm(shutil.copytree(tiny_base, tmp_path / "model"), sentinel)
    monkeypatch.syspath_prepend(str(tmp_path))  # as where the folder is the current one
    rows = ["--set", f"data.path={questions}", "--set", "train.epochs=1"]
    refused = imate("train", "--model", folder, *rows, "--out", "adapter", code=1).stderr
    assert "it reaches for '__class__' of a tuple, which is not allowed" in refused
    rows += ["--set", "data.template=plain"]
    imate("train", "--model", folder, *rows, "--out", "adapter")
    imate("generate", "What is a loss?", "--adapter", "adapter", "--max-tokens", "2")
    for words in (["data", "check"], ["data", "preview"]):
        imate(*words, questions, "--model", folder, code=1)
        imate(*words, questions, "--model", folder, "--template", "plain")
    imate("bench", "--model", folder, *rows, "--steps", "1", "--warmup", "0")
    imate("export", "adapter", "--out", "copy")
    assert not sentinel.exists()


def test_commands_run_nothing_of_the_folder_they_stand_in(
    imate, tmp_path, sentinel, tiny_base, monkeypatch
):
    folder = arm(shutil.copytree(tiny_base, tmp_path / "model"), sentinel)
    monkeypatch.chdir(folder)
    imate("generate", "What is a loss?", "--model", ".", "--max-tokens", "1", code=1)
    imate("generate", "What is a loss?", "--model", ".", "--max-tokens", "1", "--raw")
    assert not sentinel.exists()


def test_adapter_with_code_runs_nothing(imate, sentinel, tiny_base, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(HOSTILE.format(sentinel=str(sentinel)))
    change(
        folder / "adapter_config.json",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
    )
    imate("generate", "x", "--model", tiny_base, "--adapter", folder, "--max-tokens", "1")
    imate("export", folder, "--out", "copy")
    assert not sentinel.exists()
    assert {path.suffix for path in Path("copy").iterdir()} <= {
        ".json",
        ".jsonl",
        ".md",
        ".toml",
    } | {".safetensors"}
