"""The format reward and the extraction of the final answer from tags and boxes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.types import Completion, Problem, Score
from rewards.format import check, reward
from rewards.verifier.parse import TAGS, final_answer, last_boxed

GOOD = "<think>1+1</think><answer>2</answer>"
PROBLEM = Problem(id="t/0", question="1+1?", answer="2", source="t")


def completion(text: str) -> Completion:
    return Completion(
        token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
    )


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n {GOOD} \n",
        "<think>\na\n\nb\n</think>\n\n<answer>\n2\n</answer>\n",
        "<think>a < b > c</think><answer><b></answer>",
    ],
)
def test_well_formed_completions_pass(text):
    assert check(text)
    assert reward(completion(text), PROBLEM) == Score(value=1.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no think"),
        ("2", "no think"),
        ("<think>1+1<answer>2</answer>", "no think end"),
        ("<think>1+1</think>2", "no answer"),
        ("<think>1+1</think><answer>2", "no answer end"),
        (GOOD + "<answer>3</answer>", "several answer"),
        (GOOD + GOOD, "several think"),
        ("<think><think>1+1</think><answer>2</answer>", "several think"),
        (GOOD + "</answer>", "several answer end"),
        ("<THINK>1+1</THINK><ANSWER>2</ANSWER>", "no think"),
        ("<think>1+1</think><Answer>2</Answer>", "no answer"),
        ("< think>1+1</think><answer>2</answer>", "no think"),
        ("<think>1+1</think><answer>2</ answer>", "no answer end"),
        ("<answer>2</answer><think>1+1</think>", "tags out of order"),
        ("</think>1+1<think><answer>2</answer>", "tags out of order"),
        ("<think>1+1<answer>2</answer></think>", "tags out of order"),
        ("<think>1+1<answer></think>2</answer>", "tags out of order"),
        ("Sure! " + GOOD, "text before think"),
        (GOOD + " Done.", "text after answer"),
        (GOOD + "\nDone.", "text after answer"),
        ("Sure!\n" + GOOD, "text before think"),
        ("<think>1+1</think> so <answer>2</answer>", "text between"),
        ("<think></think><answer>2</answer>", "empty thoughts"),
        ("<think> \n\t</think><answer>2</answer>", "empty thoughts"),
        ("<think>1+1</think><answer>\n</answer>", "empty answer"),
    ],
)
def test_malformed_completions_fail_with_a_reason(text, reason):
    verdict = check(text)
    assert not verdict
    assert verdict.reason == reason
    assert reward(completion(text), PROBLEM) == Score(value=0.0, reason=reason)


def test_a_prefilled_think_tag_is_added_before_the_check():
    assert check("1+1</think><answer>2</answer>", prefilled=True)
    assert not check("1+1</think><answer>2</answer>")
    assert check(GOOD, prefilled=True).reason == "several think"


@given(
    st.lists(st.sampled_from([*TAGS, "x", " ", "\n", "\\boxed{", "}", "<", "/think>"]), max_size=14)
)
def test_only_the_exact_format_passes(pieces):
    text = "".join(pieces)
    if check(text):
        stripped_text = text.strip()
        content = stripped_text.removeprefix("<think>").removesuffix("</answer>")
        thoughts, after_thoughts = content.split("</think>")
        assert stripped_text == f"<think>{thoughts}</think>{after_thoughts}</answer>"
        assert after_thoughts.strip().startswith("<answer>")
        answer = after_thoughts.strip().removeprefix("<answer>")
        assert thoughts.strip()
        assert answer.strip()
        for tag in TAGS:
            assert tag not in thoughts + answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, "2"),
        ("<think>a</think><answer> \\boxed{2} </answer>", "2"),
        ("<think>a</think><answer>1</answer><answer>2</answer>", "2"),
        ("<think>a</think> so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed {2}", "2"),
        ("\\boxed{1} or \\boxed{2", None),
        ("<think>\\boxed{2}</think> yes", None),
        ("<think><answer>2</answer>", None),
        ("<think>it is 2", None),
        ("<think>a</think><answer></answer>", None),
        ("<think>a</think><answer>2", None),
        ("<think>a</think></answer>2<answer>", None),
        ("<think>a</think><answer>\\boxed{2</answer>", None),
        ("<answer>5</answer><think>but</think>", None),
        ("2", None),
        ("", None),
    ],
)
def test_the_final_answer_is_in_the_last_answer_tags_or_the_last_box(text, expected):
    assert final_answer(text) == expected


@given(st.text("a\\{}", max_size=30))
def test_the_content_of_a_box_has_balanced_braces(content):
    answer = last_boxed("\\boxed{" + content)
    if answer is not None:
        assert answer.count("{") == answer.count("}")
