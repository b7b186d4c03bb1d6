"""Reading the tests of a problem: what comes from the program, and what is refused."""

import pytest
from code_problems import mbpp_problem

from grpo.rewards.judge.tests import RefusedTestsError, read_function_tests
from grpo.types import Problem


def humaneval_problem(question, test, entry_point="f"):
    meta = {"entry_point": entry_point, "test": test}
    return Problem(id="h", question=question, answer="", source="t", meta=meta)


@pytest.mark.parametrize(
    ("tests", "names", "imports"),
    [
        ("assert f(1) == 2", ["f"], []),
        ("assert f(g(1)) == h", ["f", "g", "h"], []),
        ("x = 1\nfor y in [x]:\n    assert f(y) == x", ["f"], []),
        ("def t(a):\n    b = a\n    assert f(b) == [c for c in a]\nt([1])", ["f"], []),
        ("import math\nassert f(1) == math.pi", ["f"], []),
        ("assert f(1) == math.pi", ["f"], ["import math"]),
        ("assert isclose(f(1), 1.5)", ["f"], ["from math import isclose"]),
        ("assert f('a') == Counter('a')", ["f"], ["from collections import Counter"]),
        ("from solution import f, g\nassert f(1) == g(1)", ["f", "g"], []),
        ("assert add(1, mean([1])) == 2", ["add", "mean"], []),
        ("assert isclose(sqrt(2), 1.4)", ["sqrt"], ["from math import isclose"]),
        ("assert math.isclose(pow(2, 3), 8)", ["pow"], ["import math"]),
        # The function under test may be named like a function or module of Python.
        ("assert sum(1, 2) == 12", ["sum"], []),
        ("assert gcd(4, 6) == 2", ["gcd"], []),
        ("assert isclose(1, 2)", ["isclose"], []),
        ("assert calendar(2024) == 1", ["calendar"], []),
        ("assert set(f([1])) == set([1])", ["f"], []),
        ("root = Node(1)\nroot.left = Node(2)\nassert f(root) == 3", ["Node", "f"], []),
    ],
)
def test_names_that_the_tests_do_not_define_come_from_the_program(tests, names, imports):
    read = read_function_tests(mbpp_problem(tests))
    assert read.names == names
    assert read.preamble.split("\n")[:-1] == imports
    assert read.tests == tests


def test_the_prompt_supplies_the_helpers_of_its_tests():
    read = read_function_tests(
        humaneval_problem(
            "import math\n\ndef helper(x):\n    return x\n\nclass Node:\n    pass\n\n"
            "def f(x):\n    '''Doc.'''\n",
            "def check(candidate):\n    assert candidate(helper(1)) == f(Node())\n",
        )
    )
    assert (read.names, read.classes) == (["f"], ["Node"])
    assert read.check == "check"
    assert "def helper" in read.preamble
    assert read.program_preamble == read.preamble.lstrip("\n")


def test_the_program_gets_the_imports_of_the_setup_only():
    setup = "import math\nroot = Node(1)"
    read = read_function_tests(mbpp_problem("assert f(root) == 1", setup=setup))
    assert read.program_preamble == "import math"
    assert read.tests == f"{setup}\nassert f(root) == 1"


