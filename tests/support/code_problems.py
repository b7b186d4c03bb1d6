"""Problems with tests for programs, and verdicts on programs."""

import functools

from grpo.rewards import code
from grpo.rewards.judge.judging import CodeJudge
from grpo.rewards.judge.tests import read_function_tests
from grpo.types import Completion, Problem, UserError


def mbpp_problem(*tests, setup=""):
    meta = {"test_list": list(tests), "test_setup_code": setup}
    return Problem(id="mbpp/0", question="?", answer="", source="t", meta=meta)


MBPP_SQUARE = mbpp_problem("assert square(3) == 9", "assert square(-2) == 4")
HUMANEVAL_ROOT = Problem(
    id="humaneval/0",
    question='import math\n\ndef root(x: float) -> float:\n    """The square root."""\n',
    answer="",
    source="t",
    meta={
        "entry_point": "root",
        "test": (
            "def check(candidate):\n"
            "    assert candidate(9.0) == 3.0\n"
            "    assert candidate(2.25) == 1.5\n"
        ),
    },
)
IO_ADD = Problem(
    id="io/0",
    question="Add.",
    answer="",
    source="t",
    meta={"io": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]},
)


@functools.cache
def isolation():
    """Returns the strongest isolation that this machine allows."""
    try:
        code.prepare()
    except UserError:
        return "rlimits"
    return "namespaces"


@functools.cache
def _judge():
    return CodeJudge(memory_mb=1024, isolation=isolation())


def judge_program(program, problem=MBPP_SQUARE, timeout_s=5):
    """Returns the verdict on a program by the tests of a problem's functions."""
    complete_program = code._complete(program, problem)
    return _judge().judge_functions(complete_program, read_function_tests(problem), timeout_s)


def read_cases(path):
    """Returns the cases of a file by name: `{"named tuple": ("def f(): ...", "assert ...")}`.

    The tests are "" if a case has none. The head of the file describes its form.
    """
    _, *parts = path.read_text().split("\n=== ")
    cases = {}
    for part in parts:
        name, _, text = part.partition("\n")
        program, _, tests = text.partition("\n---\n")
        assert name not in cases, name
        cases[name] = (program.rstrip() + "\n", tests.rstrip())
    return cases


def completion_with(program):
    text = f"<think>Easy.</think>\nHere:\n```python\n{program}\n```\nDone."
    return Completion(token_ids=(1,), logprobs=(), text=text, finish_reason="stop", versions=())
