"""The README and the pages under docs/.

Every command in them is a command, every config is there, every table says what the code says.
"""

import re
import shlex
from pathlib import Path

import pytest
from random_loop import make_loop

from grpo import cli
from grpo import config as configs
from grpo.config.presets import PRESETS
from grpo.metrics.diagnosis import RULES
from grpo.stages.registry import find_stage, stage_for_config
from grpo.types import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", "").splitlines()
    if re.match(r"(\.venv/bin/)?grpo [a-z]+ configs/", line)
]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_with_a_config_loads_it(page, line):
    _, command, config, *overrides = shlex.split(line)
    overrides = [word for word in overrides if "=" in word and not word.startswith("-")]
    if command == "doctor":
        stage = stage_for_config(configs.read_yaml(str(ROOT / config)))
    elif command == "bench":
        stage = find_stage("train")
    else:
        stage = find_stage(command)
    configs.load(str(ROOT / config), overrides, stage.config_class)


def test_pages_are_wrapped_at_100_columns():
    """All but tables, whose rows cannot be wrapped."""
    long_lines = [
        f"{page.name}:{number}"
        for page in [*PAGES, ROOT / "tests" / "gpu" / "README.md"]
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        if len(line) > 100 and not line.startswith("|")
    ]
    assert not long_lines


def test_every_command_is_in_the_readme_and_every_page_is_named_there():
    text = (ROOT / "README.md").read_text()
    commands = next(action.choices for action in cli._parser()._actions if action.choices)
    assert all(f"grpo {name}" in text for name in commands)
    assert all(f"docs/{page.name}" in text for page in PAGES[1:])


def test_every_file_that_the_pages_name_is_there():
    for page in PAGES:
        for name in re.findall(
            r"`((?:configs|launch|tests|docs|grpo|rewards|data)/[\w./-]+\.\w+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("docs/configs.md", "configs/*.yaml"),
        ("docs/configs.md", "configs/*/pipeline.yaml"),
        ("docs/rewards.md", "rewards/[a-z]*.py"),
        ("docs/data.md", "data/[a-z]*.py"),
        ("README.md", "rewards/[a-z]*.py"),
        ("README.md", "data/[a-z]*.py"),
    ],
)
def test_a_page_names_every_file_of_its_folder(page, files):
    text = (ROOT / page).read_text()
    paths = list(ROOT.glob(files))
    assert paths
    for path in paths:
        name = path.stem if path.stem != "pipeline" else f"{path.parent.name}/pipeline"
        assert f"`{name}`" in text, name


def test_the_readme_names_every_preset():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in PRESETS)


def test_the_config_in_the_readme_loads(tmp_path):
    (config,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    (tmp_path / "gsm8k.yaml").write_text(config)
    configs.load(str(tmp_path / "gsm8k.yaml"), [])


def test_every_rule_of_the_diagnosis_is_explained_once():
    assert re.findall(
        r"^\| `(\w+)` \| .* \| .* \|$", _section("## What the diagnosis says"), re.MULTILINE
    ) == list(RULES)


def test_every_metric_of_a_run_is_in_the_glossary(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        algorithm={"kl_coef": 0.01},
        train={"rollouts": 1, "problems": 4, "group_size": 4},
    )
    loop.train()
    slots = {"REASON": "[^/]+", "NAME": "[^/]+", "PHASE": "[^/]+", r"\.\.\.": ".+"}
    patterns = []
    for name in re.findall(r"`([\w./]+)`", _section("## Metrics")):
        pattern = re.escape(name)
        for slot, what in slots.items():
            pattern = pattern.replace(slot, what)
        patterns.append(pattern)
    patterns.remove("[^/]+/[^/]+")  # a reward's reasons: would match all others
    row = loop.run.read_metrics()[-1]
    assert not [
        key
        for key in row
        if key not in ("step", "rollout") and not any(re.fullmatch(p, key) for p in patterns)
    ]


def _section(title):
    text = (ROOT / "docs" / "watching.md").read_text()
    return text[text.index(title) :].partition("\n## ")[0]


def test_a_wrong_override_in_a_page_would_be_seen():
    with pytest.raises(UserError):
        configs.load(str(ROOT / "configs/tiny.yaml"), ["train.rollout=3"])
