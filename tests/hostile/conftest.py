"""What the tests of hostile input share."""

from pathlib import Path

import mlx.core as mx
import pytest

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import save_adapter


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad input that is taken for good must not go to the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-2 adapter on `tiny_base`, of ones. Read only."""
    folder = tmp_path_factory.mktemp("adapters") / "good"
    weights = {
        f"transformer.h.{layer}.self_attention.query_key_value.lora_{matrix}.weight": mx.ones(shape)
        for layer in range(2)
        for matrix, shape in (("A", (2, 64)), ("B", (192, 2)))
    }
    save_adapter(
        folder, weights, AdapterConfig(str(tiny_base), 2, 4.0, targets=("query_key_value",))
    )
    return folder
