"""A report page: sections of text, tables and pictures in one HTML file without outside parts."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from matplotlib import pyplot as plt


@dataclass
class Image:
    """A picture of the report: `data` is base64 of a `kind` ("png" or "gif") file."""

    data: str
    kind: str
    caption: str


@dataclass
class Table:
    header: Sequence[str]
    rows: list[Sequence[str]]


@dataclass
class Section:
    heading: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)


def png(figure, caption: str) -> Image:
    """A matplotlib figure, which is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return Image(base64.b64encode(buffer.getvalue()).decode(), "png", caption)


def render(
    *, title: str, subtitle: str, verdict: str, sections: Sequence[Section], config: str
) -> str:
    """The page as HTML; `config` is shown at its end."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True).render(
        title=title, subtitle=subtitle, verdict=verdict, sections=sections, config=config
    )
