"""report.html: the report as one file that needs no server and no network.

It is report.md, word for word, set as a page: the tables and the pictures, which are embedded, each with its
text alternative and the command that draws it again.
"""

import base64
import logging
import re
from collections.abc import Mapping
from html import escape, unescape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

logger = logging.getLogger(__name__)

KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
PICTURE = re.compile(r'<p><img src="([^"]*)" alt="([^"]*)"\s*/?></p>')
HEADING = re.compile(r"<h2>(.*?)</h2>")
TAGS = re.compile(r"<[^>]*>")


def page(markdown: str, folder: Path, commands: Mapping[str, str]) -> str:
    """The report as HTML.

    Args:
        markdown: the text of report.md.
        folder: where its pictures are.
        commands: name of a picture's file -> the command that draws it; "" for all others.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    sections: list[tuple[str, str]] = []

    def anchor(match: re.Match) -> str:
        words = unescape(TAGS.sub("", match[1]))
        sections.append((f"section-{len(sections) + 1}", words))
        return f'<h2 id="{sections[-1][0]}">{match[1]}</h2>'

    body = HEADING.sub(anchor, body)
    body = PICTURE.sub(lambda match: _figure(unescape(match[1]), match[2], folder, commands), body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    title = next(
        (line.removeprefix("# ") for line in markdown.splitlines() if line.startswith("# ")), "Report"
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True
    )
    return environment.get_template("report.html.j2").render(
        title=title.replace("`", ""), sections=sections, body=body
    )


def _figure(source: str, alt: str, folder: Path, commands: Mapping[str, str]) -> str:
    """A picture with its caption; one that is not there is named."""
    path = folder / source
    command = commands.get(path.name, commands[""])
    caption = f"<figcaption>{alt}. Drawn again by <code>{escape(command)}</code></figcaption>"
    if not path.is_file() or path.suffix not in KINDS:
        logger.warning("%s is not there and is left out of report.html", path)
        return f"<figure><p>The picture {escape(source)} is missing.</p>{caption}</figure>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:{KINDS[path.suffix]};base64,{data}" alt="{alt}">{caption}</figure>'
