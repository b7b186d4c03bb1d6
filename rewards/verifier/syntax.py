r"""Parses a formula in LaTeX or plain text to a tree. Nothing is evaluated but mixed numbers.

The input is normalized (see `normalize` in latex.py). Precedence, from the weakest:

    sum       product (("+" | "-") product)*
    product   signed (("*" | "/" | "mod") signed | power)*      2x, 3(x+1), \frac{1}{2}\sqrt{2}
    signed    ("+" | "-")* power
    power     postfix ("^" exponent)?
    postfix   atom ("!" | "!!")*
    atom      number, mixed number, name, bracket, |x|, \frac, \sqrt, \binom, function, \sum, \prod,
              piecewise function (`cases`)

`1/2x` is (1/2)x. The argument of a function without brackets is a product without operators:
`\sin 2x \cos y` is sin(2x) cos(y).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DEPTH = 30  # of nested formulas
MAX_CHAIN = 20  # of `a mod b mod c`, of cross products and of factorials in a row

# A number with thousands separators, a decimal number, a command, a word, any other character.
TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|[A-Za-z]+|\S"
)
FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc"),
    *("arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc"),
    *("sinh", "cosh", "tanh", "coth", "sech", "csch"),
    *("arcsinh", "arccosh", "arctanh"),
    *("log", "ln", "lg", "exp", "abs", "floor", "ceil", "sqrt", "cbrt", "sgn"),
    *("max", "min", "gcd", "lcm", "Re", "Im", "arg", "cis"),
}
OTHER_NAMES = {
    **{"asin": "arcsin", "acos": "arccos", "atan": "arctan", "ceiling": "ceil", "sign": "sgn"},
    **{"arsinh": "arcsinh", "arcosh": "arccosh", "artanh": "arctanh"},
    **{"asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh", "cosec": "csc", "tg": "tan"},
    **{"hcf": "gcd"},
}
WITH_SEVERAL_ARGUMENTS = {"max", "min", "gcd", "lcm"}
# sin^{-1} is the inverse function; log^{-1} is not.
INVERSES = {
    name: f"arc{name}"
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
}
CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf"}
GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"),
    *("vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon"),
    *("phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi"),
    *("Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar", "aleph"),
}
# Letters that are functions if a bracket follows: f(x) is not f times x.
FUNCTION_LETTERS = {"f", "g"}
VECTOR_MARKS = {r"\vec", r"\overrightarrow", r"\boldsymbol"}
CONJUGATES = {r"\overline", r"\bar"}  # of one letter
NAME_MARKS = {r"\overline", r"\bar", r"\hat", r"\tilde", r"\widehat", r"\dot", r"\ddot"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
MULTIPLICATIONS = {"*", r"\cdot", r"\ast"}
DIVISIONS = {"/", r"\div"}
RELATION_SIGNS = {"<", ">", "=", "le", "ge", "ne"}
MODULO = {r"\bmod", r"\mod", "mod"}


class FormulaError(ValueError):
    """The text is not a formula that this parser knows."""


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Name:
    """A variable or a constant: `x`, `x_1`, `f'`, `pi`, `e`, `i`, `inf`. Vectors end with `>`."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A function or an operator with its arguments: `Call("+", (x, y, z))`.

    Operators: `+` and `*` of any number of arguments, `/ ^ neg ! !! mod cross`. Functions:
    FUNCTIONS, `root` (radicand, degree), `log` (argument, base), `binom`, and unknown functions
    such as `f(`.
    """

    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """A sum or a product over the integers from `start` to `end`."""

    function: str  # "sum" or "prod"
    variable: str
    start: Node
    end: Node
    body: Node


@dataclass(frozen=True, slots=True)
class Condition:
    """A relation between two formulas. `sign` is `<`, `>`, `=`, `le`, `ge` or `ne`."""

    left: Node
    sign: str
    right: Node


@dataclass(frozen=True, slots=True)
class Cases:
    """A piecewise function: the value of the first row whose conditions hold."""

    rows: tuple[tuple[Node, tuple[Condition, ...]], ...]

    @property
    def formulas(self) -> list[Node]:
        """All formulas of the values and of the conditions."""
        formulas = []
        for value, conditions in self.rows:
            formulas.append(value)
            for condition in conditions:
                formulas += [condition.left, condition.right]
        return formulas


Node = Number | Name | Call | Series | Cases
ONE = Number(Fraction(1))
INFINITE = Name("inf")
MINUS_INFINITE = Call("neg", (INFINITE,))


def difference_of(left: Node, right: Node) -> Node:
    """Returns the tree of `left - right`."""
    return Call("+", (left, Call("neg", (right,))))


@functools.lru_cache(maxsize=1024)
def parse_formula(text: str) -> Node:
    """Returns the tree of a formula.

    Raises:
        FormulaError: The text is not a formula, or is nested too deep.
    """
    parser = _Parser(text)
    tree = parser.parse_sum()
    if parser.peek():
        raise FormulaError(f"unexpected {parser.peek()}")
    return tree


def names_of(tree: Node) -> set[str]:
    """Returns the names in a tree that are not bound by a sum or product."""
    if isinstance(tree, Name):
        return {tree.text}
    names: set[str] = set()
    for part in parts_of(tree):
        names |= names_of(part)
    if isinstance(tree, Series):
        names = names - {tree.variable} | names_of(tree.start) | names_of(tree.end)
    return names


def calls_of(tree: Node) -> list[Call]:
    """Returns all calls in a tree."""
    calls = [tree] if isinstance(tree, Call) else []
    for part in parts_of(tree):
        calls += calls_of(part)
    return calls


def parts_of(tree: Node) -> Sequence[Node]:
    """Returns the formulas of which a tree consists."""
    if isinstance(tree, Call):
        return tree.arguments
    if isinstance(tree, Series):
        return (tree.start, tree.end, tree.body)
    if isinstance(tree, Cases):
        return tree.formulas
    return ()


def conditions_of(tree: Node) -> list[Condition]:
    """Returns the conditions of all piecewise functions in a tree."""
    conditions: list[Condition] = []
    if isinstance(tree, Cases):
        for _, conditions_of_row in tree.rows:
            conditions += conditions_of_row
    for part in parts_of(tree):
        conditions += conditions_of(part)
    return conditions


def has_series(tree: Node) -> bool:
    """Returns whether a tree contains a sum or product."""
    return isinstance(tree, Series) or any(map(has_series, parts_of(tree)))


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        # Whether white space precedes the token; False for the end.
        self._spaced: list[bool] = []
        end = 0
        for match in TOKEN.finditer(text):
            for token in _split_word(match.group()):
                self._tokens.append(token)
                self._spaced.append(match.start() > end)
            end = match.end()
        self._position = 0
        self._depth = 0
        self._open_bars = 0
        self._is_bare_exponent = False

    # Tokens

    def peek(self, ahead: int = 0) -> str:
        """Returns a token without consuming it, "" at the end."""
        index = self._position + ahead
        return self._tokens[index] if index < len(self._tokens) else ""

    def _next(self) -> str:
        token = self.peek()
        if not token:
            raise FormulaError("the formula ends too early")
        self._position += 1
        return token

    def _accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self._position += 1
        return True

    def _expect(self, token: str) -> None:
        actual = self._next()
        if actual != token:
            raise FormulaError(f"{actual} in place of {token}")

    # Operators

    def parse_sum(self) -> Node:
        self._enter()
        terms = [self._parse_product()]
        while self.peek() in ("+", "-"):
            is_negative = self._next() == "-"
            term = self._parse_product()
            terms.append(Call("neg", (term,)) if is_negative else term)
        self._depth -= 1
        return _joined("+", terms)

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise FormulaError("nested too deep")

    def _parse_product(self) -> Node:
        factors = [self._parse_signed()]
        chain_length = 0
        while True:
            token = self.peek()
            if token in MULTIPLICATIONS:
                self._next()
                factors.append(self._parse_signed())
            elif token in DIVISIONS:
                self._next()
                factors.append(Call("/", (ONE, self._parse_signed())))
            elif token == r"\times" or token in MODULO:
                self._next()
                chain_length += 1
                if chain_length > MAX_CHAIN:
                    raise FormulaError("a long chain")
                function = "cross" if token == r"\times" else "mod"
                left = _joined("*", factors)
                factors = [Call(function, (left, self._parse_signed()))]
            elif self._starts_factor():
                factors.append(self._parse_power())
            else:
                return _joined("*", factors)

    def _starts_factor(self) -> bool:
        """Returns whether the next token is a factor of an implicit product."""
        token = self.peek()
        if token == "|":
            return self._open_bars == 0
        if token[:1].isdecimal() or token[:1] == ".":
            # (2)3, \sqrt{2}3 and n2^n are products; "x2" and "2 3" are not.
            previous = self._tokens[self._position - 1] if self._position else ""
            is_power = previous.isalpha() and self.peek(1) == "^"
            return previous in (")", "}", "]") or is_power
        return _starts_atom(token)

    def _parse_signed(self) -> Node:
        is_negative = False
        while self.peek() in ("+", "-"):
            is_negative ^= self._next() == "-"
        tree = self._parse_power()
        return Call("neg", (tree,)) if is_negative else tree

    def _parse_power(self) -> Node:
        return self._with_power(self._parse_postfix())

    def _with_power(self, base: Node) -> Node:
        if not self._accept("^"):
            return base
        return Call("^", (base, self._parse_exponent()))

    def _parse_exponent(self) -> Node:
        self._enter()
        is_negative = False
        while self.peek() in ("+", "-"):
            is_negative ^= self._next() == "-"
        self._is_bare_exponent = self.peek()[:1].isdecimal()
        exponent = self._parse_postfix()
        self._is_bare_exponent = False
        exponent = self._with_power(exponent)
        self._depth -= 1
        return Call("neg", (exponent,)) if is_negative else exponent

    def _parse_postfix(self) -> Node:
        tree = self._parse_atom()
        num_signs = 0
        while self._accept("!"):
            num_signs += 1
            if num_signs > MAX_CHAIN:
                raise FormulaError("a long chain")
            function = "!!" if self._accept("!") else "!"
            tree = Call(function, (tree,))
        return tree

    # Atoms

    def _parse_atom(self) -> Node:
        self._enter()
        tree = self._parse_unnested_atom()
        self._depth -= 1
        return tree

    def _parse_unnested_atom(self) -> Node:
        token = self._next()
        if token[0].isdecimal() or (token[0] == "." and len(token) > 1):
            return self._parse_number(token)
        if token in CLOSING:
            tree = self._parse_closed()
            self._expect(CLOSING[token])
            return tree
        if token == "|":
            self._open_bars += 1
            tree = self._parse_inside_bars()
            return Call("abs", (tree,))
        if token in (r"\lfloor", r"\lceil"):
            tree = self._parse_closed()
            self._expect(r"\rfloor" if token == r"\lfloor" else r"\rceil")
            return Call("floor" if token == r"\lfloor" else "ceil", (tree,))
        if token == r"\frac":
            return Call("/", (self._parse_argument(), self._parse_argument()))
        if token == r"\binom":
            return Call("binom", (self._parse_argument(), self._parse_argument()))
        if token == r"\sqrt":
            return self._parse_root()
        if token == r"\begin":
            return self._parse_cases()
        if token in (r"\sum", r"\prod"):
            return self._parse_series(token[1:])
        return self._parse_named(token)

    def _parse_inside_bars(self) -> Node:
        bars_before = self._open_bars
        tree = self.parse_sum()
        if self._open_bars != bars_before:
            raise FormulaError("bars")
        self._expect("|")
        self._open_bars -= 1
        return tree

    def _parse_closed(self) -> Node:
        """Parses a sum inside brackets, in which bars of the outside cannot be closed."""
        open_bars, self._open_bars = self._open_bars, 0
        tree = self.parse_sum()
        self._open_bars = open_bars
        return tree

    def _parse_number(self, token: str) -> Node:
        value = Fraction(token.replace(",", ""))
        # In 5^2\frac{1}{2}, the exponent is 2.
        is_integer = token.isdecimal() and not self._is_bare_exponent
        if is_integer and self.peek() == r"\frac":
            fraction = self._integer_fraction()
            if fraction is not None:  # a mixed number
                return Number(value + fraction)
        if is_integer and self._is_mixed_number():  # 3 1/2
            numerator = self._next()
            self._expect("/")
            denominator = self._next()
            return Number(value + Fraction(int(numerator), int(denominator)))
        return Number(value)

    def _is_mixed_number(self) -> bool:
        """Returns whether a space and an integer fraction such as `1/2` follow."""
        numerator, denominator = self.peek(), self.peek(2)
        if self.peek(1) != "/" or not (numerator.isdecimal() and denominator.isdecimal()):
            return False
        return self._spaced[self._position] and int(denominator) != 0

    def _integer_fraction(self) -> Fraction | None:
        r"""Consumes `\frac{1}{2}` if both arguments are integers and returns its value."""
        tokens = [self.peek(ahead) for ahead in range(7)]
        brackets = [tokens[index] for index in (1, 3, 4, 6)]
        if brackets != ["{", "}", "{", "}"]:
            return None
        numerator, denominator = tokens[2], tokens[5]
        if not (numerator.isdecimal() and denominator.isdecimal() and int(denominator)):
            return None
        self._position += 7
        return Fraction(int(numerator), int(denominator))

    def _parse_argument(self) -> Node:
        """Parses the argument of a command: a group in braces or one token."""
        if self._accept("{"):
            tree = self._parse_closed()
            self._expect("}")
            return tree
        return self._parse_atom()

    def _parse_root(self) -> Node:
        degree: Node = Number(Fraction(2))
        if self._accept("["):
            degree = self._parse_closed()
            self._expect("]")
        return Call("root", (self._parse_argument(), degree))

    def _parse_series(self, function: str) -> Node:
        self._expect("_")
        self._expect("{")
        variable = self._next()
        self._expect("=")
        start = self._parse_closed()
        self._expect("}")
        self._expect("^")
        end = self._parse_argument()
        return Series(function, variable, start, end, self._parse_product())

    def _parse_cases(self) -> Node:
        if self._braced_text() != "cases":
            raise FormulaError("an unknown environment")
        rows = []
        while True:
            value = self._parse_closed()
            self._accept(",")
            self._expect("&")
            rows.append((value, self._parse_conditions()))
            self._accept(",")
            is_last = not self._accept("\\\\")
            if is_last or self.peek() == r"\end":
                break
        self._expect(r"\end")
        self._braced_text()
        return Cases(tuple(rows))

    def _parse_conditions(self) -> tuple[Condition, ...]:
        r"""Parses `\text{if } 0 < x \le 1`, or `\text{otherwise}`, which has no conditions."""
        words = ""
        while self._accept(r"\text"):
            words += self._braced_text()
        if words in ("otherwise", "else"):
            return ()
        conditions = []
        left = self._parse_closed()
        while self.peek().removeprefix("\\") in RELATION_SIGNS:
            sign = self._next().removeprefix("\\")
            right = self._parse_closed()
            conditions.append(Condition(left, sign, right))
            left = right
        if not conditions:
            raise FormulaError("a case without a condition")
        return tuple(conditions)

    # Names and functions

    def _parse_named(self, token: str) -> Node:
        if token == r"\operatorname":
            token = "\\" + self._braced_text()
        name = "pi" if token in ("Pi", "PI") else token.removeprefix("\\")
        name = OTHER_NAMES.get(name, name)
        if name in FUNCTIONS:
            return self._parse_function(name)
        if name in CONSTANTS:
            return Name(CONSTANTS[name])
        if token in (r"\angle", r"\triangle"):
            return Name(name + " " + self._letters())
        if token == r"\text" or token in VECTOR_MARKS or token in NAME_MARKS:
            return self._parse_marked_name(token)
        is_letter = name.isalpha() and (not token.startswith("\\") or name in GREEK)
        if not is_letter:
            raise FormulaError(f"unexpected {token}")
        tree = self._with_subscript(name)
        if name in FUNCTION_LETTERS and self._accept_inverse():
            return Call(tree.text + "^-1(", self._arguments_in_brackets())
        if self.peek() == "(" and (
            name in FUNCTION_LETTERS or (name not in ("e", "i") and self._is_value_at_number())
        ):
            return Call(tree.text + "(", self._arguments_in_brackets())
        return tree

    def _parse_marked_name(self, mark: str) -> Node:
        r"""Parses `\text{area}`, `\vec{a}`, `\bar z` and the like."""
        text = self._braced_text()
        if mark == r"\text":
            return self._with_subscript(text.strip())
        if mark in VECTOR_MARKS:
            return self._with_subscript(text + ">")
        if mark in CONJUGATES and len(text) == 1:
            return Call("conj", (self._with_subscript(text),))
        return self._with_subscript(f"{mark[1:]}{{{text}}}")

    def _accept_inverse(self) -> bool:
        """Consumes the exponent of an inverse function: `^{-1}` in front of a bracket."""
        tokens = [self.peek(ahead) for ahead in range(6)]
        is_inverse = tokens == ["^", "{", "-", "1", "}", "("]
        if is_inverse:
            self._position += 5
        return is_inverse

    def _is_value_at_number(self) -> bool:
        """Returns whether a number in brackets follows: I(0) is not I times 0."""
        return self.peek(1)[:1].isdecimal() and self.peek(2) == ")"

    def _letters(self) -> str:
        letters = ""
        while self.peek().isalpha():
            letters += self._next()
        if not letters:
            raise FormulaError("an angle without letters")
        return letters

    def _braced_text(self) -> str:
        """Consumes a group in braces, or one token, and returns its text without spaces."""
        if not self._accept("{"):
            return self._next()
        text = ""
        depth = 1
        while depth:
            token = self._next()
            depth += (token == "{") - (token == "}")
            if depth:
                text += token
        return text

    def _with_subscript(self, name: str) -> Name:
        """Returns the name with the subscript and the primes that follow it."""
        if not name:
            raise FormulaError("an empty name")
        while True:
            if self._accept("'"):
                name += "'"
            elif self._accept("_"):
                name += "_" + self._braced_text().replace("\\", "")
            else:
                return Name(name)

    def _parse_function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        if name == "log" and self.peek().isdecimal() and self.peek(1) == "(":  # log2(8)
            base = self._parse_number(self._next())
        while self.peek() in ("_", "^"):
            if self._next() == "_":
                base = self._parse_argument()
            else:
                power = self._parse_exponent()
        is_inverse = power == Call("neg", (Number(Fraction(1)),)) and name in INVERSES
        if is_inverse:
            name, power = INVERSES[name], None
        if name in WITH_SEVERAL_ARGUMENTS:
            tree: Node = Call(name, self._arguments_in_brackets())
        else:
            tree = _call_of_one(name, self._parse_function_argument(), base)
        return tree if power is None else Call("^", (tree, power))

    def _arguments_in_brackets(self) -> tuple[Node, ...]:
        bracket = self._next()
        closing = r"\}" if bracket == r"\{" else CLOSING.get(bracket)
        if closing is None:
            raise FormulaError("a function without brackets")
        arguments = [self._parse_closed()]
        while self._accept(","):
            arguments.append(self._parse_closed())
        self._expect(closing)
        return tuple(arguments)

    def _parse_function_argument(self) -> Node:
        if self.peek() in ("(", "[", "{"):
            return self._parse_atom()
        is_negative = self._accept("-")
        tree = self._parse_power()
        while self._starts_factor() and not self._starts_function():
            tree = Call("*", (tree, self._parse_power()))
        return Call("neg", (tree,)) if is_negative else tree

    def _starts_function(self) -> bool:
        name = self.peek().removeprefix("\\")
        return OTHER_NAMES.get(name, name) in FUNCTIONS


def _joined(function: str, arguments: list[Node]) -> Node:
    """Returns the sum or product of the arguments, or the only one."""
    return arguments[0] if len(arguments) == 1 else Call(function, tuple(arguments))


def _call_of_one(name: str, argument: Node, base: Node | None) -> Node:
    """Returns the call of a function of one argument, in terms of `root` and `log`."""
    if name == "sqrt":
        return Call("root", (argument, Number(Fraction(2))))
    if name == "cbrt":
        return Call("root", (argument, Number(Fraction(3))))
    if name == "exp":
        return Call("^", (Name("e"), argument))
    if name == "cis":
        return Call("^", (Name("e"), Call("*", (Name("i"), argument))))
    if name == "lg":
        return Call("log", (argument, Number(Fraction(10))))
    if name in ("log", "ln"):
        return Call("log", (argument, base or Name("e")))
    if base is not None:
        raise FormulaError(f"{name} with a subscript")
    return Call(name, (argument,))


def _split_word(token: str) -> list[str]:
    """Splits a word into letters, unless it is a function or a constant: `xy` -> `x`, `y`."""
    if not token.isalpha() or len(token) == 1:
        return [token]
    name = OTHER_NAMES.get(token, token)
    if name in FUNCTIONS or token in CONSTANTS or token in GREEK or token == "PI" or name == "mod":
        return [token]
    return list(token)


def _starts_atom(token: str) -> bool:
    if not token:
        return False
    if token in MULTIPLICATIONS or token in DIVISIONS or token in MODULO or token == r"\times":
        return False
    if token in ("(", "[", "{", r"\{", r"\lfloor", r"\lceil"):
        return True
    return token[0].isalpha() or (token[0] == "\\" and token[1:].isalpha() and not _closes(token))


def _closes(token: str) -> bool:
    name = token[1:]
    return name in RELATION_SIGNS or name in ("rfloor", "rceil", "prime", "end", "lor", "land")
