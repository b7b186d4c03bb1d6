"""Right programs that use much of Python pass their tests, whatever they return."""

from pathlib import Path

import pytest
from code_problems import judge_program, mbpp_problem, read_cases

from grpo.types import Problem

LINKED_LIST = """
class Node:
    def __init__(self, v, next=None):
        self.v = v
        self.next = next

def build(values):
    return Node(values[0], build(values[1:])) if values else None

def values(node):
    return [node.v, *values(node.next)] if node else []

"""
RIGHT_PROGRAMS = read_cases(Path(__file__).with_name("right_programs.txt"))


@pytest.mark.parametrize("name", RIGHT_PROGRAMS)
def test_a_right_program_passes(name):
    program, tests = RIGHT_PROGRAMS[name]
    verdict = judge_program(program, mbpp_problem(tests), timeout_s=10)
    assert verdict.value == "correct", verdict


@pytest.mark.parametrize(
    ("question", "program", "test"),
    [
        # a helper of the prompt, which the tests call
        (
            "def encode(s):\n    return s[::-1]\n\ndef decode(s):\n    '''The inverse.'''\n",
            "    return s[::-1]",
            "def check(candidate):\n    assert candidate(encode('ab')) == 'ab'\n",
        ),
        # the whole function again, without the imports of the prompt
        (
            "from typing import List\n\ndef f(x: List[int]) -> int:\n    '''The sum.'''\n",
            "def f(x: List[int]) -> int:\n    return sum(x)",
            "METADATA = {'author': 'x'}\n"
            "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
        ),
        # a class of the prompt, with helpers that build and read its objects
        (
            LINKED_LIST + "def f(head):\n    '''The list in reverse.'''\n",
            "    new = None\n    while head:\n"
            "        head.next, new, head = new, head, head.next\n    return new",
            "def check(candidate):\n"
            "    assert values(candidate(build([1, 2, 3]))) == [3, 2, 1]\n"
            "    assert candidate(None) is None\n",
        ),
        (
            LINKED_LIST + "def f(values):\n    '''A list of doubled values.'''\n",
            "    head = None\n"
            "    for v in reversed(values): head = Node(2 * v, head)\n    return head",
            "def check(candidate):\n"
            "    r = candidate([1, 2])\n    assert values(r) == [2, 4] and isinstance(r, Node)\n",
        ),
        (
            LINKED_LIST + "def f(head):\n    '''Whether the list has a cycle.'''\n",
            "    seen = set()\n    while head:\n        if head in seen: return True\n"
            "        seen.add(head)\n        head = head.next\n    return False",
            "def check(candidate):\n"
            "    head = build([1, 2])\n    assert candidate(head) is False\n"
            "    head.next.next = head\n    assert candidate(head) is True\n",
        ),
        (
            LINKED_LIST + "def f(v):\n    '''A circle of one.'''\n",
            "    n = Node(v)\n    n.next = n\n    return n",
            "def check(candidate):\n    n = candidate(3)\n    assert n.next.next.v == n.v == 3\n",
        ),
        (
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n"
            "    x: int\n    y: int\n\ndef f(p):\n    '''Swaps.'''\n",
            "    return P(p.y, p.x)",
            "def check(candidate):\n    assert candidate(P(1, 2)) == P(2, 1)\n",
        ),
        # prose before the function
        (
            "Write a function that doubles a number:\n\ndef f(x):\n",
            "def f(x):\n    return 2 * x",
            "def check(candidate):\n    assert candidate(2) == 4\n",
        ),
        (
            "Write a function that doubles a number:\n\ndef f(x):\n",
            "f = lambda x: 2 * x",
            "def check(candidate):\n    assert candidate(2) == 4\n",
        ),
        # tests of unittest
        (
            "def f(x):\n    '''One more.'''\n",
            "    return x + 1",
            "import unittest\nclass T(unittest.TestCase):\n"
            "    def test_f(self): self.assertEqual(f(1), 2)\n"
            "def check(candidate):\n    unittest.main(argv=['x'])\n",
        ),
    ],
)
def test_a_right_continuation_of_a_prompt_passes(question, program, test):
    entry_point = "decode" if "decode" in question else "f"
    meta = {"entry_point": entry_point, "test": test}
    problem = Problem(id="h", question=question, answer="", source="t", meta=meta)
    verdict = judge_program(program, problem)
    assert verdict.value == "correct", verdict


