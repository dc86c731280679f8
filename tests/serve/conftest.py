"""Servers for the tests here."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from served import Served, running

Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Start a server of one's own."""

    def start(*arguments: object, **environment: str) -> AbstractContextManager[Served]:
        return running(tmp_path, *arguments, **environment)

    return start


@pytest.fixture(scope="package")
def served(
    tiny_base: Path,
    tiny_adapter: Path,
    random_adapter: Path,
    questions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """A server with two adapters that keeps what is said, for all tests here."""
    folder = tmp_path_factory.mktemp("served")
    adapters = ["--adapter", f"learned={tiny_adapter}", "--adapter", f"random={random_adapter}"]
    options = ["--keep", "kept.sqlite", "--data", questions]
    with running(folder, "--model", tiny_base, *adapters, *options) as served:
        yield served
