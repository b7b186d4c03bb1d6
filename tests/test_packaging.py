"""The wheel and the source distribution: their files, metadata and version; CHANGELOG and CITATION.

The distributions are built from a copy of the files without git, as in launch/Dockerfile. The
slow tests install a wheel (tests/slow/test_wheel.py).
"""

import datetime
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import grpo
from grpo import files

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FALLBACK_VERSION = PYPROJECT["tool"]["setuptools_scm"]["fallback_version"]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "grpo", "rewards", "data", "configs", "launch")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""


def build(kind, project, target):
    """Builds a wheel or an sdist with the installed build tools, and returns its path."""
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return target / process.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Returns a copy of the files that a distribution is built from, with links, without git."""
    folder = tmp_path_factory.mktemp("project")
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
        else:
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def wheel(project, tmp_path_factory):
    return zipfile.ZipFile(build("wheel", project, tmp_path_factory.mktemp("wheel")))


def tree(folder, pattern="*"):
    """Returns the files in a folder of this checkout as they are called in a wheel."""
    paths = [path for path in (ROOT / folder).rglob(pattern) if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def expected_files():
    names = {f"grpo/{name}" for name in tree("rewards", "*.py") | tree("data", "*.py")}
    names |= tree("grpo", "*.py") | {"grpo/py.typed", "grpo/tools/report.html"}
    names |= {f"grpo/files/{name}" for name in tree("configs") | tree("launch")}
    return names - {f"grpo/files/launch/{name}" for name in files.CLONE_ONLY}


def test_a_wheel_has_the_package_with_configs_and_launch_scripts_and_no_other_package(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected_files()
    for info in wheel.infolist():
        if info.filename.endswith(".sh"):
            assert info.external_attr >> 16 & 0o111, f"{info.filename} is not executable"


def test_a_wheel_has_the_metadata_of_the_distribution(wheel):
    metadata, entry_points = [
        wheel.read(next(name for name in wheel.namelist() if name.endswith(f"dist-info/{file}")))
        for file in ("METADATA", "entry_points.txt")
    ]
    headers = Parser().parsestr(metadata.decode())
    assert headers["Name"] == "grpo-trainer"
    assert headers["Version"] == FALLBACK_VERSION
    assert set(headers.get_all("Provides-Extra")) == {"cpu", "cuda", "dev"}
    lines = entry_points.decode().splitlines()
    assert "grpo = grpo.cli:main" in lines
    assert "grpo = grpo.engines.servers.plugin:register" in lines


def test_a_source_distribution_of_a_clone_gives_the_same_wheel(project, wheel, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(project, clone, symlinks=True)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run([*git, "init", "--quiet"], cwd=clone, check=True)
    subprocess.run([*git, "add", "."], cwd=clone, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=x"], cwd=clone, check=True)
    archive = build("sdist", clone, tmp_path)
    assert "0.1.0.dev1+g" in archive.name  # one commit, no tag
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    with zipfile.ZipFile(build("wheel", source, tmp_path)) as rebuilt:
        assert contents(rebuilt) == contents(wheel)


def contents(wheel):
    """Returns the checksum of each file in a wheel, without its metadata."""
    return {
        info.filename: info.CRC for info in wheel.infolist() if "dist-info" not in info.filename
    }


def test_importing_grpo_does_not_read_the_version():
    program = """
import sys, grpo
assert "importlib.metadata" not in sys.modules
assert grpo.__version__
assert "importlib.metadata" in sys.modules
"""
    command = [sys.executable, "-S", "-c", program]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, check=True)


def test_the_version_of_a_package_that_is_not_installed_is_unknown(monkeypatch):
    def raise_not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", raise_not_found)
    assert grpo.__version__ == "unknown"
    with pytest.raises(AttributeError, match="has no attribute 'version'"):
        _ = grpo.version


def test_the_version_option_prints_the_installed_version(capsys, monkeypatch):
    from grpo import cli

    monkeypatch.setattr("importlib.metadata.version", lambda name: f"version of {name}")
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == "version of grpo-trainer\n"


def test_the_newest_version_in_the_changelog_is_the_next_one():
    """The version of a copy without git is a development version of it."""
    headings = re.findall(r"^## \[?(\S+?)\]? - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings
    newest, date = headings[0]
    assert newest == FALLBACK_VERSION.removesuffix(".dev0")
    assert date == "unreleased" or datetime.date.fromisoformat(date)


def test_the_citation_file_has_the_required_keys():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The grpo developers"}]
    assert citation["type"] == "software"
    assert citation["license"] == PYPROJECT["project"]["license"]
    allowed = {"abstract", "cff-version", "keywords", "license", "repository-code", "version"}
    assert citation.keys() <= allowed | {"message", "title", "authors", "type", "date-released"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_an_issue_form_has_the_keys_that_the_hosting_site_requires(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "body"} <= form.keys()
    inputs = [element for element in form["body"] if element["type"] != "markdown"]
    assert inputs
    ids = [element["id"] for element in inputs]
    assert len(ids) == len(set(ids))
    for element in inputs:
        assert element["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert element["attributes"]["label"]


def test_a_bug_report_asks_for_the_files_of_the_run():
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    for words in ("grpo doctor", "manifest.json", "config.yaml", "metrics.jsonl", "grpo --version"):
        assert words in text
