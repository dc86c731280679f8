"""What is done to pages before the site is built.

A comment in a page stands for text that has another home, so that nothing is written twice:
`<!-- options -->` for the keys of a run, from `interviewmate_mlx/config.py`, and
`<!-- promises -->` for the table in `SECURITY.md`. In the reference, the comment beside a
field of a class describes it.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import griffe

from interviewmate_mlx import config
from interviewmate_mlx.config import RunConfig, to_toml

CHECKOUT = Path(__file__).parent.parent
# A site holds the pages of `docs/` alone, so a link to a file beside them would lead nowhere.
LINK_OUT = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")
TYPES: dict[Any, str] = {bool: "`true` or `false`", tuple[str, ...]: "a list of names"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with each page's text."""
    for name, make in (("options", options_table), ("promises", promises_table)):
        if (marker := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(marker, make())
    return LINK_OUT.sub(link_text, markdown)


def link_text(link: re.Match[str]) -> str:
    """The words of a link to a file of the repository, without the link."""
    text, target = link.groups()
    if not (CHECKOUT / "docs" / target.partition("#")[0]).exists():
        raise FileNotFoundError(f"a page links to {target}, which is not in the repository")
    return text


def options_table() -> str:
    """Every key of a run: a heading and a table for each of the run's tables."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    comments = field_comments(source)
    defaults = default_values()
    lines: list[str] = []
    for table, kind in run_tables().items():
        lines += ["", f"### [{table}]", "", "| key | default | range | |", "|---|---|---|---|"]
        for key in fields(kind):
            cells = (
                f"`{table}.{key.name}`",
                f"`{defaults[table, key.name]}`",
                value_range(kind, key),
                comments.get((kind.__name__, key.name), ""),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip()


def run_tables() -> dict[str, type]:
    """The dataclass of each table of a run; `name` is not a table."""
    return {name: kind for name, kind in get_type_hints(RunConfig).items() if name != "name"}


def default_values() -> dict[tuple[str, str], str]:
    """Each key's default as TOML writes it, by table and key."""
    values, table = {}, ""
    for line in to_toml(RunConfig()).splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif " = " in line:
            key, _, value = line.partition(" = ")
            values[table, key] = value
    return values


def value_range(kind: type, key: Field[Any]) -> str:
    """What a key's value may be, in the words of the message that refuses another."""
    expected: str | None = key.metadata.get("expected")
    if expected is None:
        return TYPES[get_type_hints(kind)[key.name]]
    if expected.startswith("one of "):
        return ", ".join(f"`{name}`" for name in expected.removeprefix("one of ").split(", "))
    return expected


def field_comments(source: str) -> dict[tuple[str, str], str]:
    """The comment beside or above each field of each class, by class and field."""
    by_line = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for owner, node in class_fields(ast.parse(source)):
        last = node.end_lineno or node.lineno
        beside = [by_line[n][0] for n in range(node.lineno, last + 1) if n in by_line]
        above, line = [], node.lineno - 1
        while line in by_line and by_line[line][1]:
            above.insert(0, by_line[line][0])
            line -= 1
        assert isinstance(node.target, ast.Name)
        found[owner, node.target.id] = " ".join(above + beside)
    return found


class FieldComments(griffe.Extension):
    """Take the comments of fields for their docstrings."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Griffe calls this with each class, its fields included."""
        comments = field_comments(cls.source)
        for name, field in cls.attributes.items():
            if comment := comments.get((cls.name, name)):
                field.docstring = field.docstring or griffe.Docstring(comment, parent=field)


def class_fields(tree: ast.Module) -> Iterator[tuple[str, ast.AnnAssign]]:
    """The annotated fields of every class, with its name."""
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            for node in owner.body:
                if isinstance(node, ast.AnnAssign):
                    yield owner.name, node


def promises_table() -> str:
    """The table of SECURITY.md's section "What is promised"."""
    text = (CHECKOUT / "SECURITY.md").read_text(encoding="utf-8")
    section = text.partition("## What is promised\n")[2].partition("\n## ")[0]
    return "\n".join(line for line in section.splitlines() if line.startswith("|"))
