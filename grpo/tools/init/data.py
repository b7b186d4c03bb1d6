"""The data set of a new config: what DATA names, and what its problems look like."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import DataSettings
from grpo.config.reading import did_you_mean
from grpo.data.common.files import SUFFIXES, read_rows
from grpo.experience import plugins
from grpo.stages.problems import load_problems
from grpo.tools.init.settings import GIVEN, Overrides, Setting, make_tree
from grpo.types import Problem, UserError, first_line

MAX_MEASURED = 2000  # problems of the set that are read, evenly spaced
FILE_SETS = ("hub", "jsonl", "traces")  # data sets that have no problems without `data.path`
MAX_UNREADABLE = 0.05  # share of gold answers; `reward_pool.max_failed` stops a run above it
MAX_WITHOUT_SOLUTION = 0.05  # share; the default of `data.max_dropped`
HUB_ANSWERS = {"final_answer", "reward_model"}  # columns of answers that only `hub` reads
CHOICE_LETTER = re.compile(r"\(?[A-Ja-j]\)?\.?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """A data set and its measurements.

    Attributes:
        settings: The section `data` of the config.
        problems: Training problems, evenly spaced in the set, at most MAX_MEASURED.
        num_training: Number of all training problems.
        num_held_out: Number of problems of the test split; 0 without one.
        no_held_out_reason: Why there are none, "" otherwise.
        reward: The reward that can verify the answers.
        reward_reason: Why, for a comment.
    """

    settings: list[Setting]
    problems: list[Problem]
    num_training: int
    num_held_out: int
    no_held_out_reason: str
    reward: str
    reward_reason: str

    @property
    def has_solutions(self) -> bool:
        """Whether any problem has a worked solution."""
        return any(problem.solution for problem in self.problems)

    @property
    def measured(self) -> str:
        """The measured problems in words, e.g. "all 600 prompts" or "2,000 prompts"."""
        if len(self.problems) == self.num_training:
            return f"all {self.num_training:,} prompts"
        return f"{len(self.problems):,} prompts"


def data_section(data: str, stage: str, available: Sequence[str]) -> dict[str, Any]:
    """Returns the section `data` of the config for a value of --data.

    Args:
        data: A name, a file, a folder, `module:function`, or a hub id.
        stage: `train` or `sft`.
        available: The names of the data sets in `data/`.

    Raises:
        UserError: There is no such data set or file.
    """
    if data in available and data not in FILE_SETS:
        return {"name": data}
    if _exists(data):
        return _section_of_path(data, stage)
    if ":" in data:
        return {"name": data}
    if data in FILE_SETS:
        raise UserError(
            f"--data {data}: this data set reads a file or a hub id: name that instead, e.g. "
            "--data problems.jsonl"
        )
    if data.endswith(SUFFIXES) or data.startswith((".", "/", "~")):
        raise UserError(f"--data {data}: no such file")
    if data.count("/") == 1:
        return _section_of_hub_id(data, available)
    names = [name for name in available if name not in FILE_SETS]
    raise UserError(
        f"--data {data}: no data set or file of this name{did_you_mean(data, names)}. Expected one "
        f"of {', '.join(names)}; a {', '.join(SUFFIXES)} file; module:function; or owner/name"
    )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except OSError as error:  # a name that is too long, a folder without permission
        raise UserError(f"--data {path[:200]}: cannot be read: {first_line(error)}") from None


def _section_of_path(path: str, stage: str) -> dict[str, Any]:
    """Returns the section for a file, or a folder with traces or problems.

    What `jsonl` and `traces` cannot read is left to `hub`, which also reads local files.
    """
    file = Path(path).expanduser()
    if file.is_dir() and (file / "traces.jsonl").is_file():
        return {"name": "traces", "path": path}
    if file.is_file() and not path.endswith(SUFFIXES):
        raise UserError(f"--data {path}: unsupported format. Supported: {', '.join(SUFFIXES)}")
    has_problems = any((file / f"train{suffix}").is_file() for suffix in SUFFIXES)
    if path.endswith(".csv") or (file.is_dir() and not has_problems):
        return {"name": "hub", "path": path}
    fields = _first_fields(path)
    if stage == "sft" and "answer" not in fields:
        return {"name": "traces", "path": path}
    is_conversation = isinstance(fields.get("prompt"), list)
    if is_conversation or ("answer" not in fields and HUB_ANSWERS & fields.keys()):
        return {"name": "hub", "path": path}
    return {"name": "jsonl", "path": path}


def _section_of_hub_id(hub_id: str, available: Sequence[str]) -> dict[str, Any]:
    if "hub" in available:
        return {"name": "hub", "path": hub_id}
    name = hub_id.partition("/")[2]
    raise UserError(
        f"--data {hub_id}: no such file, and this version reads no other data sets by their hub id"
        f"{did_you_mean(name, available)}. Download it, and name its .jsonl or .parquet file"
    )


def _first_fields(path: str) -> dict[str, Any]:
    """Returns the fields of the first row of a file, or of the training file in a folder."""
    return read_rows(path, stems=["train"], hub=None)[0].fields


def read_data(data: str, stage: str, overrides: Overrides) -> DataFacts:
    """Reads a data set, and measures it.

    Args:
        data: The value of --data.
        stage: `train` or `sft`.
        overrides: The assignments of the command line, e.g. `data.path=DIR`.

    Raises:
        UserError: The data set is unknown or cannot be read, or the stage cannot train on it.
        DownloadError: The data set cannot be fetched from the hub.
    """
    section = data_section(data, stage, plugins.plugin_names("grpo.data"))
    settings = [Setting(f"data.{key}", value) for key, value in section.items()]
    tree = make_tree(settings, overrides)
    source = DataSettings.model_validate(tree["data"])
    seed = tree.get("seed", 0)
    if stage == "train" and source.name == "jsonl":
        _require_answers(source)
    by_set = load_problems(source, "train", seed)
    problems = _evenly_spaced(by_set.values())
    reward, reward_reason = "accuracy", ""
    if overrides.has("rewards"):
        reward, reward_reason = "", GIVEN
    elif stage == "train":
        reward, reward_reason = choose_reward(problems, data)
    else:
        settings += _solution_settings(problems, data)
    num_held_out, no_held_out_reason = 0, ""
    if stage == "train":
        num_held_out, no_held_out_reason = _num_held_out(source, seed)
    num_training = sum(len(problems_of_set) for problems_of_set in by_set.values())
    return DataFacts(
        settings=settings,
        problems=problems,
        num_training=num_training,
        num_held_out=num_held_out,
        no_held_out_reason=no_held_out_reason,
        reward=reward,
        reward_reason=reward_reason,
    )


def _require_answers(source: DataSettings) -> None:
    """Raises UserError if the rows of a file have no answers, unless the config expects none."""
    if source.options.get("answers") is False or source.path is None:
        return
    fields = _first_fields(source.path)
    if "answer" not in fields:
        raise UserError(
            f"data.path={source.path}: the rows have no field 'answer', only {', '.join(fields)}. "
            "Rewards compare completions with it. To train without gold answers, let a model "
            "grade: add data.options={answers: false} 'rewards={preference: {weight: 1.0, options: "
            "{url: URL, model: NAME}}}'"
        )


def _evenly_spaced(sets: Any) -> list[Problem]:
    """Returns at most MAX_MEASURED problems of each data set."""
    problems: list[Problem] = []
    for problems_of_set in sets:
        step = max(1, -(-len(problems_of_set) // MAX_MEASURED))
        problems += [problems_of_set[index] for index in range(0, len(problems_of_set), step)]
    return problems


def _num_held_out(source: DataSettings, seed: int) -> tuple[int, str]:
    """Returns the number of problems of the test split, and why there are none."""
    try:
        by_set = load_problems(source, "test", seed)
    except UserError as error:  # also a download that fails
        return 0, first_line(error)
    num_held_out = sum(len(problems_of_set) for problems_of_set in by_set.values())
    return num_held_out, "" if num_held_out else "the test split is empty"


def choose_reward(problems: Sequence[Problem], data: str) -> tuple[str, str]:
    """Returns the reward that can verify the answers, and the reason.

    Args:
        problems: Problems of the set.
        data: The name of the set, for messages.

    Raises:
        UserError: The problems have no answers, or answers that the reward cannot read.
    """
    metas = [problem.meta for problem in problems]
    if all("numbers" in meta and "target" in meta for meta in metas):
        return "countdown", "every problem has numbers and a target"
    if all({"test", "test_list", "io"} & meta.keys() for meta in metas):
        return "code", "every problem has tests"
    num_without = sum(not problem.answer for problem in problems)
    if num_without > MAX_UNREADABLE * len(problems):
        raise UserError(
            f"--data {data}: {num_without:,} of {len(problems):,} problems have no answer, which "
            "rewards compare completions with. Let a model grade: add 'rewards={preference: "
            "{weight: 1.0, options: {url: URL, model: NAME}}}'"
        )
    if all(CHOICE_LETTER.fullmatch(problem.answer) for problem in problems):
        reward, reason = "choice", "every answer is the letter of a choice"
    else:
        reward, reason = "accuracy", f"it can read the answers, for example {problems[0].answer!r}"
    _require_readable(problems, reward, data)
    if len(reason) > 70:
        reason = "it can read the answers"
    return reward, reason


def _require_readable(problems: Sequence[Problem], reward: str, data: str) -> None:
    """Raises UserError if the reward cannot read so many gold answers that a run would stop."""
    check_problem = plugins.companion("grpo.rewards", reward, "reward", "check_problem")
    if check_problem is None:
        return
    unreadable = [problem for problem in problems if check_problem(problem) is not None]
    if len(unreadable) <= MAX_UNREADABLE * len(problems):
        return
    example = unreadable[0]
    answer = example.answer if len(example.answer) <= 60 else f"{example.answer[:60]}..."
    raise UserError(
        f"--data {data}: the reward {reward} cannot read {len(unreadable):,} of {len(problems):,} "
        f"gold answers, for example {answer!r} of {example.id} ({check_problem(example)}). Shorten "
        "the answers, or let a model grade: rewards={preference: {weight: 1.0, options: {url: URL, "
        "model: NAME}}}"
    )


def _solution_settings(problems: Sequence[Problem], data: str) -> list[Setting]:
    """Returns the settings about problems without a worked solution.

    Raises:
        UserError: No problem has a solution, or too few.
    """
    num_without = sum(not problem.solution for problem in problems)
    if num_without == 0:
        return []
    if num_without > MAX_WITHOUT_SOLUTION * len(problems):
        raise UserError(
            f"--data {data}: {num_without:,} of {len(problems):,} problems have no worked solution "
            "(field 'solution'), which grpo sft trains on. Sample solutions with grpo collect and "
            "name its run as --data, or use --stage train"
        )
    comment = f"{num_without:,} of {len(problems):,} problems have no solution"
    return [Setting("data.malformed", "drop", comment)]
