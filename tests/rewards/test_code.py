"""The code reward: which text is the program, its verdict, and the checks before a run."""

import pytest
from code_problems import HUMANEVAL_ROOT, IO_ADD, MBPP_SQUARE, completion_with, isolation

from grpo.rewards import code
from grpo.rewards.judge import judging
from grpo.rewards.workers.sandbox import SandboxLostError, SandboxUnavailableError
from grpo.types import Completion, Problem, UserError


def completion(text):
    return Completion(token_ids=(1,), logprobs=(), text=text, finish_reason="stop", versions=())


def verdict_on(program, problem=MBPP_SQUARE, timeout_s=5):
    completion = completion_with(program)
    return code.reward(completion, problem, timeout_s=timeout_s, isolation=isolation())


def io_problem(*pairs):
    meta = {"io": [{"input": input_text, "output": output} for input_text, output in pairs]}
    return Problem(id="io", question="?", answer="", source="t", meta=meta)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("def square(x):\n    return x * x", MBPP_SQUARE),
        ("    return math.sqrt(x)", HUMANEVAL_ROOT),
        ("def root(x):\n    return math.sqrt(x)", HUMANEVAL_ROOT),
        ("from math import sqrt as s\ndef root(x): return s(x)", HUMANEVAL_ROOT),
        ("a, b = map(int, input().split())\nprint(a + b)", IO_ADD),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())), end='')", IO_ADD),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()", IO_ADD),
        (
            "import os\nprint(sum(map(int, open(0).read().split())), flush=True)\nos._exit(0)",
            IO_ADD,
        ),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int\n    b: int\n"
            "p = P(*map(int, input().split()))\nprint(p.a + p.b)",
            IO_ADD,
        ),
    ],
)
def test_right_programs_are_correct(program, problem):
    assert verdict_on(program, problem).value == "correct"


@pytest.mark.parametrize(
    ("program", "problem", "reason"),
    [
        ("def square(x): return x + x", MBPP_SQUARE, "AssertionError: assert square(3) == 9"),
        ("print(3)", IO_ADD, "input 1: failed"),
        ("print(3); print(3)", IO_ADD, "input 0: failed"),
        ("print(sum(map(int, input().split()))); exit(1)", IO_ADD, "input 0: ended with code 1"),
        ("import time; time.sleep(60)", IO_ADD, "input 0: took too long"),
        ("while True: print('x' * 10_000)", IO_ADD, "input 0: printed too much"),
        ("x = 1\n" * 20_000, IO_ADD, "longer than 50000 characters"),
    ],
)
def test_wrong_programs_are_wrong_with_a_reason(program, problem, reason):
    verdict = verdict_on(program, problem, timeout_s=1)
    assert (verdict.value, verdict.reason) == ("wrong", reason)


def test_spaces_at_the_ends_of_lines_do_not_matter_in_an_output():
    problem = io_problem(("", "a\nb\n\n"))
    assert verdict_on("print('a  \\nb\\n')", problem).value == "correct"
    assert verdict_on("print('a\\n\\nb')", problem).value == "wrong"
    assert verdict_on("print(' a\\nb')", problem).value == "wrong"


def test_all_inputs_together_have_a_time_limit(monkeypatch):
    monkeypatch.setattr(code, "TIMEOUT_S", code.OVERHEAD_S + 1.2)
    program = "import time; input(); time.sleep(0.15); print(1)"
    verdict = verdict_on(program, io_problem(*[("x", "1")] * 9), timeout_s=1)
    assert verdict.value == "wrong"
    assert verdict.reason.startswith("took too long for")


def test_a_starved_program_and_a_lost_sandbox_are_undecided(monkeypatch):
    assert judging.time_limit_verdict(is_starved=True).value == "undecided"

    def lose(*_):
        raise SandboxLostError("the sandbox has ended")

    monkeypatch.setattr(judging.CodeJudge, "run", lose)
    verdict = verdict_on("print(1)", IO_ADD)
    assert (verdict.value, verdict.reason) == ("undecided", "not judged: the sandbox has ended")


