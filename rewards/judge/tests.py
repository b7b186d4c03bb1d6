"""Reads the function tests of a problem, and refuses those that cannot be judged from outside.

The tests run in the judge's process, the program in another one. Tests that look into the program,
or that share files, standard output or threads with it, would give wrong verdicts. They are refused
when the problems are loaded.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grpo.types import Problem


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Modules that look into a program, or need a state that two processes do not share.
REFUSED_MODULES = _words(
    "asyncio builtins code codeop concurrent ctypes dis faulthandler gc importlib inspect "
    "marshal multiprocessing os pathlib pickle runpy shutil signal socket subprocess tempfile "
    "threading trace traceback tracemalloc unittest.mock weakref"
)
REFUSED_NAMES = _words(
    "__import__ breakpoint capfd capsys compile eval exec exit globals input locals monkeypatch "
    "open patch quit redirect_stderr redirect_stdout vars"
)
REFUSED_ATTRIBUTES = _words("modules patch redirect_stderr redirect_stdout settrace")
# An exception handler for one of these catches a failed assertion.
CAUGHT_FAILURES = {"AssertionError", "Exception", "BaseException"}
STANDARD_STREAMS = ("stdin", "stdout", "stderr")
ALLOWED_SPECIAL_ATTRIBUTES = frozenset(("__name__", "__class__"))
THIRD_PARTY_MODULES = frozenset(("numpy",))
# The function under test is importable from this module.
SOLUTION_MODULE = "solution"
# Tests without imports may use these names, which the judge then imports itself: a program must not
# supply the `isclose` that its result is compared with.
COMMON_NAMES = {
    "math": "isclose inf nan pi",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "datetime": "date datetime timedelta",
    "typing": "Any Callable Dict List Optional Set Tuple Union",
}
MODULE_OF_NAME: dict[str, str] = {}
for _module, _names in COMMON_NAMES.items():
    MODULE_OF_NAME |= dict.fromkeys(_names.split(), _module)


class RefusedTestsError(ValueError):
    """The tests of a problem cannot be judged. The message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTests:
    """The tests of a problem's functions.

    Example: `FunctionTests(preamble="import math", program_preamble="", tests="assert f(1) == 2",
    check="", entry_point="", names=["f"], classes=[])`.

    Attributes:
        preamble: Source of the judge: what the tests use and the program does not supply.
        program_preamble: Source that the program's process runs before the program.
        tests: Source of the tests.
        check: The function of the tests that takes the function under test; "" without one.
        entry_point: The function under test, such as `f` or `Solution().f`; "" if unknown.
        names: What the tests use of the program.
        classes: The classes of the prompt. Judge and program both have them.
    """

    preamble: str
    program_preamble: str
    tests: str
    check: str
    entry_point: str
    names: list[str]
    classes: list[str]


def read_function_tests(problem: Problem) -> FunctionTests | None:
    """Returns the function tests of a problem, None if it has none.

    Raises:
        RefusedTestsError: They cannot be judged.
    """
    meta = problem.meta
    tests = _text(meta, "test") or "\n".join(_test_list(meta))
    if not tests:
        return None
    entry_point = _text(meta, "entry_point").strip()
    return _read_texts(tests, _text(meta, "test_setup_code"), entry_point, problem.question)


@functools.lru_cache(maxsize=32)  # a problem is read for each of its completions
def _read_texts(tests: str, setup: str, entry_point: str, question: str) -> FunctionTests:
    """Returns the tests of a problem from the texts of its fields.

    Raises:
        RefusedTestsError: They cannot be judged.
    """
    source = f"{setup}\n{tests}" if setup else tests
    source = source.replace("\r\n", "\n")
    tree = _parse(source)
    refusal = next(_refusals(tree), None)
    if refusal is not None:
        raise RefusedTestsError(refusal)
    _refuse_silent_tests(tree, has_check=bool(entry_point))
    prompt = _prompt_before(entry_point, question)
    names, imports = _names_and_imports(source, tree, prompt, _name_of(entry_point))
    _refuse_contexts(tree, {*names, "candidate"})
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = [node.name for node in ast.parse(prompt).body if isinstance(node, ast.ClassDef)]
    return FunctionTests(
        preamble="\n".join([*imports, prompt]),
        program_preamble=prompt or _imports_of(setup),
        tests=source,
        check="check" if entry_point and "check" in functions else "",
        entry_point=entry_point,
        names=names,
        classes=classes,
    )


