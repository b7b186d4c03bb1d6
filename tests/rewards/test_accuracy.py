"""The accuracy reward.

Only answers that equal the gold answer in value and kind are correct. Completions are never
executed and raise no exception.
"""

import json
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.rewards.accuracy import check_problem, explain, reward, verify
from grpo.rewards.verifier.equal import compare_answers
from grpo.rewards.verifier.evaluate import TooLargeError
from grpo.rewards.verifier.expressions import exact_value
from grpo.types import Completion, Problem


def read_cases(name):
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


LABELED_CASES = read_cases("verifier_cases.jsonl")
ATTACKS = read_cases("verifier_attacks.jsonl")
HOSTILE_CASES = read_cases("verifier_hostile.jsonl")

# Pairs of a prediction and a gold answer.
EQUAL_ANSWERS = [
    (r"\frac12", "0.5"),
    ("50/100", r"\frac{1}{2}"),
    (r"\dfrac43", r"\frac{4}{3}"),
    ("1,000", "1000"),
    ("25", "25\\%"),
    ("25%", "25\\%"),
    (r"\$36", "36"),
    ("36 dollars", r"\$36"),
    ("45°", "45^\\circ"),
    ("45", r"45^\circ"),
    (r"90^{\circ}", "90"),
    ("5 cm", "5"),
    (r"5\text{ cm}", "5"),
    ("864 inches^2", r"864 \mbox{ inches}^2"),
    ("5.4", r"5.4 \text{ cents}"),
    (r"3\frac12", "7/2"),
    ("3 1/2", "3.5"),
    ("3½", "3.5"),
    (r"3.2\times10^5", "320000"),
    ("3.2×10⁵", "320000"),
    ("√2", r"\sqrt{2}"),
    ("x²+1", "x^2+1"),
    ("−5", "-5"),
    ("2π", r"2\pi"),
    ("B", r"\text{(B)}"),
    ("(B)", "B"),
    (r"\text{B}", "B"),
    ("B.", "B"),
    ("Evelyn", r"\text{Evelyn}"),
    ("evelyn", r"\text{Evelyn}"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("5.", "5"),
    (r"\{3,5\}", r"\{5,3\}"),
    ("3, 7, 5", "3, 5, 7"),
    (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(3,4]", "(3,4]"),
    ("x>5", r"(5,\infty)"),
    (r"(5,\infty)", "x>5"),
    ("5<x", "x>5"),
    (r"-2\le x\le 7", r"x \in [-2,7]"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,2)"),
    ("x<2 or x>3", r"(-\infty, 2) \cup (3, \infty)"),
    ("(x+1)^2", "x^2+2x+1"),
    ("(b+2)(a+5)", "(a+5)(b+2)"),
    (r"1+\sqrt{19},1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"1\pm\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("4210_5", "4210_{5}"),
    (
        r"\begin{pmatrix}-1/3\\2/3\\5/3\end{pmatrix}",
        r"\begin{pmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{pmatrix}",
    ),
    ("2x-y+3=0", "y = 2x + 3"),
    ("4x-2y=-6", "y=2x+3"),
    ("2x+3", "y=2x+3"),
    ("10080", r"10,\!080"),
    ("10080", "10{,}080"),
    ("8.24", r"\approx 8.24 \text{ mph}"),
    (r"\frac{0.5}{2m}", r"\frac{1}{4m}"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("6-5i", "6 - 5i"),
    ("-5i+6", "6-5i"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}"),
    ("0.0000672", ".0000672"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\frac{1}{2^{99}}", r"2^{-99}"),
    ("p-q", "-q+p"),
    (r"$\frac{1}{2}$", "0.5"),
    (r"12\pi \text{ cm}^2", r"12\pi"),
    ("f(x)=5", "5"),
    ("yes", "Yes"),
    (r"\infty", r"\infty"),
    ("5!", "120"),
    ("1/3", r"\frac{2}{6}"),
    (r"y = \frac{1}{2}x", r"y=x/2"),
    (r"5\%", "5%"),
    ("ellipse", r"\text{ellipse}"),
    ("2^{10}", "1024"),
    ("1 000", "1000"),
    (r"\{1+\sqrt5,1-\sqrt5,-2\}", r"\{1\pm\sqrt{5},-2\}"),
    ("50%", "0.5"),
    ("5 million", "5000000"),
    (r"3 \sqrt{13}", r"3\sqrt{13}"),
    ("-1/2", r"-\frac12"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\left(\frac35,\frac83\right]", r"\left(\frac{3}{5},\frac{8}{3}\right]"),
    (r"x=-2 \text{ or } x=1", "-2,1"),
    ("e^{2x}", "(e^x)^2"),
    (r"\log_2 8", "3"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"5\sqrt{2}", r"\sqrt{50}"),
    (r"2k+2", "2(k+1)"),
    ("0", "0.0"),
    ("7.0", "7"),
    # notations
    ("x\u200b+1", "x+1"),
    (r"\color{red}{5}", "5"),
    (r"\textcolor{red}{5}", "5"),
    (r"\underline{5}", "5"),
    (r"\fbox{5}", "5"),
    ("`5`", "5"),
    ("The answer is 5", "5"),
    ("C) 12", "C"),
    # functions and operators
    (r"\lg 100", "2"),
    (r"\binom{5}{2}", "10"),
    (r"\sum_{k=1}^{4}k", "10"),
    (r"\sum_{k=1}^{n}k", r"\frac{n(n+1)}{2}"),
    (r"\prod_{k=1}^{4}k", "24"),
    (r"17 \mod 5", "2"),
    ("arcsinh(x)", r"\sinh^{-1}x"),
    # numbers
    (r"0.\dot{3}", "1/3"),
    (r"0.1\dot{6}", "1/6"),
    ("3.14159265", r"\pi"),
    (r"\sqrt2", "1.414213562"),
    ("five hundred", "500"),
    ("5 hundred", "500"),
    ("3 quarters", "3/4"),
    ("25", r"25\%"),
    # words and units
    ("5 apples", "5"),
    ("5", r"5 \text{ red marbles}"),
    ("5m", r"5\text{ m}"),
    # sets
    (r"\{1,1,2\}", r"\{1,2\}"),
    (r"x\ne 0", r"(-\infty,0)\cup(0,\infty)"),
    ("2x>10", r"(5,\infty)"),
    (r"\{1,2\}\cup\{2,3\}", r"\{1,2,3\}"),
    (r"\{1,2,3\}\setminus\{2\}", r"\{1,3\}"),
    (r"\{\}", r"\emptyset"),
    (r"\varnothing", r"\emptyset"),
    (r"\{2,-2\}", r"\pm 2"),
    ("2,-2", r"\pm 2"),
    ("x=5, y=2", "(5,2)"),
]
DIFFERENT_ANSWERS = [
    ("10001", "10000"),
    (r"1/2^{99}", r"1/2^{98}"),
    ("664_7", "664_8"),
    ("664", "664_7"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    ("x<5", r"(5,\infty)"),
    ("1,2", "1,2,3"),
    ("1,2,3", "1,2"),
    ("5 cm", r"5 \text{ m}"),
    ("36 euros", r"\$36"),
    ("0.333", "1/3"),
    ("x^2", "x^3"),
    ("C", r"\text{(B)}"),
    ("1", "1,-2"),
    ("5", "x=6"),
    ("x=5", "y=5"),
    ("5x", "5"),
    ("5 million", "5"),
    ("3 pi", "3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("2x+3=5", "5"),
    ("y=2x", "y=2x+3"),
    ("0=0", "y=2x+3"),
    ("31/2", r"3\frac{1}{2}"),
    ("3 1/2", "31/2"),
    (r"\pi", "3.14"),
    ("3.1415926", r"\pi"),
    ("", "5"),
    ("east", r"\text{west}"),
    (r"\{1,2\}", "(1,2)"),
    ("-5", "5"),
    ("x>=5", "x>5"),
    (r"(0,9)\cup(9,37)", r"(0,9) \cup (9,36)"),
    (r"\sqrt{2}/10^{30}", r"\sqrt{3}/10^{30}"),
    ("6+5i", "6-5i"),
    ("12", "(1,2)"),
    ("nan", "5"),
    ("5 or 6", "5"),
    ("1.4142136", r"\sqrt2"),
    ("1.41421357", r"\sqrt2"),
    # words behind a number
    (r"5 \text{ or 6}", "5"),
    (r"5 \text{ is not the answer}", "5"),
    ("5 squared", "5"),
    (r"5 \text{ plus 1}", "5"),
    ("3 quarters", "3"),
    ("5 hundred", "5"),
    ("2", "2m"),
    ("3", "3h"),
    ("2 thousandths", "2000"),
    ("5%", "5"),
    # functions that are equal on one side
    ("x+5", "|x+5|"),
    ("max(x,-2)", "x"),
    (r"\lfloor x+0.1\rfloor", r"\lfloor x\rfloor"),
    ("|x+6|/(x+6)", "1"),
    # names, and, or
    ("x>1 or x<3", "x>1 and x<3"),
    (r"\sqrt{x_1}", r"\sqrt{x_2}"),
    (r"\frac{x_1}{2}", r"\frac{x_2}{2}"),
    (r"\vec{a}\times\vec{b}", r"\vec{b}\times\vec{a}"),
    ("f'(x)", "f(x)"),
    # answers that repeat the question
    ("x^2<2", r"(-\sqrt2,\sqrt2)"),
]
HOSTILE_PREDICTIONS = [
    "9^{9^{9^{9}}}",
    "99**88**77",
    "9" * 999,
    "(" * 500,
    r"\frac{" * 300,
    "10^{10^{10}}x",
    r"\sum_{n=1}^{10^{9}} n",
    "x^{999999999}",
    "(x+y+z+w)^{400}",
    "1000000!",
    "5!!!!!!",
    "((9!)!)!",
    r"\binom{1000000}{500000}",
    "__import__('os')",
    "x" * 1000,
    r"\sqrt{" * 30 + "2" + "}" * 30,
    "(" * 30 + "x" + ")" * 30,
    "\\" * 500,
    "^" * 500,
    "{" * 15 + "x" + "}" * 15,
    "1" + " a" * 400,
    "\x00",
    "x=1," * 200,
    r"\int_0^1 x dx",
    "((((x^{9})^{9})^{9})^{9})",
    r"\sin" * 100 + "x",
    "+".join(f"x^{{{i}}}" for i in range(60)),
    r"\pm" * 50,
    "2^{2^{20}}x",
    r"\sqrt{2}^{\sqrt{2}^{\sqrt{2}}}",
    "10^{400}" * 50,
    r"\text{" * 100,
    "1e999999999",
    "a," * 400,
    r"\sqrt[99999]{2}",
    "(1+x)(1+y)(1+z)(1+a)(1+b)(1+c)(1+d)(1+f)(1+g)(1+h)(1+k)(1+l)(1+m)",
]


def completion(text: str) -> Completion:
    return Completion(
        token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
    )


@pytest.mark.parametrize(("prediction", "gold"), EQUAL_ANSWERS)
def test_an_answer_of_equal_value_and_kind_is_correct(prediction, gold):
    assert verify(prediction, gold).value == "correct"
    assert verify(f"<think>0</think><answer>{prediction}</answer>", gold).value == "correct"
    assert verify(f"<think>0</think> So \\boxed{{{prediction}}}.", gold).value == "correct"


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT_ANSWERS)
def test_an_answer_of_different_value_or_kind_is_wrong(prediction, gold):
    verdict = verify(f"<think>{gold}</think><answer>{prediction}</answer>", gold)
    assert verdict.value == "wrong"
    assert verdict.reason


@pytest.mark.parametrize("gold", sorted({gold for _, gold in EQUAL_ANSWERS + DIFFERENT_ANSWERS}))
def test_a_gold_answer_equals_itself_with_dollar_signs_and_a_full_stop(gold):
    assert compare_answers(f" ${gold}$. ", gold).value == "correct"


@pytest.mark.parametrize("gold", ["5", "x+1", "(1,2)", r"\sqrt{2}", r"\text{east}"])
@pytest.mark.parametrize("prediction", HOSTILE_PREDICTIONS, ids=range(len(HOSTILE_PREDICTIONS)))
def test_a_hostile_answer_is_wrong(prediction, gold):
    assert verify(f"<answer>{prediction}</answer>", gold).value == "wrong"


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("1,", "1, 2"),
        (",", "1,2"),
        ("(,)", "(1,2)"),
        (r"\{\}", r"\{1\}"),
        (r"\cup", r"(1,2)\cup(3,4)"),
    ],
)
def test_a_collection_with_empty_elements_is_wrong(prediction, gold):
    assert compare_answers(prediction, gold).value == "wrong"


def test_a_number_beyond_the_bounds_is_undecided_as_gold_answer_and_wrong_as_prediction():
    assert compare_answers("5", "10^{99999}").value == "undecided"
    assert compare_answers("10^{99999}", "5").value == "wrong"


@pytest.mark.parametrize(
    "prediction",
    ["2^-" * 332 + "2", r"\frac" * 190 + "1", "3\\frac1" * 120, "-(" * 29 + "1" + ")" * 29],
)
def test_a_deeply_nested_prediction_is_wrong_without_an_exception(prediction):
    assert compare_answers(prediction, "5").value == "wrong"


def test_a_long_prediction_is_wrong():
    assert compare_answers("5" + " " * 10**6, "5").reason == "longer than 1000 characters"
    assert verify("5" + " " * 2000, "5").reason == "no final answer"


@pytest.mark.parametrize(
    "text",
    [
        "2",
        "The answer is 2.",
        "<think>2</think>",
        "<think>2</think>2",
        "<think>\\boxed{2}</think>",
        "\\boxed{2} \\boxed{2",
        "<answer>2",
        "",
    ],
)
def test_a_completion_without_a_final_answer_is_wrong(text):
    problem = Problem(id="t/0", question="1+1?", answer="2", source="t")
    assert reward(completion(text), problem).value == "wrong"
    assert reward(completion(text + "<answer>2</answer>"), problem).value == "correct"


def test_an_invalid_gold_answer_is_undecided_unless_the_prediction_is_the_same_text():
    gold = r"\frac{1}{"
    assert compare_answers("5", gold).value == "undecided"
    assert compare_answers(gold, gold).value == "correct"
    assert compare_answers("5", " ").value == "undecided"


@pytest.mark.parametrize(
    "gold",
    [
        "7" * 5000,
        r"\sqrt{" * 1500 + "2" + "}" * 1500,
        r"\sqrt" * 190 + "2",
        "(" * 40 + ")" * 40,
        "\\",
    ],
)
def test_a_gold_answer_that_cannot_be_read_is_undecided_and_named(gold):
    problem = Problem(id="t/0", question="?", answer=gold, source="t")
    verdict = compare_answers("5", gold)
    assert verdict.value == "undecided"
    assert verdict.reason.startswith("gold answer: ")
    assert check_problem(problem) == verdict.reason
    assert compare_answers(gold, gold).value in ("correct", "wrong")


def test_a_readable_gold_answer_is_never_undecided():
    for case in [*LABELED_CASES, *ATTACKS]:
        problem = Problem(id="t/0", question="?", answer=case["gold"], source="t")
        if check_problem(problem) is None:
            verdict = verify(f"<answer>{case['prediction']}</answer>", case["gold"])
            assert verdict.value != "undecided", case


def test_sympy_computes_gold_answers_that_the_parser_does_not_know():
    assert compare_answers(r"\frac14", r"\int_0^1 x^3\,dx").value == "correct"
    assert compare_answers("0.3", r"\int_0^1 x^3\,dx").value == "wrong"
    assert compare_answers("1", r"\lim_{x\to 0}\frac{\sin x}{x}").value == "correct"


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        # everywhere equal but at points that depend on the formulas
        (r"\lfloor x\rfloor", r"\lceil x\rceil-1"),
        ("|x-1000|", "1000-x"),
        (r"\max(x,y)", r"\frac{x+y}{2}"),
        (r"\lfloor 3x+0.01\rfloor", r"\lfloor 3x\rfloor"),
        ("(-1)^n", "1"),
        (
            r"\begin{cases} x & x\ge 7 \\ 0 & x<7 \end{cases}",
            r"\begin{cases} x & x>7 \\ 0 & x\le 7 \end{cases}",
        ),
    ],
)
def test_formulas_that_differ_on_one_side_of_a_breakpoint_are_not_equal(prediction, gold):
    assert compare_answers(prediction, gold).value == "wrong"
    assert compare_answers(gold, prediction).value == "wrong"


def test_exact_values_equal_hand_calculations():
    for text in (r"3\frac{1}{2}", "3 1/2", "7/2", "3.5"):
        assert exact_value(text) == Fraction(7, 2)
    assert exact_value("1,234,567.5") == Fraction(2469135, 2)
    assert exact_value("-2^2") == -4
    assert exact_value("(-2)^2") == 4
    assert exact_value("2^{-2}") == Fraction(1, 4)
    assert exact_value("2+3*4-6/3") == 12
    assert exact_value("3!^2") == 36


def test_text_other_than_valid_rational_arithmetic_has_no_exact_value():
    incomplete = ("", "(1", "1)", "5-")
    malformed_numbers = ("1,00", "1 2", "1..2")
    undefined = ("1/0", "0^{-1}", "(-1)!")
    not_rational = ("x", "2^{1/2}")
    for text in (*incomplete, *malformed_numbers, *undefined, *not_rational):
        assert exact_value(text) is None, text


def test_exact_values_beyond_the_bounds_are_too_large():
    long_product = "*".join(["10^{400}"] * 20)
    for text in ("10^{99999}", long_product):
        with pytest.raises(TooLargeError):
            exact_value(text)
    for text in ("2201!", "9^{9^{9^{9}}}"):
        assert exact_value(text) is None


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
def test_fractions_with_neighboring_numerators_are_not_equal(numerator, denominator):
    gold = rf"\frac{{{numerator}}}{{{denominator}}}"
    assert compare_answers(f"{numerator}/{denominator}", gold).value == "correct"
    assert compare_answers(f"{numerator + 1}/{denominator}", gold).value == "wrong"


@given(st.text("0123456789.,/-+()[]{}\\$%= ^_abx", max_size=40))
def test_arbitrary_text_without_the_digits_of_the_gold_answer_is_wrong(prediction):
    verdict = compare_answers(prediction, "12345678.5")
    if "5678" not in prediction:
        assert verdict.value == "wrong"


@pytest.mark.parametrize("category", sorted({case["category"] for case in LABELED_CASES}))
def test_the_verdicts_agree_with_the_labels(category):
    """The authors of the labels followed the rules in docs/rewards.md and had not seen the code.

    tests/benchmarks/verifier_audit.py compares other verifiers on these cases.
    """
    for case in LABELED_CASES:
        if case["category"] == category:
            verdict = verify(case["prediction"], case["gold"])
            assert verdict.value == case["label"], (case, verdict)


@pytest.mark.parametrize("category", sorted({case["category"] for case in ATTACKS}))
def test_no_attack_is_correct_and_only_known_answers_are_missed(category):
    """Answers that look right and are not, and right answers in unusual notations.

    Most authors had not seen the code. docs/rewards.md has the results by category.
    """
    for case in ATTACKS:
        if case["category"] != category:
            continue
        verdict = verify(f"<answer>{case['prediction']}</answer>", case["gold"])
        is_expected_correct = case["label"] == "correct" and "missed" not in case
        assert (verdict.value == "correct") == is_expected_correct, (case, verdict)


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in HOSTILE_CASES}))
def test_hostile_text_is_wrong_and_not_executed(kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inputs = hostile_inputs(kind)
    verdicts = []

    def verify_all():
        for prediction, gold in inputs:
            verdicts.append(verify(prediction, gold).value)

    # Some of the predictions contain code that creates this file.
    pwned = Path("/tmp/pwned")
    existed_before = pwned.exists()
    # Time limits that use signals do not work outside the main thread.
    thread = threading.Thread(target=verify_all)
    thread.start()
    thread.join()
    assert verdicts == ["wrong"] * len(inputs)
    assert not list(tmp_path.iterdir())
    assert pwned.exists() == existed_before


def hostile_inputs(kind):
    """Returns pairs of prediction and gold answer, with and without the tags of a completion."""
    inputs = []
    for case in HOSTILE_CASES:
        if case["kind"] == kind:
            repeated_text = case["prediction"] * case.get("repeat", 1)
            text = case.get("prefix", "") + repeated_text + case.get("suffix", "")
            inputs.append((text, case["gold"]))
            inputs.append((f"<think>x</think><answer>{text}</answer>", case["gold"]))
    return inputs


@st.composite
def fractions(draw):
    numerator = draw(st.integers(-99, 99))
    denominator = draw(st.integers(1, 99))
    return rf"\frac{{{numerator}}}{{{denominator}}}"


@st.composite
def decimals(draw):
    integer_part = draw(st.integers(-999, 999))
    hundredths = draw(st.integers(0, 99))
    return f"{integer_part}.{hundredths:02}"


@st.composite
def multiples_of_roots(draw):
    factor = draw(st.integers(2, 9))
    radicand = draw(st.integers(2, 30))
    return rf"{factor}\sqrt{{{radicand}}}"


@st.composite
def fractions_of_pi(draw):
    denominator = draw(st.integers(2, 40))
    return rf"\frac{{\pi}}{{{denominator}}}"


@st.composite
def terms(draw):
    coefficient = draw(st.integers(1, 9))
    variables = draw(st.sampled_from(["x", "x^2", "y", "xy"]))
    return f"{coefficient}{variables}"


@st.composite
def intervals(draw):
    left_bracket = draw(st.sampled_from("(["))
    lower_bound = draw(st.integers(-9, 0))
    upper_bound = draw(st.integers(1, 9))
    right_bracket = draw(st.sampled_from(")]"))
    return f"{left_bracket}{lower_bound}, {upper_bound}{right_bracket}"


INTEGERS = st.integers(-(10**6), 10**6).map(str)
NUMBERS = st.one_of(INTEGERS, fractions(), decimals(), multiples_of_roots(), fractions_of_pi())
EXPRESSIONS = st.lists(terms(), min_size=1, max_size=3).map(" + ".join)
ELEMENTS = st.lists(NUMBERS, min_size=2, max_size=3).map(", ".join)
ANSWERS = st.one_of(
    NUMBERS,
    EXPRESSIONS,
    ELEMENTS.map("({})".format),
    ELEMENTS.map(r"\{{{}\}}".format),
    intervals(),
    st.tuples(st.sampled_from(["x", "y"]), NUMBERS).map(" = ".join),
)


@settings(max_examples=150)
@given(ANSWERS)
def test_an_answer_equals_itself_in_other_latex_notations(answer):
    other_notation = (
        answer.replace(r"\frac", r"\dfrac")
        .replace("(", r"\left( ")
        .replace(")", r" \right)")
        .replace(", ", " ,\\, ")
    )
    for prediction in (
        answer,
        f"  {answer}\n",
        f"${answer}$.",
        other_notation,
        f"<think>so</think> <answer> {other_notation} </answer>",
        rf"It is \boxed{{{other_notation}}}",
    ):
        assert verify(prediction, answer).value == "correct", prediction


@settings(max_examples=200)
@given(ANSWERS, ANSWERS)
def test_equality_is_symmetric(first, second):
    is_equal = compare_answers(first, second).value == "correct"
    is_equal_in_reverse = compare_answers(second, first).value == "correct"
    assert is_equal == is_equal_in_reverse


@settings(max_examples=300)
@given(
    st.text(
        alphabet=st.sampled_from(r"0123456789xyz+-*/^_=<>(){}[]|!,.;:%$&\\ abcefinpqrstu√π°²½∞±"),
        max_size=40,
    ),
    st.sampled_from(["5", r"\frac{1}{2}", "x^2+1", r"\{1,2\}", "B"]),
)
def test_random_mathematical_characters_are_correct_or_wrong(prediction, gold):
    assert verify(prediction, gold).value in ("correct", "wrong")


def test_explain_shows_the_answer_its_origin_and_its_normalized_form():
    explanation = explain(r"<think>1</think><answer>$\dfrac12$.</answer>", "0.5")
    assert explanation.splitlines() == [
        r"answer              '$\\dfrac12$.'",
        "found               'in the completion'",
        "gold                '0.5'",
        r"answer, normalized  '\\frac{1}{2}'",
        "gold, normalized    '0.5'",
        "verdict             correct",
    ]
    explanation_of_bare_answer = explain("no box", "0.5")
    assert "found               'a bare answer'" in explanation_of_bare_answer
    assert "verdict             wrong: " in explanation_of_bare_answer
