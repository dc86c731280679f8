"""Every block of every page is run as it stands, or says why not; every link leads somewhere.

In a page, a comment before a block says what it is:

    <!-- not run: WHY -->     a block that needs what a test does not have
    <!-- exit code 1 -->      commands that are to fail
    <!-- output -->           what the block before it prints; `...` stands for anything
    <!-- file: NAME -->       a file that later blocks use
    <!-- message -->          what this package says, found in its sources
    <!-- message of NAME -->  what another program says

The blocks of a page share a folder and run in order. What they would take from elsewhere is
small here: the Hub is a server on loopback, whose falcon-rw-1b has two layers, and the shipped
questions are twelve.
"""

import ast
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_falcon, write_checkpoint
from click.testing import Result
from hub_server import TOKEN, HubServer

import interviewmate_mlx
from interviewmate_mlx import errors
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.hub import names

PACKAGE = Path(interviewmate_mlx.__file__).parent
CHECKOUT = PACKAGE.parent
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
OTHERS = [CHECKOUT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
NAMES = [page.name for page in PAGES]
FALCON = "tiiuae/falcon-rw-1b"
# Languages of blocks that are shown and not run, unless a comment says more.
SHOWN = ("json", "text", "toml")
# Programs beside ours that pages may call; each is in the environment of the tests.
PROGRAMS = ("mlx_lm.generate",)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comment before it."""

    page: str
    line: int  # of its first line
    language: str
    text: str
    comment: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page in order.

    Raises:
        ValueError: a fence is not closed, or bears no language.
    """
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if not lines[number].startswith("```"):
            number += 1
            continue
        language = lines[number].removeprefix("```").strip()
        if not language:
            raise ValueError(f"{page}:{number + 1}: a block without a language")
        end = next((n for n in range(number + 1, len(lines)) if lines[n] == "```"), None)
        if end is None:
            raise ValueError(f"{page}:{number + 1}: a block that does not end")
        before = "\n".join(lines[:number]).rstrip().rpartition("\n")[2]
        comment = re.fullmatch(r"<!-- (.*) -->", before)
        content = "\n".join(lines[number + 1 : end]) + "\n"
        found.append(Block(page, number + 2, language, content, comment[1] if comment else ""))
        number = end + 1
    return found


def check_block(block: Block) -> None:
    """Refuse a block that would be neither run nor excused."""
    kind, _, rest = block.comment.partition(":")
    if kind == "not run":
        assert rest.strip(), f"{block.place}: it is not run, but does not say why"
        return
    known = ("exit code 1", "output", "file", "message", "")
    assert kind in known or kind.startswith("message of "), f"{block.place}: {block.comment}?"
    runnable = ("console", "python")
    assert block.language in (*runnable, *SHOWN), (
        f"{block.place}: a {block.language} block cannot be run; use console or python, or say why "
        "not in a comment before it"
    )
    if block.language == "console":
        for words in commands(block.text):
            assert words[0] in ("imate-mlx", *PROGRAMS), (
                f"{block.place}: {words[0]} cannot be run; say why in a comment before the block"
            )


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block, in words; lines may be comments or go on after a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


class Runner:
    """Runs the blocks of one page, one after the other, in the current folder."""

    def __init__(
        self, imate: Callable[..., Result], capsys: pytest.CaptureFixture[str], hub: HubServer
    ) -> None:
        self.imate, self.capsys, self.hub = imate, capsys, hub
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def run(self, block: Block) -> None:
        kind, _, rest = block.comment.partition(":")
        if kind == "not run":
            return
        if kind == "file":
            Path(rest.strip()).write_text(block.text, encoding="utf-8")
        elif kind == "output":
            assert_printed(self.printed, block)
        elif block.language == "console":
            self.printed = ""
            for words in commands(block.text):
                self.printed += self.run_command(words, int(kind == "exit code 1"), block.place)
        elif block.language == "python":
            # Its lines keep their numbers in a traceback.
            code = "\n" * (block.line - 1) + block.text
            self.capsys.readouterr()
            exec(compile(code, block.page, "exec"), self.names)
            self.printed = self.capsys.readouterr().out

    def run_command(self, words: list[str], code: int, place: str) -> str:
        program, *arguments = words
        if program == "imate-mlx":
            result = self.imate(*arguments, code=code)
            return result.stdout + result.stderr
        path = Path(sys.executable).with_name(program)
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == code, f"{place}: {done.stderr}"
        return done.stdout


def assert_printed(printed: str, block: Block) -> None:
    """Hold a block's lines to what was printed, in that order."""
    lines = iter(printed.splitlines())
    for wanted in block.text.splitlines():
        pattern = ".*".join(map(re.escape, wanted.split("...")))
        assert any(re.fullmatch(pattern, line.rstrip()) for line in lines), (
            f"{block.place}: {wanted!r} is not printed there, but:\n{printed}"
        )


@pytest.fixture(scope="session")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Hub here has as falcon-rw-1b."""
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "falcon", tiny_falcon())


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the shipped preferences."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in (("train.jsonl", 12), ("valid.jsonl", 3)):
        lines = (names.shipped_data("interview-preferences") / name).read_text(encoding="utf-8")
        (folder / name).write_text("".join(lines.splitlines(True)[:count]), encoding="utf-8")
    return folder


@pytest.fixture
def runner(
    imate: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    falcon: Path,
    questions: Path,
    pairs: Path,
) -> Iterator[Runner]:
    """An empty folder, a Hub, and few rows under the names of the shipped ones."""
    shipped = names.shipped_data
    few = {"interview": questions, "interview-preferences": pairs}
    monkeypatch.setattr(names, "shipped_data", lambda name: few.get(name) or shipped(name))
    with HubServer({FALCON: falcon}) as hub:
        hub.isolate(monkeypatch, tmp_path.parent / f"{tmp_path.name}-home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Runner(imate, capsys, hub)


# blocks


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(page.name, page.read_text(encoding="utf-8")):
        check_block(block)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own upload
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_of_a_page_run_in_order(page, runner):
    for block in blocks(page.name, page.read_text(encoding="utf-8")):
        runner.run(block)
    if "--push you/interview-coach" in page.read_text(encoding="utf-8"):
        assert "adapter_model.safetensors" in runner.hub.uploaded["you/interview-coach"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```bash\nls\n```\n", "cannot be run"),
        ("```console\nmake demo\n```\n", "make cannot be run"),
        ("<!-- not run: -->\n```console\nmake demo\n```\n", "does not say why"),
        ("<!-- not run:  -->\n```python\n1\n```\n", "does not say why"),
        ("<!-- not run, because -->\n```console\nmake demo\n```\n", "not run, because"),
        ("<!-- not run: it takes an hour -->\n```console\nmake demo\n```\n", ""),
        ("```console\n# a comment\nimate-mlx data \\\n  check x\n```\n", ""),
    ],
)
def test_a_block_that_is_neither_run_nor_excused_is_found(text, fault):
    (block,) = blocks("page.md", text)
    if not fault:
        check_block(block)
        return
    with pytest.raises(AssertionError, match=fault):
        check_block(block)


@pytest.mark.parametrize("text", ["```\nls\n```\n", "```console\nls\n"])
def test_a_fence_without_language_or_end_is_found(text):
    with pytest.raises(ValueError, match=r"page\.md:1: a block"):
        blocks("page.md", text)


def test_a_block_that_fails_or_prints_something_else_is_found(runner):
    failing = blocks("page.md", "```console\nimate-mlx data check nowhere\n```\n")
    with pytest.raises(AssertionError):
        runner.run(failing[0])
    silent = blocks("page.md", "```python\nprint('one')\n```\n<!-- output -->\n```text\ntwo\n```\n")
    runner.run(silent[0])
    with pytest.raises(AssertionError, match="'two' is not printed"):
        runner.run(silent[1])


# messages


def said_by_the_package() -> list[str]:
    """Every text in the package's sources; what is put into it stands as a NUL."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(map(str, parts)))
    return texts


def is_said(message: str, texts: list[str]) -> bool:
    """Whether the sources hold each part of a message between its `...`, one of them a phrase."""
    name, _, rest = message.partition(": ")
    if name.endswith("Error"):
        assert issubclass(getattr(errors, name), errors.InterviewMateError)
        message = rest
    parts = [part.strip() for part in message.split("...")]
    assert max(map(len, parts)) >= 8, f"{message!r} says too little to be found"
    return all(any(part in text for text in texts) for part in parts)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_message_of_a_page_is_in_the_sources(page):
    texts = said_by_the_package()
    unsaid = [
        f"{block.place}: {line}"
        for block in blocks(page.name, page.read_text(encoding="utf-8"))
        for line in block.text.splitlines()
        if block.comment == "message" and not is_said(line, texts)
    ]
    assert unsaid == []


def test_a_message_that_nothing_says_is_found():
    texts = said_by_the_package()
    assert is_said("TrainingError: ... is not empty.", texts)
    assert not is_said("TrainingError: ... is quite empty.", texts)
    with pytest.raises(AttributeError):
        is_said("SomeError: ... is not empty.", texts)
    with pytest.raises(AssertionError, match="too little"):
        is_said("... and ...", texts)


# links and paths


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them of plain words."""
    headings = re.findall(
        r"^#+ (.*)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text(encoding="utf-8")))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {link}"


# A path in code font that begins with a folder of the repository or of the package.
TOPS = {path.name for root in (CHECKOUT, PACKAGE) for path in root.glob("[a-z]*/")}
NAMED = re.compile(rf"`((?:{'|'.join(TOPS - {'models', 'adapters', 'site'})})/[\w./*-]*)`")


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
    for path in NAMED.findall(without_blocks(page.read_text(encoding="utf-8"))):
        found = [root for root in (CHECKOUT, PACKAGE) if any(root.glob(path.rstrip("/")))]
        assert found, f"{page.name}: {path}"


def test_how_it_works_names_every_floor():
    text = (CHECKOUT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    house = text.partition("## The house")[2].partition("\n## ")[0]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+)/`", house)) == folders
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert {f"  {name}/" for name in folders} <= {
        line[: len(line.split("/")[0]) + 1] for line in readme.splitlines()
    }


def test_every_function_on_datas_way_exists():
    text = (CHECKOUT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    table = text.partition("## Data's way")[2].partition("\n## ")[0]
    dotted = re.findall(r"`([a-z_]+(?:\.\w+)+)`", table)
    assert len(dotted) > 10
    for name in dotted:
        assert callable(pkgutil.resolve_name(f"{PACKAGE.name}.{name}"))


# the README


def test_readme_has_at_most_150_lines():
    assert len((CHECKOUT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_sample_exchange_of_the_readme_is_a_shipped_row():
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    quoted = [line.removeprefix(">").strip() for line in text.splitlines() if line[:1] == ">"]
    question, answer = " ".join(quoted).split("**Answer:**")
    question = question.removeprefix("**Question:**")
    rows = load_splits(CHECKOUT / "data" / "interview")["train"]
    assert (question.strip(), answer.strip()) in [(row.question, row.answer) for row in rows]
