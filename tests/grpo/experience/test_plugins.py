"""Plugins named in a config: files in the packages, functions by module name, both kinds of reward
function, and how their values become rewards and metrics.
"""

import os
import re
import sys
from dataclasses import replace

import pytest

from grpo.experience import plugins
from grpo.experience.group_metrics import group_metrics
from grpo.experience.sampling import derive_seed
from grpo.experience.scoring import score
from grpo.rewards.workers.pool import WorkerPool
from grpo.types import Completion, Group, Problem, Score, UserError, Verdict


def group_of(*texts):
    """Returns a group of problem p7 with one completion of two tokens per text."""
    completions = [
        Completion(
            token_ids=(1, 2),
            logprobs=(0.0, 0.0),
            text=text,
            finish_reason="stop",
            versions=((0, 0, 2),),
        )
        for text in texts
    ]
    problem = Problem(id="p7", question="2+2?", answer="4", source="s", meta={"level": 3})
    return Group(problem=problem, prompt_ids=(5,), completions=tuple(completions))


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Returns a function that writes a module to the working directory and returns its name."""

    def write(name, text):
        monkeypatch.chdir(tmp_path)
        # The import of the module appends the working directory to this copy of sys.path.
        monkeypatch.setattr(sys, "path", [*sys.path])
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def reward_values(name, group, prompt="prompt", pool=None, **options):
    """Returns the values of one reward for the completions of a group."""
    if pool is None:
        pool = WorkerPool()
    reward = plugins.load_reward(name, options, pool)
    return reward([group], [prompt])[0]


@pytest.mark.parametrize(
    ("package", "function"),
    [("grpo.rewards", "reward"), ("grpo.data", "load"), ("grpo.losses", "loss")],
)
def test_every_plugin_file_defines_its_function_with_a_docstring(package, function):
    for name in plugins.plugin_names(package):
        plugin = plugins.find_function(package, name, function, package)
        assert plugin.__doc__
        assert plugin.__module__ == f"{package}.{name}"


def test_an_unknown_reward_is_an_error_with_the_available_and_the_nearest_names():
    with pytest.raises(
        UserError,
        match=r"rewards.acuracy: unknown reward \(did you mean accuracy\?\)\. Available: ",
    ):
        plugins.load_reward("acuracy", {}, WorkerPool())


def test_a_reward_function_receives_completion_and_problem(write_module):
    name = write_module(
        "mine_a", "def f(completion, problem): return len(completion.text) + problem.meta['level']"
    )
    assert reward_values(f"{name}:f", group_of("ab", "")) == [5, 3]


ALL_TRL_COLUMNS = """
def f(prompts, completions, answer, completion_ids, **columns):
    return [
        float(text == gold) + len(ids) + columns['level'][0]
        for text, gold, ids in zip(completions, answer, completion_ids)
    ]
