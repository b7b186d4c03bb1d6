"""The README and the pages under docs/ agree with the code: commands, configs, files and tables."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from random_loop import make_loop

from grpo import cli
from grpo import config as configs
from grpo.config import EvalConfig
from grpo.config.presets import PRESETS
from grpo.metrics.diagnosis import RULES
from grpo.stages.registry import find_stage, stage_for_config
from grpo.types import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
GRPO_COMMAND = re.compile(r"(?:\.venv/bin/)?grpo [a-z]+ configs/")
FILE_NAME = re.compile(r"`((?:configs|launch|tests|docs|grpo|rewards|data)/[\w./-]+\.\w+)`")


def documented_commands():
    """Returns `(page, line)` of every `grpo` command with a config in a code block of the pages."""
    commands = []
    for page in PAGES:
        for block in CODE_BLOCK.findall(page.read_text()):
            joined_lines = block.replace("\\\n", "")
            for line in joined_lines.splitlines():
                if GRPO_COMMAND.match(line):
                    commands.append((page.name, line))
    return commands


COMMANDS = documented_commands()
SMALL_CONFIG = {
    "model": {"path": "tiny-qwen2"},
    "data": {"name": "arithmetic"},
    "train": {"rollouts": 1},
}


def section(page, title):
    """Returns the section of a page that begins with a title."""
    text = (ROOT / "docs" / page).read_text()
    return text[text.index(title) :].partition("\n## ")[0]


def test_the_pages_contain_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_the_config_of_a_documented_command_loads(page, line):
    _, command, config, *arguments = shlex.split(line)
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    if command == "doctor":
        stage = stage_for_config(configs.read_yaml(str(ROOT / config)))
    elif command == "bench":
        stage = find_stage("train")
    else:
        stage = find_stage(command)
    configs.load(str(ROOT / config), overrides, stage.config_class)


def test_an_unknown_key_in_an_override_is_an_error():
    """Without this error the test above could not detect a wrong override."""
    with pytest.raises(UserError):
        configs.load(str(ROOT / "configs/tiny.yaml"), ["train.rollout=3"])


def test_pages_are_wrapped_at_100_columns():
    """Table rows are exempt because they cannot be wrapped."""
    long_lines = []
    for page in [*PAGES, ROOT / "tests" / "gpu" / "README.md"]:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            if len(line) > 100 and not line.startswith("|"):
                long_lines.append(f"{page.name}:{number}")
    assert not long_lines


def test_the_readme_names_every_command_and_every_page():
    text = (ROOT / "README.md").read_text()
    commands = next(action.choices for action in cli._parser()._actions if action.choices)
    for name in commands:
        assert f"grpo {name}" in text
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text


def test_every_image_and_every_linked_page_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_diagrams_fit_a_narrow_page():
    for page in (ROOT / "README.md", ROOT / "docs" / "architecture.md"):
        diagrams = [block for block in CODE_BLOCK.findall(page.read_text()) if "|" in block]
        for block in diagrams:
            if "->" in block:
                assert max(len(line) for line in block.splitlines()) <= 60, page.name


def test_the_models_that_the_pages_download_are_those_of_the_configs_that_follow():
    downloads = 0
    for page in PAGES:
        for block in CODE_BLOCK.findall(page.read_text()):
            for model in re.findall(r"hf download (\S+)", block):
                downloads += 1
                for name in re.findall(r"configs/\S+\.yaml", block):
                    assert configs.load(str(ROOT / name), []).model.path == model
    assert downloads


def test_every_file_named_in_the_pages_exists():
    for page in PAGES:
        for name in FILE_NAME.findall(page.read_text()):
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
        name = f"{path.parent.name}/pipeline" if path.stem == "pipeline" else path.stem
        assert f"`{name}`" in text, name


def test_the_readme_names_every_preset():
    text = (ROOT / "README.md").read_text()
    for name in PRESETS:
        assert f"`{name}`" in text


def yaml_blocks():
    """Returns `(page, text)` of every YAML block of the pages: complete configs and sections."""
    blocks = []
    for page in PAGES:
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            blocks.append(pytest.param(text, id=f"{page.stem}-{len(blocks)}"))
    return blocks


@pytest.mark.parametrize("text", yaml_blocks())
def test_a_yaml_block_is_a_config_or_sections_of_one(text, tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(text if yaml.safe_load(text) else "{}")
    tree = configs.read_yaml(str(path))
    stage = stage_for_config(tree)
    if "run_dir" not in tree:  # some sections: those of a small config stand for the others
        tree["run_dir"] = "runs/x"
    if stage.command in ("train", "eval"):
        tree = {**SMALL_CONFIG, **tree}
        tree["train"] = {**SMALL_CONFIG["train"], **tree["train"]}
    configs.parse(tree, "page", stage.config_class)


def test_the_sets_in_the_page_about_evaluation_load():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    tree = {"run_dir": "x", "model": {"path": "m"}, **yaml.safe_load(snippet)}
    maths, physics = configs.parse(tree, kind=EvalConfig).set_configs().values()
    assert list(maths.rewards) == ["accuracy"]
    assert list(physics.rewards) == ["choice"]
    assert maths.prompt.max_tokens == physics.prompt.max_tokens == 1024
    assert "boxed{}" in physics.prompt.system
    assert (maths.sampling.max_tokens, physics.sampling.max_tokens) == (2048, 4096)


def test_every_rule_of_the_diagnosis_is_explained_once():
    table = section("watching.md", "## What the diagnosis says")
    assert re.findall(r"^\| `(\w+)` \| .* \| .* \|$", table, re.MULTILINE) == list(RULES)


def test_every_message_in_the_troubleshooting_page_is_one_of_the_program():
    """A message is found in the source after its string literals are joined."""
    sources = [path.read_text() for path in (ROOT / "grpo").rglob("*.py")]
    sources += [path.read_text() for path in (ROOT / "data").rglob("*.py")]
    program = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    messages = []
    for title in ("## A run stops", "## A run does not start"):
        messages += re.findall(
            r"^\| `(.+?)` \|", section("troubleshooting.md", title), re.MULTILINE
        )
    assert len(messages) >= 12
    for message in messages:
        assert message in program, message


def test_every_metric_of_a_run_is_in_the_glossary(tiny, tmp_path):
    loop = make_loop(
        tmp_path,
        tiny,
        algorithm={"kl_coef": 0.01},
        train={"rollouts": 1, "problems": 4, "group_size": 4},
    )
    loop.train()
    patterns = glossary_patterns()
    undocumented = []
    for key in loop.run.read_metrics()[-1]:
        if key in ("step", "rollout"):
            continue
        if not any(re.fullmatch(pattern, key) for pattern in patterns):
            undocumented.append(key)
    assert not undocumented


def glossary_patterns():
    """Returns a regular expression for each metric name in the glossary."""
    placeholders = {"REASON": "[^/]+", "NAME": "[^/]+", "PHASE": "[^/]+", r"\.\.\.": ".+"}
    patterns = []
    for name in re.findall(r"`([\w./]+)`", section("metrics.md", "# Metrics")):
        pattern = re.escape(name)
        for placeholder, expression in placeholders.items():
            pattern = pattern.replace(placeholder, expression)
        patterns.append(pattern)
    # The reasons of a reward (`NAME/REASON`): this pattern would match almost every metric.
    patterns.remove("[^/]+/[^/]+")
    return patterns
