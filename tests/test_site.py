"""The documentation builds as a site without a warning. The site loads nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo.experience.plugins import plugin_names

DOCS = Path(__file__).parents[1] / "docs"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns the folder of the site. Every warning is an error: a page that no menu lists, too."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "cache"]
    process = subprocess.run([*command, DOCS, folder / "html"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder / "html"


# The attribute with the address of a file that a browser loads with the page, by element.
ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


class LoadedFiles(HTMLParser):
    """Collects the addresses that a browser loads with a page. Links are not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        address = dict(attrs).get(ATTRIBUTES.get(tag, ""))
        if address and not address.startswith("#"):
            self.addresses.append(address)


def test_the_site_has_all_pages(site):
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in site.glob("*.html")}


def test_the_site_loads_nothing_from_elsewhere(site):
    num_addresses = 0
    for page in site.rglob("*.html"):
        parser = LoadedFiles()
        parser.feed(page.read_text())
        for address in parser.addresses:
            num_addresses += 1
            assert not re.match(r"(\w+:)?//", address), f"{page.name}: {address}"
            file = (page.parent / re.split(r"[?#]", address)[0]).resolve()
            assert file.is_file(), f"{page.name}: {address}"
    assert num_addresses > 100
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(\w+:)?//", style.read_text()), style.name


def test_equations_need_no_script(site):
    html = (site / "algorithms.html").read_text()
    assert html.count("<math") > 10
    assert "\\frac" not in html


def test_the_python_reference_has_signatures_and_texts(site):
    html = (site / "api.html").read_text()
    names = [
        "grpo.train",
        "grpo.Model.generate",
        "grpo.types.Problem",
        "grpo.config.load",
        "grpo.rewards.accuracy.verify",
    ]
    names += [f"grpo.data.{name}.load" for name in plugin_names("grpo.data")]
    names += [f"grpo.rewards.{name}.reward" for name in plugin_names("grpo.rewards")]
    for name in names:
        assert f'id="{name}"' in html, name


# Reports by its title whether the page scrolls sideways. Wide tables scroll in their own frame.
MEASURE = """<script>addEventListener("load", () => {
document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1400])
def test_no_page_is_wider_than_the_window(site, width, tmp_path):
    """500 pixels is the narrowest window of Chromium without a display."""
    pages = ["index", "algorithms", "config_reference", "api", "benchmarks", "cluster"]
    for name in pages:
        page = site / f"measured_{name}.html"
        page.write_text((site / f"{name}.html").read_text().replace("</head>", MEASURE + "</head>"))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--window-size={width},900", f"--user-data-dir={tmp_path}", f"file://{page}"]
        environment = {**os.environ, "HOME": str(tmp_path)}
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment
        )
        page.unlink()
        title = re.search(r"<title>(\d+) of (\d+)</title>", process.stdout)
        assert title, process.stderr[-2000:]
        assert int(title[1]) <= int(title[2]), name