def test_a_problem_without_function_tests_has_none():
    for meta in ({}, {"test_list": []}, {"test": ""}, {"io": [{"input": "", "output": ""}]}):
        problem = Problem(id="m", question="2+2?", answer="4", source="t", meta=meta)
        assert read_function_tests(problem) is None


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert f(1) ==", "the tests are no Python"),
        ("assert f(1) == 1\x00", "the tests are no Python"),
        ("assert 1 == 1", "the tests use nothing of the program"),
        ("import inspect\nassert inspect.getsource(f)", r"import inspect \(line 1\)"),
        ("from unittest import mock\nassert f(1)", "import mock"),
        ("from unittest.mock import patch\nassert f(1)", "import patch"),
        ("import torch\nassert f(1)", "import torch, which is not in the standard library"),
        ("import os\nassert f(1)", "import os"),
        ("import threading\nassert f(1)", "import threading"),
        ("from contextlib import redirect_stdout\nassert f(1)", "import redirect_stdout"),
        ("import contextlib\nwith contextlib.redirect_stdout(None): f(1)", "use .redirect_stdout"),
        ("import sys\nsys.stdout = None\nassert f(1)", "use sys.stdout"),
        ("from sys import stdin\nassert f(1)", "use sys.stdin"),
        ("import sys\nassert f(sys.modules)", "use .modules"),
        ("assert eval('f(1)')", "use eval"),
        ("exec('f(1)')", "use exec"),
        ("assert f(open('x'))", "use open"),
        ("assert f(input())", "use input"),
        ("assert f(1) and 'f' in globals()", "use globals"),
        ("assert f.__code__.co_argcount == 1", "use .__code__"),
        ("assert f(1).__dict__ == {}", "use .__dict__"),
        ("x = [1]\nassert f(x) is not x", "compare objects with `is`"),
        ("async def t():\n    assert await f(1)", "use async"),
        ("f(3) == 9", "the tests assert nothing"),
        ("print('ok' if f(3) == 9 else 'bad')", "the tests assert nothing"),
        ("def check(candidate):\n    return f(3) == 9", "the tests assert nothing"),
        ("def check_all():\n    assert f(3) == 9", "the tests assert nothing"),
        (
            "class Cases:\n    def test_f(self):\n        assert f(3) == 9",
            "the tests assert nothing",
        ),
        (
            "import contextlib\nwith contextlib.suppress(AssertionError):\n    assert f(3) == 9",
            "their own failure",
        ),
        ("try:\n    assert f(3) == 9\nexcept* AssertionError:\n    pass", "their own failure"),
        ("x = 1\nglobal x\nassert f(x)", "the tests are no Python"),
        ("return f(3) == 9", "the tests are no Python"),
        ("import sys\nassert f(3) == 9\nsys.exit(0)", "use sys.exit"),
        ("assert (f(3) == 9, 'message')", "assert a tuple"),
        ("try:\n    assert f(3) == 9\nexcept AssertionError:\n    print(1)", "their own failure"),
        ("try:\n    assert f(3) == 9\nexcept:\n    pass", "their own failure"),
        ("assert abs(pow(2.0, 3) - 8) < 1e-6", r"only functions of Python \(abs, pow\)"),
        ("with f(1) as x:\n    assert x", "use a context of the program"),
    ],
)
def test_tests_that_cannot_be_judged_are_refused(tests, reason):
    with pytest.raises(RefusedTestsError, match=reason):
        read_function_tests(mbpp_problem(tests))


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(1) is None",
        "assert f(1) is not True",
        "assert type(f(1)) is int",
        "assert type(f(1)).__name__ == 'int'",
        "assert f(1).__class__.__name__ == 'A'",
        "import numpy as np\nassert np.allclose(f(1), [1])",
        "import unittest\nunittest.TestCase().assertEqual(f(1), 1)",
        "try:\n    assert f(1) == 1\nexcept Exception as e:\n    raise AssertionError from e",
        "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass",
        "import contextlib\nwith contextlib.suppress(ValueError):\n    assert f(1) == 1",
    ],
)
def test_tests_that_can_be_judged_are_not_refused(tests):
    assert read_function_tests(mbpp_problem(tests)).names == ["f"]


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"entry_point": "f(1)", "test": "assert f(1)"}, r"entry_point: got 'f\(1\)'"),
        ({"test": 5}, "test is no text"),
        ({"test_list": [5]}, "test_list is no list of texts"),
        ({"test_list": 5}, "test_list is no list of texts"),
        ({"test_list": "assert f(1)"}, "test_list is no list of texts"),
        ({"test_list": ["assert f(1)"], "test_setup_code": 1}, "test_setup_code is no text"),
    ],
)
def test_tests_in_another_form_are_refused(meta, reason):
    problem = Problem(id="m", question="?", answer="", source="t", meta=meta)
    with pytest.raises(RefusedTestsError, match=reason):
        read_function_tests(problem)