@pytest.mark.parametrize("entry_point", ["Solution().twice", "Solution.two"])
def test_a_method_can_be_the_function_under_test(entry_point):
    program = (
        "class Solution:\n    def twice(self, x): return 2 * x\n"
        "    @staticmethod\n    def two(x): return 2 * x"
    )
    meta = {
        "entry_point": entry_point,
        "test": "def check(candidate):\n    assert candidate(x=2) == 4",
    }
    problem = Problem(id="h", question="Double.", answer="", source="t", meta=meta)
    assert judge_program(program, problem).value == "correct"


def test_a_class_of_the_prompt_is_the_judges():
    """The program cannot make the test's own objects equal by another class."""
    meta = {
        "entry_point": "f",
        "test": "def check(candidate):\n"
        "    assert values(candidate(build([1, 2]))) == values(build([2, 1]))\n",
    }
    question = LINKED_LIST + "def f(head):\n    '''The list in reverse.'''\n"
    problem = Problem(id="h", question=question, answer="", source="t", meta=meta)
    attack = (
        "class Node:\n    v, next, __init__ = 0, None, lambda s, *a: None\n"
        "def values(n): return []\ndef f(head): return head"
    )
    assert judge_program(attack, problem).value == "wrong"
    other_attack = "class Node: pass\ndef f(head): return Node()"
    assert judge_program(other_attack, problem).value == "wrong"


def test_a_program_cannot_replace_a_method_of_a_class_of_the_prompt():
    question = (
        "class P:\n    def __init__(self, x): self.x = x\n"
        "    def equals(self, other): return self.x == other.x\n\ndef f(x):\n    '''Doc.'''\n"
    )
    test = "def check(candidate):\n    assert candidate(3).equals(P(3))\n"
    meta = {"entry_point": "f", "test": test}
    problem = Problem(id="h", question=question, answer="", source="t", meta=meta)
    attack = "    p = P(0)\n    p.equals = lambda other: True\n    return p"
    assert judge_program(attack, problem).value == "wrong"
    assert judge_program("    return P(x)", problem).value == "correct"


def test_a_reason_has_no_lone_surrogates_of_the_program():
    verdict = judge_program(
        "def f(x): raise ValueError('\\ud800')", mbpp_problem("assert f(1) == 1")
    )
    verdict.reason.encode()


@pytest.mark.parametrize(
    ("program", "test", "reason"),
    [
        ("def f(x): return x + 1", "assert f(1) == 1", "AssertionError: assert f(1) == 1"),
        ("def f(x): return x +", "assert f(1) == 1", "SyntaxError"),
        ("x = 1 / 0", "assert f(1) == 1", "ZeroDivisionError: division by zero"),
        (
            "def f(x): return x[5]",
            "assert f([1]) == 1",
            "IndexError: list index out of range: assert",
        ),
        ("def g(x): return x", "assert f(1) == 1", "the program does not define f"),
        ("def f(x):\n    while True: pass", "assert f(1) == 1", "took too long"),
        ("import os; os._exit(3)", "assert f(1) == 1", "ended with code 3"),
        ("def f(x): return f(x)", "assert f(1) == 1", "RecursionError"),
        ("def f(x): return bytearray(4 << 30)", "assert f(1) == 1", "MemoryError"),
    ],
)
def test_a_wrong_verdict_has_a_reason(program, test, reason):
    verdict = judge_program(program, mbpp_problem(test), timeout_s=2)
    assert verdict.value == "wrong"
    assert verdict.reason.startswith(reason)


def test_tests_that_do_not_use_the_program_are_undecided():
    problem = mbpp_problem("if 1 > 2:\n    assert f(1) == 1")
    verdict = judge_program("def f(x): return x", problem)
    assert verdict.value == "undecided"
    assert "the tests use nothing of the program" in verdict.reason


def test_a_prompt_that_fails_is_undecided():
    meta = {"entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 1"}
    question = "raise SystemExit\ndef f(x):\n    '''Doc.'''\n"
    problem = Problem(id="h", question=question, answer="", source="t", meta=meta)
    assert judge_program("def f(x): return x", problem).value == "undecided"
