"""report.html is one file with everything in it, and a browser has nothing to complain about."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from eval.html import page
from eval.report import PLOTS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
COUNT = """<script>addEventListener("load", () => {
const lost = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
document.title = `${document.images.length} pictures, ${lost} missing`; });</script></body>"""


class Reader(HTMLParser):
    """Collects pictures, links and headings, and checks that tags close in order."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.addresses, self.names = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(given)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if "id" in given:
            self.names.add(given["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def report(reported):
    return reported / "report.html"


def test_one_file_holds_everything(report):
    text = report.read_text(encoding="utf-8")
    drawn = list((report.parent / "plots").glob("*.png"))
    read = Reader(text)
    assert len(read.pictures) == len(drawn)
    assert {picture["alt"] for picture in read.pictures} >= set(PLOTS.values())
    for address in read.addresses:
        assert address.startswith(("data:", "#")), address
        assert not address.startswith("#") or address[1:] in read.names
    assert "@import" not in text
    assert "<script" not in text


def test_it_says_what_report_md_says(report):
    text = report.read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))
    markdown = (report.parent / "report.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^## (.*)$", markdown, re.M):
        assert heading in words
    assert "Guideline checklist" in words
    assert text.count("<tr>") == len(
        [line for line in markdown.splitlines() if re.match(r"\| *[^-\s]", line)]
    )
    assert "|---" not in words


def test_every_figure_names_the_command_that_makes_it_again(report):
    text = report.read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == len(list((report.parent / "plots").glob("*.png")))
    for caption in captions:
        if caption.startswith(PLOTS["loss.png"]):
            assert "<code>python -m replace +exp=infini seed=3</code>" in caption
        else:
            assert f"<code>python -m eval run={report.parent}</code>" in caption
    assert f"python -m eval run={report.parent} eval=recall" in text


def test_what_a_model_says_is_text_and_no_markup(tmp_path):
    markdown = "# T <b>\n\n| a |\n|---|\n| `<script>alert(1)</script>` |\n\n<img src=x onerror=alert(1)>\n"
    text = page(markdown, tmp_path, {"": "x"})
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_a_picture_that_is_missing_is_named(tmp_path, caplog):
    text = page("# T\n\n![Loss](plots/loss.png)\n", tmp_path, {"": "python -m eval run=a&b"})
    assert "The picture plots/loss.png is missing" in text
    assert "a&amp;b" in text
    assert "plots/loss.png" in caplog.text


def test_a_browser_shows_every_picture_and_reports_no_error(report, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    shown = tmp_path / "shown.html"
    shown.write_text(report.read_text(encoding="utf-8").replace("</body>", COUNT), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    ended = subprocess.run([*command, shown.as_uri()], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    drawn = len(list((report.parent / "plots").glob("*.png")))
    assert f"<title>{drawn} pictures, 0 missing</title>" in ended.stdout
    assert "CONSOLE" not in ended.stderr