def _prompt_before(entry_point: str, question: str) -> str:
    """Returns the imports and helpers before the function in a prompt of HumanEval, "" if none."""
    before, definition, _ = question.partition(f"def {entry_point}(")
    if not entry_point or not definition:
        return ""
    return before if is_python(before) else ""  # the question may be prose


@functools.lru_cache(maxsize=32)
def is_python(source: str) -> bool:
    """Returns whether a text is Python."""
    try:
        _parse(source)
    except RefusedTestsError:
        return False
    return True


def _name_of(entry_point: str) -> str:
    """Returns the name that the program defines: `Solution` for `Solution().f`.

    Raises:
        RefusedTestsError: The entry point is no such expression.
    """
    if not entry_point:
        return ""
    match = re.fullmatch(r"([A-Za-z_]\w*)(?:\(\))?(?:\.[A-Za-z]\w*)*", entry_point)
    if match is None:
        raise RefusedTestsError(f"entry_point: got {entry_point!r}, expected a function's name")
    return match[1]


def _text(meta: dict[str, Any], field: str) -> str:
    value = meta.get(field) or ""
    if not isinstance(value, str):
        raise RefusedTestsError(f"{field} is no text")
    return value


def _test_list(meta: dict[str, Any]) -> list[str]:
    tests = meta.get("test_list") or []
    is_list = isinstance(tests, list | tuple)
    if not is_list or not all(isinstance(test, str) for test in tests):
        raise RefusedTestsError("test_list is no list of texts")
    return list(tests)


def _parse(source: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tests, such as an invalid escape
            compile(source, "tests", "exec", dont_inherit=True)
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise RefusedTestsError(f"the tests are no Python: {error}") from None


# --- names


def _names_and_imports(
    source: str, tree: ast.Module, prompt: str, entry_name: str
) -> tuple[list[str], list[str]]:
    """Returns the names that the program supplies, and the imports of those that it does not.

    The tests neither define nor import these names. The program does not supply modules of the
    standard library and COMMON_NAMES, unless one of them is all that the tests use.

    Raises:
        RefusedTestsError: It is unclear what the tests use of the program, or they use nothing.
    """
    free_names = _free_names(source, tree, prompt)
    called = _called_names(tree)
    imports = {}
    for name in free_names:
        if name in sys.stdlib_module_names and name not in called:
            imports[name] = f"import {name}"
        elif name in MODULE_OF_NAME:
            imports[name] = f"from {MODULE_OF_NAME[name]} import {name}"
    imports.pop(entry_name, None)
    names = _names_of_solution(tree) + [name for name in free_names if name not in imports]
    if entry_name:
        names = [entry_name, *names]
    if not names and len(free_names) == 1 and free_names[0] in MODULE_OF_NAME:
        names, imports = free_names, {}
    if not names:
        names = _shadowing_names(called)
    return list(dict.fromkeys(names)), list(imports.values())


def _free_names(source: str, tree: ast.Module, prompt: str) -> list[str]:
    """Returns the names that the tests use and neither define nor import, in order of use."""
    table = symtable.symtable(source, "tests", "exec")
    defined = _defined_names(table) | _defined_names(symtable.symtable(prompt, "prompt", "exec"))
    used: set[str] = set()
    for scope in _scopes(table):
        used.update(_global_names(scope))
    free = {name for name in used if name not in defined and not hasattr(builtins, name)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in nodes if node.id in free))


