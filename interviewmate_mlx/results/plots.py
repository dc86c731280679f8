"""Curves as SVG, by matplotlib: text stays text, and colours fit a light and a dark page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from interviewmate_mlx.results.runs import Curve

# Okabe and Ito's, which colour-blind people tell apart; each is visible on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_DASHES = ("-", "--", "-.", ":")  # and on paper without colours
# Stands for the colour of the page's text, until the picture is on the page.
_TEXT = "#010203"
_TEXT_KEYS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_SIZE = (7.2, 3.2)  # inches


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: in the legend; empty for none.
        points: (x, y).
        number: of its colour.
        is_faint: drawn thin, behind the others.
        mark: a point to mark.
    """

    label: str
    points: Curve
    number: int
    is_faint: bool = False
    mark: tuple[float, float] | None = None


def can_plot() -> bool:
    """Whether matplotlib, of the extra `plots`, is installed."""
    return find_spec("matplotlib") is not None


def line_plot(name: str, lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """A plot as an SVG element, with ids of its own.

    Args:
        name: of the plot, for its ids.
        lines: the curves.
        x_label, y_label: of the axes.
    """
    import matplotlib  # noqa: PLC0415  an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT
        ),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
            colour = COLOURS[line.number % len(COLOURS)]
            axes.plot(
                xs,
                ys,
                color=colour,
                linestyle="-" if line.is_faint else _DASHES[line.number % len(_DASHES)],
                linewidth=0.6 if line.is_faint else 1.8,
                alpha=0.35 if line.is_faint else 1,
                marker="o" if len(line.points) < 2 else None,
                label=line.label or None,
            )
            if line.mark:
                axes.plot(*line.mark, marker="o", markersize=7, color=colour, linestyle="none")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_TEXT, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if any(line.label for line in lines):
            axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(drawn.getvalue(), name)


def _embedded(text: str, name: str) -> str:
    """A picture for a page: it takes the page's colour and width, and shares no id with others."""
    svg = text[text.index("<svg") :].strip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'^<svg\b([^>]*?) height="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg\b([^>]*?) width="[^"]*"', r'<svg\1 role="img" width="100%"', svg)
    return svg.replace(_TEXT, "currentColor")