"""


def test_a_trl_reward_function_is_called_with_trls_columns(write_module):
    name = write_module("mine_b", ALL_TRL_COLUMNS)
    assert reward_values(f"{name}:f", group_of("4", "5")) == [6.0, 5.0]
    name = write_module("mine_c", "def f(completions, answer): return [None for _ in completions]")
    assert reward_values(f"{name}:f", group_of("4")) == [None]


def test_rewards_of_trl_receive_the_completions_of_a_chat_as_messages():
    pytest.importorskip("trl")
    chat = [{"role": "user", "content": "2+2?"}]
    group = group_of("<think>a</think>b", "b")
    values = reward_values("trl.rewards:think_format_reward", group, prompt=chat)
    assert values == [1.0, 0.0]


def test_an_exception_in_a_reward_names_the_completion(write_module):
    name = write_module("mine_d", "def f(completion, problem): return 1 / len(completion.text)")
    with pytest.raises(
        RuntimeError, match=r"mine_d:f failed on completion 1 of problem p7: ZeroDivisionError"
    ):
        reward_values(f"{name}:f", group_of("a", ""))


def test_a_data_folder_in_the_working_directory_does_not_shadow_the_data_package(
    write_module, tmp_path
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('shadowed')")
    name = write_module("mine_e", "def f(completion, problem): return 0.0")
    plugins.load_reward(f"{name}:f", {}, WorkerPool())
    for module in list(sys.modules):
        if module == "data" or module.startswith("data."):
            sys.modules.pop(module)
    assert "arithmetic" in plugins.plugin_names("grpo.data")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Returns a directory, not the working directory, whose modules the test may import."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "library"
    folder.mkdir()
    return folder


def test_a_reward_can_be_a_function_in_a_file_of_any_directory(library):
    (library / "helper_of_code.py").write_text("def length(text): return len(text)")
    # The name of a module of Python's library.
    (library / "code.py").write_text(
        "from helper_of_code import length\n"
        "def f(completion, problem): return length(completion.text)\n"
    )
    assert reward_values(f"{library}/code.py:f", group_of("ab", "")) == [2, 0]
    import code

    assert hasattr(code, "InteractiveConsole")


def test_a_file_with_a_time_limit_is_imported_in_the_worker_pool(library):
    (library / "slow.py").write_text(REWARD_WITH_TIME_LIMIT)
    with WorkerPool(1) as pool:
        first, timed_out = reward_values(
            f"{library}/slow.py:f", group_of("a", "loop"), pool=pool, add=0.5
        )
    assert first % 1 == 0.5
    assert timed_out == Verdict(value="wrong", reason="longer than 1 s")


def test_a_package_that_a_file_of_rewards_needs_is_named(library):
    (library / "mine.py").write_text("import no_such_package\ndef f(completion, problem): return 1")
    message = r"mine\.py imports a module that is missing: No module named 'no_such_package'"
    with pytest.raises(UserError, match=message):
        plugins.load_reward(f"{library}/mine.py:f", {}, WorkerPool())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", "No module named 'nowhere'.*a file elsewhere is named path/to/file.py"),
        ("json:f", "has no function 'f'"),
        ("/nowhere/mine.py:f", r"rewards\./nowhere/mine\.py:f: no file /nowhere/mine\.py"),
    ],
)
def test_a_function_that_cannot_be_imported_is_an_error(name, message):
    with pytest.raises(UserError, match=message):
        plugins.load_reward(name, {}, WorkerPool())


def render_prompt(problem):
    return "prompt"


def constant_reward(values):
    """Returns a reward function that returns these values for its only group."""
    return lambda groups, prompts: [values]


def test_rewards_are_weighted_sums_and_undecided_completions_have_no_reward():
    verdicts = [Verdict(value="correct"), Verdict(value="wrong"), Verdict(value="undecided")]
    rewards = {
        "a": (constant_reward(verdicts), 1.0),
        "b": (constant_reward([1.0, None, 1.0]), 0.5),
    }
    (scored,) = score([group_of("x", "y", "z")], rewards, render_prompt)
    assert scored.rewards == (1.5, 0.0, None)
    assert scored.parts[1] == {"a": 0.0, "b": None}
    metrics = group_metrics([scored])
    # A mean covers the completions that have a value.
    assert metrics["reward/a"] == 0.5  # (1 + 0) / 2
    assert metrics["reward/b"] == 1.0  # (1 + 1) / 2
    assert metrics["reward/mean"] == 0.75  # (1.5 + 0) / 2
    assert metrics["reward/missing"] == pytest.approx(1 / 3)
    assert metrics["reward/undecided"] == pytest.approx(1 / 3)
    assert metrics["group/no_signal"] == 0.0
    assert metrics["completion/length"] == 2.0


@pytest.mark.parametrize("value", [float("nan"), "correct", "1.0", [1.0], {"reward": 1.0}])
def test_a_reward_that_is_not_a_number_names_the_completion(value):
    rewards = {"odd": (constant_reward([1.0, value]), 1.0)}
    message = f"odd failed on completion 1 of problem p7: it returned {value!r}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        score([group_of("a", "b")], rewards, render_prompt)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (1.0, "reward odd returned no list of lists, one for each group: 1.0"),
        ([1.0, 1.0], "reward odd returned no list of lists"),
        ([[1.0]], "reward odd returned 1 values for the 2 completions of problem p7"),
        ([], "reward odd returned 0 lists for 1 groups"),
    ],
)
def test_a_reward_of_groups_without_a_value_for_every_completion_is_an_error(values, message):
    rewards = {"odd": (lambda *_: values, 1.0)}
    with pytest.raises(RuntimeError, match=message):
        score([group_of("a", "b")], rewards, render_prompt)


def test_the_reason_of_a_low_score_is_a_metric():
    scores = [
        Score(value=0.0, reason="no answer"),
        Score(value=1.0),
        Score(value=0.0, reason="no answer"),
    ]
    rewards = {"format": (constant_reward(scores), 1.0)}
    (scored,) = score([group_of("x", "y", "z")], rewards, render_prompt)
    assert scored.parts == ({"format": 0.0}, {"format": 1.0}, {"format": 0.0})
    assert scored.faults == ({"format": "no answer"}, {}, {"format": "no answer"})
    assert group_metrics([scored])["format/no_answer"] == pytest.approx(2 / 3)


def test_options_are_passed_to_the_reward_and_invalid_ones_are_errors(write_module):
    name = write_module(
        "mine_f", "def f(completion, problem, *, scale): return scale * len(completion.text)"
    )
    assert reward_values(f"{name}:f", group_of("ab"), scale=3) == [6]
    with pytest.raises(
        UserError, match=r"rewards.mine_f:f.options: missing a required .*argument: 'scale'"
    ):
        plugins.load_reward(f"{name}:f", {}, WorkerPool())
    with pytest.raises(
        UserError, match=r"rewards.mine_f:f.options: got an unexpected keyword argument 'size'"
    ):
        plugins.load_reward(f"{name}:f", {"scale": 1, "size": 2}, WorkerPool())


def test_options_are_passed_to_a_trl_reward(write_module):
    name = write_module(
        "mine_g",
        "def f(completions, scale=1, **columns):\n"
        "    return [scale * float(len(text)) for text in completions]\n",
    )
    assert reward_values(f"{name}:f", group_of("ab", "c"), scale=2) == [4.0, 2.0]


REWARD_WITH_TIME_LIMIT = """
import os, time
TIMEOUT_S = 1.0
def f(completion, problem, *, add=0):
    while completion.text == 'loop': pass
    if completion.text == 'bad': raise ValueError('no such thing')
    return os.getpid() + add
