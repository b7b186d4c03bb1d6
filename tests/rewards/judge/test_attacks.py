"""Attacks on the judge: programs that do not solve the problem and try to pass its tests.

Each program must be judged wrong, not undecided: an undecided completion escapes its low reward.
"""

from pathlib import Path

import pytest
from code_problems import (
    HUMANEVAL_ROOT,
    MBPP_SQUARE,
    isolation,
    judge_program,
    mbpp_problem,
    read_cases,
)

ATTACKS = read_cases(Path(__file__).with_name("attacks.txt"))
FORGERIES = [name for name in ATTACKS if name.startswith("forgery: ")]
# Sends messages on the program's end of the socket to the judge. Attacks named "forgery" use it.
FORGE = """
import json, os, struct

def send(message, descriptor=4):
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    os.write(descriptor, struct.pack("!I", len(data)) + data)

def reply(value):
    return {"value": {"nodes": [], "root": value}}

def with_nodes(*nodes):
    return {"value": {"nodes": list(nodes), "root": [len(nodes) - 1]}}

def request(op, *nodes):
    return {"op": op, **with_nodes(*nodes)}
"""
# An attack named "reading" defines `search`, which returns text that contains the tests.
USE_TESTS = """
import re

def square(x):
    text = search() or ""
    match = re.search(rf"square\\({x}\\) == (-?\\d+)", text)
    return int(match[1]) if match else None
"""


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in FORGERIES])
def test_an_attack_is_judged_wrong(name):
    program, tests = ATTACKS[name]
    if name.startswith("reading: "):
        program += USE_TESTS
    if name.startswith("forgery with tests: "):
        program = FORGE + program
    problem = mbpp_problem(tests) if tests else MBPP_SQUARE
    verdict = judge_program(program, problem, timeout_s=2)
    assert verdict.value == "wrong"
    assert "SyntaxError" not in verdict.reason  # the attack has taken place


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("place", ["before the tests", "in a call"])
def test_a_program_that_sends_its_own_messages_is_judged_wrong(name, place):
    statements, _ = ATTACKS[name]
    if place == "in a call":
        body = "\n".join("    " + line for line in statements.splitlines())
        program = f"{FORGE}\ndef square(x):\n{body}\n    return 0"
    else:
        program = f"{FORGE}\ndef square(x): return 0\n{statements}"
    assert judge_program(program, timeout_s=2).value == "wrong"


@pytest.mark.parametrize(
    "program",
    [
        "def check(candidate): pass\ndef root(x): return 0",
        "import math\nmath.isclose = lambda *a: True\ndef root(x): return 0",
        "    return type('A', (float,), {'__eq__': lambda s, o: True})()",
        "    pass\nroot = lambda x: type('A', (), {'__eq__': lambda s, o: True})()",
        "    pass\nclass root(float):\n    __eq__ = lambda s, o: True",
        "    pass\nroot = None",
        "    pass\ndel root",
    ],
)
def test_humaneval_tests_are_not_deceived(program):
    assert judge_program(program, HUMANEVAL_ROOT).value == "wrong"


@pytest.mark.skipif(isolation() != "namespaces", reason="without namespaces there is no folder")
def test_a_program_that_passes_and_then_attacks_changes_no_later_verdict():
    """The sandbox is warm: the next program finds nothing of this one."""
    attack = (
        "import builtins, os, random, sys\n"
        "open('/sandbox/sitecustomize.py', 'w').write('1/0')\n"
        "os.chmod('/sandbox', 0)\n"
        "sys.path.insert(0, '/sandbox')\n"
        "builtins.sorted = random.random = sys.exit = None\n"
        "def square(x): return x * x"
    )
    assert judge_program(attack).value == "correct"
    right = (
        "import os, random\n"
        "assert os.listdir('.') == [] and sorted([random.random()])\n"
        "def square(x): return x * x"
    )
    assert judge_program(right).value == "correct"
    assert judge_program("def square(x): return 1", MBPP_SQUARE).value == "wrong"
