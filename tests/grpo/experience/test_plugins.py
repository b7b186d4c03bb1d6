"""Names in a config: files in folders, functions from outside, two kinds of reward."""

import os
import sys

import pytest

from grpo.experience import plugins
from grpo.experience.describing import describe
from grpo.experience.sampling import seed_of
from grpo.experience.scoring import score
from grpo.types import Completion, Group, Problem, Score, UserError, Verdict
from rewards.workers.pool import Pool


def group(*texts):
    completions = tuple(
        Completion(
            token_ids=(1, 2),
            logprobs=(0.0, 0.0),
            text=t,
            finish_reason="stop",
            versions=((0, 0, 2),),
        )
        for t in texts
    )
    problem = Problem(id="p7", question="2+2?", answer="4", source="s", meta={"level": 3})
    return Group(problem=problem, prompt_ids=(5,), completions=completions)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Makes a module in a working directory of its own."""

    def make(name, text):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return make


def judge(name, *groups, prompt="prompt", pool=None, **options):
    """The values of one reward for the completions of the first group.

    Without a group it is only looked up.
    """
    function = plugins.reward(name, options, pool or Pool())
    return function(groups, [prompt])[0] if groups else None


@pytest.mark.parametrize(
    ("package", "function"), [("rewards", "reward"), ("data", "load"), ("grpo.losses", "loss")]
)
def test_every_file_in_a_folder_has_its_function_and_a_first_line_that_says_what_it_is(
    package, function
):
    for name in plugins.names(package):
        found = plugins.find(package, name, function, package)
        assert found.__doc__ and found.__module__ == f"{package}.{name}"


def test_a_wrong_name_lists_what_there_is_and_the_nearest():
    with pytest.raises(
        UserError,
        match=r"rewards.acuracy: unknown reward. Available: accuracy, .*Did you mean accuracy\?",
    ):
        judge("acuracy")


def test_a_reward_of_ours_sees_completion_and_problem(outside):
    name = outside(
        "mine_a", "def f(completion, problem): return len(completion.text) + problem.meta['level']"
    )
    assert judge(f"{name}:f", group("ab", "")) == [5, 3]


def test_a_trl_reward_is_called_unchanged(outside):
    text = "def f(prompts, completions, answer, completion_ids, **columns):\n"
    text += (
        "    return [float(c == a) + len(i) + columns['level'][0] for c, a, i in zip(completions, "
        "answer, completion_ids)]"
    )
    assert judge(f"{outside('mine_b', text)}:f", group("4", "5")) == [6.0, 5.0]
    narrow = outside("mine_c", "def f(completions, answer): return [None for _ in completions]")
    assert judge(f"{narrow}:f", group("4")) == [None]


def test_trls_own_rewards_take_a_chats_completions_as_messages():
    pytest.importorskip("trl")
    chat = [{"role": "user", "content": "2+2?"}]
    assert judge(
        "trl.rewards:think_format_reward", group("<think>a</think>b", "b"), prompt=chat
    ) == [1.0, 0.0]


def test_an_exception_stops_the_run_and_names_the_completion(outside):
    name = outside("mine_d", "def f(completion, problem): return 1 / len(completion.text)")
    with pytest.raises(
        RuntimeError, match=r"mine_d:f failed on completion 1 of problem p7: ZeroDivisionError"
    ):
        judge(f"{name}:f", group("a", ""))


def test_a_users_own_data_folder_does_not_shadow_ours(outside, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('shadowed')")
    outside("mine_e", "def f(completion, problem): return 0.0")
    judge("mine_e:f")
    for module in [name for name in sys.modules if name == "data" or name.startswith("data.")]:
        sys.modules.pop(module)
    assert "arithmetic" in plugins.names("data")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere:f", "No module named 'nowhere'"), ("json:f", "has no function 'f'")],
)
def test_what_cannot_be_imported_is_told(name, message):
    with pytest.raises(UserError, match=message):
        judge(name)


def render_prompt(problem):
    return "prompt"


def test_rewards_are_summed_by_weight_and_undecided_completions_have_none():
    verdicts = [Verdict(value="correct"), Verdict(value="wrong"), Verdict(value="undecided")]
    rewards = {
        "a": (lambda groups, prompts: [verdicts], 1.0),
        "b": (lambda groups, prompts: [[1.0, None, 1.0]], 0.5),
    }
    (scored,) = score([group("x", "y", "z")], rewards, render_prompt)
    assert scored.rewards == (1.5, 0.0, None)
    assert scored.parts[1] == {"a": 0.0, "b": None}
    metrics = describe([scored])
    # means over those that have a value: a (1 + 0) / 2, b (1 + 1) / 2, reward (1.5 + 0) / 2; one of
    # three is missing
    assert (metrics["reward/a"], metrics["reward/b"], metrics["reward/mean"]) == (0.5, 1.0, 0.75)
    assert metrics["reward/missing"] == pytest.approx(1 / 3) and metrics[
        "reward/undecided"
    ] == pytest.approx(1 / 3)
    assert metrics["group/no_signal"] == 0.0 and metrics["completion/length"] == 2.0


def test_a_reward_that_is_no_number_names_the_completion():
    values = {"odd": (lambda groups, prompts: [[1.0, float("nan")]], 1.0)}
    with pytest.raises(
        RuntimeError, match="odd failed on completion 1 of problem p7: it returned nan"
    ):
        score([group("a", "b")], values, render_prompt)


def test_what_kept_a_score_low_is_a_metric():
    scores = [
        Score(value=0.0, reason="no answer"),
        Score(value=1.0),
        Score(value=0.0, reason="no answer"),
    ]
    (scored,) = score(
        [group("x", "y", "z")], {"format": (lambda groups, prompts: [scores], 1.0)}, render_prompt
    )
    assert scored.parts == ({"format": 0.0}, {"format": 1.0}, {"format": 0.0})
    assert scored.faults == ({"format": "no answer"}, {}, {"format": "no answer"})
    assert describe([scored])["format/no_answer"] == pytest.approx(2 / 3)


def test_a_rewards_options_reach_it_and_wrong_ones_are_told(outside):
    name = outside(
        "mine_f", "def f(completion, problem, *, scale): return scale * len(completion.text)"
    )
    assert judge(f"{name}:f", group("ab"), scale=3) == [6]
    with pytest.raises(
        UserError, match=r"rewards.mine_f:f.options: missing a required .*argument: 'scale'"
    ):
        judge(f"{name}:f")
    with pytest.raises(
        UserError, match=r"rewards.mine_f:f.options: got an unexpected keyword argument 'size'"
    ):
        judge(f"{name}:f", scale=1, size=2)


def test_a_trl_reward_takes_options_too(outside):
    name = outside(
        "mine_g",
        "def f(completions, scale=1, **columns): return [scale * float(len(text)) for text in "
        "completions]",
    )
    assert judge(f"{name}:f", group("ab", "c"), scale=2) == [4.0, 2.0]


def test_a_reward_with_a_time_limit_runs_in_the_pool(outside):
    text = "import os, time\nTIMEOUT_S = 1.0\ndef f(completion, problem, *, add=0):\n"
    text += "    while completion.text == 'loop': pass\n"
    text += (
        "    if completion.text == 'bad': raise ValueError('no such thing')\n    return "
        "os.getpid() + add\n"
    )
    name = outside("mine_h", text)
    with Pool(1) as pool:
        first, looped, last = judge(f"{name}:f", group("a", "loop", "b"), pool=pool, add=0.5)
        assert first != os.getpid() + 0.5 and first % 1 == 0.5 and last % 1 == 0.5
        assert looped == Verdict(value="wrong", reason="longer than 1 s")
        assert pool.counts["timeout"] == pool.counts["restarts"] == 1
        with pytest.raises(
            RuntimeError,
            match=r"mine_h:f failed on completion 1 of problem "
            r"p7: ValueError: no such thing; completion text: 'bad'",
        ):
            judge(f"{name}:f", group("a", "bad"), pool=pool)


def test_a_groups_seed_depends_on_run_rollout_and_problem_alone():
    assert seed_of(0, 3, "p7") == seed_of(0, 3, "p7")
    assert (
        len({seed_of(*key) for key in [(0, 3, "p7"), (1, 3, "p7"), (0, 4, "p7"), (0, 3, "p8")]})
        == 4
    )