"""


def test_a_reward_with_a_time_limit_runs_in_the_worker_pool(write_module):
    name = write_module("mine_h", REWARD_WITH_TIME_LIMIT)
    with WorkerPool(1) as pool:
        group = group_of("a", "loop", "b")
        first, timed_out, last = reward_values(f"{name}:f", group, pool=pool, add=0.5)
        assert first != os.getpid() + 0.5
        assert first % 1 == 0.5
        assert last % 1 == 0.5
        assert timed_out == Verdict(value="wrong", reason="longer than 1 s")
        assert pool.counts["timeout"] == 1
        assert pool.counts["restarts"] == 1
        message = (
            r"mine_h:f failed on completion 1 of problem p7: ValueError: no such thing; "
            r"completion text: 'bad'"
        )
        with pytest.raises(RuntimeError, match=message):
            reward_values(f"{name}:f", group_of("a", "bad"), pool=pool)


def group_with_meta(text, **meta):
    """Returns a group of one completion, of a problem with this `meta`."""
    group = group_of(text)
    return replace(group, problem=replace(group.problem, meta=meta))


def test_an_exception_in_a_reward_of_this_repository_leaves_the_completion_undecided():
    (verdict,) = reward_values("repetition", group_of("a"), n="20")
    assert verdict.value == "undecided"
    assert verdict.reason.startswith("reward failed: TypeError: unsupported operand type(s) for -")

    tests_are_no_pairs = group_with_meta("```python\nprint(1)\n```", io=[3])
    with WorkerPool(1) as pool:
        (verdict,) = reward_values("code", tests_are_no_pairs, pool=pool, isolation="rlimits")
    assert verdict.value == "undecided"
    assert verdict.reason.startswith("reward failed: TypeError: 'int' object is not subscriptable")


def test_a_completion_is_undecided_if_any_of_its_verdicts_is():
    undecided = Verdict(value="undecided", reason="worker lost: killed")
    rewards = {
        "a": (constant_reward([Verdict(value="correct"), Verdict(value="correct")]), 1.0),
        "b": (constant_reward([undecided, None]), 1.0),
    }
    (scored,) = score([group_of("x", "y")], rewards, render_prompt)
    assert scored.verdicts == (undecided, Verdict(value="correct"))
    assert scored.rewards == (None, 1.0)


def test_the_seed_of_a_group_depends_on_run_rollout_and_problem():
    assert derive_seed(0, 3, "p7") == derive_seed(0, 3, "p7")
    seeds = {
        derive_seed(0, 3, "p7"),
        derive_seed(1, 3, "p7"),
        derive_seed(0, 4, "p7"),
        derive_seed(0, 3, "p8"),
    }
    assert len(seeds) == 4


@pytest.mark.parametrize("name", ["edited_rewards:value", "edited_rewards.py:value"])
def test_a_file_that_has_changed_is_imported_again(name, tmp_path, monkeypatch):
    """In a notebook, a cell writes the file again and the next run uses it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "edited_rewards.py"
    values = []
    try:
        for number in (1, 1, 2):
            text = f"def value(completion, problem): return {number}\n"
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
                os.utime(file, (number, number))  # the cache of compiled files has whole seconds
            function = plugins.find_function("grpo.rewards", name, "reward", "rewards")
            values.append((function(None, None), function))
    finally:
        for module_name in ("edited_rewards", str(file)):
            sys.modules.pop(module_name, None)
    assert [value for value, _ in values] == [1, 1, 2]
    assert values[0][1] is values[1][1]  # an unchanged file is not imported again
