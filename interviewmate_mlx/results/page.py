"""A report as one HTML page, as Markdown with pictures, and as JSON."""

import html
import json
from collections.abc import Iterator
from pathlib import Path

from interviewmate_mlx import __version__
from interviewmate_mlx.errors import StorageError
from interviewmate_mlx.files import atomic_folder, contents
from interviewmate_mlx.results.report import Code, Part, Plot, Quote, Report, Section, Table

PAGE_FILE = "report.html"
_FILES = (PAGE_FILE, "report.md", "report.json")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa; } }
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
}
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 {
  font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 44rem; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); }
.lead p:first-child { font-size: 1.15rem; font-weight: 600; }
.wide { overflow-x: auto; }
table {
  border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .6rem 0;
}
th, td {
  padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; overflow-wrap: anywhere; }
td:first-child { color: var(--quiet); }
figure { margin: 1.2rem 0 1.8rem; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
figure svg { display: block; height: auto; min-width: 30rem; max-width: 46rem; }
summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
pre {
  background: var(--soft); padding: .7rem .9rem; border-radius: .4rem; overflow-x: auto;
  font-size: .88rem;
}
dl { margin: 0; }
dt { font-weight: 600; font-size: .85rem; color: var(--quiet); }
dd { margin: 0; }
blockquote {
  margin: .2rem 0 .8rem; padding-left: .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 44rem;
}
@media print {
  body { max-width: none; font-size: 11pt; }
  details::details-content { content-visibility: visible; }
  summary { display: none; }
  h2, figcaption { break-after: avoid; }
}
"""


def write_report(report: Report, out: Path) -> None:
    """Write a report into a folder; one that was there before is replaced.

    Raises:
        StorageError: the folder holds something else, or cannot be written to.
    """
    if out.exists() and contents(out) and not (out / PAGE_FILE).is_file():
        raise StorageError(
            f"{out} is not empty and holds no report.\nChoose another folder.", "out"
        )
    with atomic_folder(out, replace=True) as folder:
        (folder / PAGE_FILE).write_text(as_html(report), encoding="utf-8")
        (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
        facts = json.dumps(report.facts, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(facts + "\n", encoding="utf-8")
        for section in report.sections:
            for part in section.parts:
                if isinstance(part, Plot) and part.svg:
                    (folder / f"{part.name}.svg").write_text(alone(part.svg), encoding="utf-8")


def alone(svg: str) -> str:
    """A picture as a file of its own, on white: a viewer may have no colour for text."""
    return svg.replace("<svg", '<svg style="background: #fff; color: #222"', 1) + "\n"


def as_html(report: Report) -> str:
    """One page, without scripts, that loads nothing."""
    body = "\n".join(line for section in report.sections for line in _section(section, report))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(report.title)}</h1>
<p class="quiet">Made by interviewmate_mlx {__version__} from the runs' own numbers.</p>
{body}
</body>
</html>
"""


def _section(section: Section, report: Report) -> Iterator[str]:
    is_first = section is report.sections[0]
    yield f"<section{' class=lead' if is_first else ''}>"
    if not is_first:
        yield f"<h2>{html.escape(section.title)}</h2>"
    yield from (_part(part) for part in section.parts)
    yield "</section>"


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Code):
        return f"<pre><code>{html.escape(chr(10).join(part.lines))}</code></pre>"
    if isinstance(part, Quote):
        said = "".join(
            f"<dt>{html.escape(name)}</dt><dd><blockquote>{html.escape(text)}</blockquote></dd>"
            for name, text in part.answers.items()
        )
        return f"<h3>{html.escape(part.question)}</h3><dl>{said}</dl>"
    if isinstance(part, Table):
        return _table(part)
    numbers = _table(part.numbers)
    if not part.svg:
        return f"<figure><figcaption>{html.escape(part.title)}</figcaption>{numbers}</figure>"
    return (
        f"<figure><figcaption>{html.escape(part.title)}</figcaption>"
        f'<div class="wide">{part.svg}</div>'
        f"<details><summary>Numbers</summary>{numbers}</details></figure>"
    )


def _table(table: Table) -> str:
    head = ""
    if any(table.columns):
        cells = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        head = f"<thead><tr>{cells}</tr></thead>"
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    kind = "" if head else ' class="facts"'
    return f'<div class="wide"><table{kind}>{head}<tbody>{rows}</tbody></table></div>'


def as_markdown(report: Report) -> str:
    """The same for a repository or an editor; its pictures are files beside it."""
    lines = [f"# {_plain(report.title)}", ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            lines += [*_markdown(part), ""]
    return "\n".join(lines)


def _markdown(part: Part) -> list[str]:
    if isinstance(part, str):
        return [_plain(part)]
    if isinstance(part, Code):
        return ["```console", *part.lines, "```"]
    if isinstance(part, Quote):
        said = [f"- *{_plain(name)}*: {_plain(text)}" for name, text in part.answers.items()]
        return [f"**{_plain(part.question)}**", "", *said]
    if isinstance(part, Plot):
        picture = [f"![{_plain(part.title)}]({part.name}.svg)", ""] if part.svg else []
        return [f"**{_plain(part.title)}**", "", *picture, *_markdown(part.numbers)]
    lines = [f"| {' | '.join(map(_cell, part.columns))} |", "|---" * len(part.columns) + "|"]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in part.rows]


def _plain(text: str) -> str:
    """One line, with what Markdown would take for a mark escaped."""
    text = " ".join(text.split())
    return "".join(f"\\{char}" if char in r"\`*_[]<>#|" else char for char in text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