def _defined_names(table: symtable.SymbolTable) -> set[str]:
    symbols = table.get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from _scopes(inner)


def _global_names(table: symtable.SymbolTable) -> list[str]:
    is_module = table.get_type() == "module"
    return [
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (is_module or symbol.is_global())
    ]


def _called_names(tree: ast.Module) -> list[str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return list(dict.fromkeys(node.id for node in calls if isinstance(node, ast.Name)))


def _names_of_solution(tree: ast.Module) -> list[str]:
    """Returns the names in `from solution import ...`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == SOLUTION_MODULE:
            names += [alias.name for alias in node.names]
    return names


def _shadowing_names(called: list[str]) -> list[str]:
    """Returns the function of a program that has the name of a builtin one.

    For `assert sum(10, 15) == 6` it is `["sum"]`.

    Raises:
        RefusedTestsError: The tests call no function of Python, or several.
    """
    builtin_names = [name for name in called if hasattr(builtins, name)]
    if not builtin_names:
        raise RefusedTestsError("the tests use nothing of the program")
    if len(builtin_names) > 1:
        raise RefusedTestsError(
            f"the tests call only functions of Python ({', '.join(builtin_names)}). Set "
            "entry_point to the name of the function under test"
        )
    return builtin_names


def _imports_of(source: str) -> str:
    imports = [
        node for node in _parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    return "\n".join(ast.unparse(node) for node in imports)


# --- refusals


def _refusals(tree: ast.Module) -> Iterator[str]:
    """Yields the reasons why tests cannot be judged from outside."""
    for node in ast.walk(tree):
        for kind, find in _REFUSALS:
            if isinstance(node, kind):
                reason = find(node)
                if reason:
                    yield f"the tests {reason} (line {getattr(node, 'lineno', 0)})"


def _refused_import(node: ast.Import) -> str:
    for alias in node.names:
        reason = _refused_module(alias.name)
        if reason:
            return reason
    return ""


def _refused_import_from(node: ast.ImportFrom) -> str:
    module = node.module or ""
    for alias in node.names:
        if alias.name in REFUSED_NAMES | REFUSED_ATTRIBUTES | {"mock"}:
            return f"import {alias.name}"
        if module == "sys" and alias.name in STANDARD_STREAMS:
            return f"use sys.{alias.name}, which the program does not share"
    return "" if module == SOLUTION_MODULE else _refused_module(module)


def _refused_module(module: str) -> str:
    package = module.partition(".")[0]
    if module in REFUSED_MODULES or package in REFUSED_MODULES:
        return f"import {module}"
    if package not in sys.stdlib_module_names and package not in THIRD_PARTY_MODULES:
        return f"import {module}, which is not in the standard library"
    return ""


def _refused_name(node: ast.Name) -> str:
    return f"use {node.id}" if node.id in REFUSED_NAMES else ""


def _refused_attribute(node: ast.Attribute) -> str:
    is_of_sys = isinstance(node.value, ast.Name) and node.value.id == "sys"
    if is_of_sys and node.attr in STANDARD_STREAMS:
        return f"use sys.{node.attr}, which the program does not share"
    if is_of_sys and node.attr == "exit":
        return "use sys.exit"
    if node.attr in REFUSED_ATTRIBUTES:
        return f"use .{node.attr}"
    is_special = re.fullmatch("__.*__", node.attr) is not None
    if is_special and node.attr not in ALLOWED_SPECIAL_ATTRIBUTES:
        return f"use .{node.attr}"
    return ""


def _refused_comparison(node: ast.Compare) -> str:
    """Refuses `is` between values that are copies in the judge."""
    operands = [node.left, *node.comparators]
    has_identity = any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)
    if has_identity and not any(_is_unique(operand) for operand in operands):
        return "compare objects with `is`"
    return ""


def _is_unique(node: ast.expr) -> bool:
    """Returns whether an expression is None, True, False, ... or a builtin type."""
    if isinstance(node, ast.Constant):
        return node.value is None or node.value is ... or isinstance(node.value, bool)
    return isinstance(node, ast.Name) and isinstance(getattr(builtins, node.id, None), type)


def _refused_async(_: ast.AST) -> str:
    return "use async"


_REFUSALS: tuple[tuple[Any, Callable[[Any], str]], ...] = (
    (ast.Import, _refused_import),
    (ast.ImportFrom, _refused_import_from),
    (ast.Name, _refused_name),
    (ast.Attribute, _refused_attribute),
    (ast.Compare, _refused_comparison),
    ((ast.AsyncFunctionDef, ast.AsyncWith, ast.AsyncFor, ast.Await), _refused_async),
)


def _refuse_contexts(tree: ast.Module, names: set[str]) -> None:
    """Raises RefusedTestsError for `with f():`, where f is of the program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(_base_name(item) in names for item in node.items):
            raise RefusedTestsError(f"the tests use a context of the program (line {node.lineno})")


def _base_name(item: ast.withitem) -> str:
    """Returns the name that a context begins with: `f` for `with f(1).g():`."""
    node = item.context_expr
    while isinstance(node, (ast.Call, ast.Attribute)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _refuse_silent_tests(tree: ast.Module, *, has_check: bool) -> None:
    """Refuses tests that do not fail for any result.

    Raises:
        RefusedTestsError: They run no assertion, assert a tuple, or catch their own failure.
    """
    run_names = {*_called_names(tree), "check"} if has_check else set(_called_names(tree))
    statements = [node for node in tree.body if _is_run(node, run_names)]
    if not any(map(_has_assertion, statements)):
        raise RefusedTestsError("the tests assert nothing")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple) and node.test.elts:
            raise RefusedTestsError(f"the tests assert a tuple (line {node.lineno})")
        if isinstance(node, (ast.Try, ast.TryStar, ast.With)) and _catches_own_failure(node):
            raise RefusedTestsError(f"the tests catch their own failure (line {node.lineno})")


def _is_run(statement: ast.stmt, run_names: set[str]) -> bool:
    """Returns whether the code in a statement of the tests runs, as far as can be seen.

    Functions and classes run if they are called, or found as in pytest or unittest.
    """
    if isinstance(statement, ast.FunctionDef):
        return statement.name in run_names or statement.name.startswith("test")
    if isinstance(statement, ast.ClassDef):
        is_test = statement.name.startswith("Test") or bool(statement.bases)
        return is_test or statement.name in run_names
    return True


def _has_assertion(statement: ast.stmt) -> bool:
    """Returns whether a statement contains an assertion, at any depth."""
    return any(map(_can_fail, ast.walk(statement)))


def _can_fail(node: ast.AST) -> bool:
    """Returns whether a node of the tests is an assertion, such as `self.assertEqual`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr.startswith(("assert", "fail"))
    return isinstance(node, (ast.Assert, ast.Raise))


def _catches_own_failure(node: ast.Try | ast.TryStar | ast.With) -> bool:
    if not any(map(_has_assertion, node.body)):
        return False
    if isinstance(node, ast.With):  # contextlib.suppress
        contexts = [item.context_expr for item in node.items]
        return any(_is_suppression(context) for context in contexts)
    return any(map(_swallows_failure, node.handlers))


def _is_suppression(context: ast.expr) -> bool:
    names = {inner.attr for inner in ast.walk(context) if isinstance(inner, ast.Attribute)}
    is_suppress = "suppress" in names | _names_in(context)
    return is_suppress and bool(_names_in(context) & CAUGHT_FAILURES)


def _swallows_failure(handler: ast.ExceptHandler) -> bool:
    kinds = {"BaseException"} if handler.type is None else _names_in(handler.type)
    if not kinds & CAUGHT_FAILURES:
        return False
    return not any(map(_has_assertion, handler.body))


def _names_in(node: ast.expr) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