def test_a_sandbox_that_was_killed_is_replaced():
    assert verdict_on("def square(x): return x * x").value == "correct"
    judge = code._judge(1024, isolation())
    judge._program_sandbox._process.kill()
    assert verdict_on("def square(x): return x * x").value == "correct"
    judge._judge_sandbox._process.kill()
    assert verdict_on("def square(x): return x + x").value == "wrong"


def test_the_program_is_the_last_block_of_the_visible_answer():
    thoughts = "<think>```python\nbad\n```</think>"
    two_blocks = "```\nfirst\n```\nthen\n```py\nlast\n```"
    assert code.extract_program(thoughts + two_blocks) == "last\n"

    answer_without_block = "<think>x</think><answer>print(1)</answer>"
    assert code.extract_program(answer_without_block) == "print(1)"

    answer_with_block = "<think>x</think><answer>See\n```python\nprint(2)\n```\n</answer>"
    assert code.extract_program(answer_with_block) == "print(2)\n"

    assert code.extract_program("no program") is None
    assert code.extract_program("```python\nnever closed") is None

    # A search with a regular expression would take hours.
    assert code.extract_program("```" + " " * 10**6 + "\n```" * 10**5) == "\n"

    assert code.reward(completion("nothing"), MBPP_SQUARE).reason == "no program"
    problem_without_tests = Problem(id="m", question="2+2?", answer="4", source="t")
    assert code.reward(completion_with("print(1)"), problem_without_tests) is None


def test_a_program_with_odd_characters_is_judged():
    for program in ("x = '\x00'", "x = '\ud800'", "\ufeffdef square(x): return 1", "# \u2028é"):
        assert verdict_on(program).value == "wrong"
    assert verdict_on("s = 'ü漢😀'\ndef square(x): return x * x").value == "correct"


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"io": [{"input": "1"}]}, "io: element 0 has no text 'output'"),
        ({"io": [{"input": ["1"], "output": "1"}]}, "io: element 0 has no text 'input'"),
        ({"io": ["1"]}, "io: element 0 has no text 'input'"),
        ({"io": [{"input": "", "output": "x" * (2 << 20)}]}, "element 0 is longer than 1 MiB"),
        ({"io": 5}, "io: expected a list"),
        ({"test_list": ["assert eval('1')"]}, "use eval"),
    ],
)
def test_problems_that_cannot_be_judged_are_refused_when_they_are_loaded(meta, reason):
    problem = Problem(id="c/7", question="?", answer="", source="t", meta=meta)
    with pytest.raises(ValueError, match=reason):
        code.read_problem(problem)


def test_problems_that_can_be_judged_are_loaded_unchanged():
    for problem in (MBPP_SQUARE, HUMANEVAL_ROOT, IO_ADD):
        assert code.read_problem(problem) is problem


def test_prepare_fails_without_namespaces_unless_rlimits_are_chosen(monkeypatch):
    class SandboxWithoutNamespaces(judging.Sandbox):
        def __init__(self, *, isolation, **options):
            if isolation == "namespaces":
                raise SandboxUnavailableError("[Errno 1] unshare: Operation not permitted")
            super().__init__(isolation=isolation, **options)

    monkeypatch.setattr(judging, "Sandbox", SandboxWithoutNamespaces)
    message = r"not allow the sandbox .*Operation not permitted.*options: \{isolation: rlimits\}"
    with pytest.raises(UserError, match=message):
        code.prepare()
    code.prepare(isolation="rlimits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isolation": "docker"}, "expected namespaces or rlimits"),
        ({"timeout_s": 0}, "more than 0 and at most 60 seconds"),
        ({"timeout_s": 61}, "more than 0 and at most 60 seconds"),
        ({"memory_mb": 8}, "memory_mb: got 8, expected a whole number from 64 to"),
        ({"memory_mb": 1024.0}, "memory_mb: got 1024.0, expected a whole number"),
        ({"timeout_s": "10"}, "timeout_s: got '10', expected more than 0"),
        ({"memory_mb": -1}, "memory_mb: got -1, expected a whole number"),
    ],
)
def test_wrong_options_are_errors_before_a_run(options, message):
    with pytest.raises(UserError, match=message):
        code.prepare(**{"isolation": isolation(), **options})
