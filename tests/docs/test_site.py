"""The site: what the hook puts into pages, and that it is built without a warning."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

import interviewmate_mlx
from interviewmate_mlx.config import RunConfig, load_run
from interviewmate_mlx.training import events

CHECKOUT = Path(interviewmate_mlx.__file__).parent.parent
LIBRARIES = ("mkdocs", "material", "mkdocstrings", "griffe")
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, LIBRARIES)), reason="the extra docs is not installed"
)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", CHECKOUT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_table_names_every_key_once_with_its_default(hooks):
    rows = [line.strip("| ").split(" | ") for line in hooks.options_table().splitlines()]
    defaults = {row[0].strip("`"): row[1].strip("`") for row in rows if row[0].startswith("`")}
    keys = [
        f"{table}.{key}"
        for table, values in asdict(RunConfig()).items()
        if isinstance(values, dict)
        for key in values
    ]
    assert [row[0].strip("`") for row in rows if row[0].startswith("`")] == keys
    assert defaults["lora.rank"] == "8"
    assert defaults["model.base"] == '"tiiuae/falcon-rw-1b"'
    assert defaults["lora.targets"] == '["attention"]'


def test_options_table_tells_ranges_and_what_the_source_says_of_a_key(hooks):
    table = hooks.options_table()
    assert '| `train.schedule` | `"linear"` | `linear`, `cosine`, `constant` |' in table
    assert "| `lora.dropout` | `0.05` | from 0 to below 1 |" in table
    assert "| `lora.rslora` | `false` | `true` or `false` | scale by alpha / sqrt(rank) |" in table
    # A comment above a key, and one beside it.
    assert "auto: float32 on a CPU, bfloat16 on a GPU" in table
    assert "0: no clipping" in table


def test_comments_above_and_beside_a_field_are_read(hooks):
    source = (
        "class Table:\n"
        "    # first line\n"
        "    # second line\n"
        "    one: int = 1  # beside\n"
        "\n"
        "    # of nothing\n"
        "\n"
        "    two: int = 2\n"
        "    three: int = f(\n"
        "        3\n"
        "    )  # after\n"
    )
    assert hooks.field_comments(source) == {
        ("Table", "one"): "first line second line beside",
        ("Table", "two"): "",
        ("Table", "three"): "after",
    }


def test_promises_are_those_of_security_md(hooks):
    table = hooks.promises_table().splitlines()
    assert table[0].startswith("| promise |")
    assert len(table) > 8
    text = (CHECKOUT / "SECURITY.md").read_text(encoding="utf-8")
    assert set(table) <= set(text.splitlines())


def test_link_out_of_the_site_becomes_its_words(hooks):
    page = "See [`config.py`](../interviewmate_mlx/config.py) and [speed](speed.md)."
    assert hooks.on_page_markdown(page) == "See `config.py` and [speed](speed.md)."
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hooks.on_page_markdown("[x](../nowhere.py)")


class Loaded(HTMLParser):
    """The addresses that a page makes a browser load, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        wanted = "href" if tag == "link" else "src"
        if tag in ("link", "script", "img", "iframe", "source") and values.get(wanted):
            self.addresses.append(values[wanted] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def pages(site: Path) -> Iterator[Loaded]:
    for path in site.rglob("*.html"):
        yield Loaded(path.read_text(encoding="utf-8"))


def test_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    names = {path.with_suffix(".html").name for path in (CHECKOUT / "docs").glob("*.md")}
    assert names <= {path.name for path in site.iterdir()}
    assert not (site / "hooks.py").exists()
    for page in pages(site):
        assert page.addresses
        assert [a for a in page.addresses if re.match(r"(https?:)?//", a)] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert "@import" not in styles
    assert re.findall(r"url\([\"']?(?:https?:)?//", styles) == []


def test_site_holds_the_options_the_promises_and_the_docstrings(site):
    runs, trust, reference = (
        Loaded((site / f"{name}.html").read_text(encoding="utf-8")).text
        for name in ("runs", "trust", "reference")
    )
    for table, values in asdict(RunConfig()).items():
        for key in values if isinstance(values, dict) else ():
            assert f"{table}.{key}" in runs
    assert "tests/hostile/test_no_code.py" in trust
    assert load_run.__doc__
    assert load_run.__doc__.splitlines()[0].replace("`", "") in reference
    for name in ("config.load_run", "training.loop.train", "base.base.Base", "adapter.folder"):
        assert f"interviewmate_mlx.{name}" in reference
    for name in ("Stepped", "Finished", "answer", "apply", "TrainingError"):
        assert name in reference
    # A field of an event, by the comment beside it.
    source = Path(events.__file__).read_text(encoding="utf-8")
    (comment,) = re.findall(r"^    grad_norm: float  # (.*)$", source, re.MULTILINE)
    assert comment in reference


def test_makefile_builds_the_docs_strictly():
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run([make, "--dry-run", "docs"], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mkdocs build --strict" in done.stdout
