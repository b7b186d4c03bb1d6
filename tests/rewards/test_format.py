"""The format reward and the extraction of the final answer from tags and boxes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.format import check, reward
from grpo.rewards.verifier.parse import TAGS, final_answer, last_boxed
from grpo.types import Completion, Problem, Score

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


INVISIBLE_TEXTS = [
    "\u200b",  # zero-width space
    "\u200b \u200b\n",
    "\u200c\u200d\u2060",  # joiners
    "\ufeff",  # byte order mark
    "\u00ad",  # soft hyphen
    "\u202e\u2066",  # marks of direction
    "\u2062\u2063",  # invisible operators
    "\u180e",  # Mongolian vowel separator
    "\u3164",  # Hangul fillers
    "\u115f\u1160\uffa0",
    "\u2800",  # Braille blank
    "\u00a0\u2003\u3000",  # spaces
    "\u2028\u2029",  # separators of lines and paragraphs
    "\x00\x07\x1b\x7f\x85\x9f",  # controls
    "\ufe0f\U000e0100",  # variation selectors
    "\u034f\u0301",  # marks without a letter
    "\U000e0041\U000e0042",  # tags
    "\ue000\U0010fffd",  # private use
    "\u0378\uffff",  # unassigned
    "\ud800",  # a lone surrogate
    "\u17b4\u17b5",  # Khmer inherent vowels
    "\U0001d173",  # musical format
    "\u200b" * 100_000,
]


@pytest.mark.parametrize("text", INVISIBLE_TEXTS, ids=lambda text: ascii(text[:4]))
def test_invisible_characters_are_no_content(text):
    assert check(f"<think>{text}</think><answer>2</answer>").reason == "empty thoughts"
    assert check(f"<think>1+1</think><answer>{text}</answer>").reason == "empty answer"


@pytest.mark.parametrize(
    "text", [text for text in INVISIBLE_TEXTS if text.strip()], ids=lambda text: ascii(text[:4])
)
def test_outside_of_the_tags_only_white_space_is_allowed(text):
    assert check(text + GOOD).reason == "text before think"
    assert check(f"<think>1+1</think>{text}<answer>2</answer>").reason == "text between"
    assert check(GOOD + text).reason == "text after answer"


@pytest.mark.parametrize("invisible", ["\u200b", "\u00ad", "\u3164", "\x00", "\ufe0f"])
def test_a_tag_with_an_invisible_character_is_no_tag(invisible):
    assert check(GOOD.replace("<answer>", f"<ans{invisible}wer>")).reason == "no answer"


@pytest.mark.parametrize("content", [".", "x", "是", "می‌شود", "👨‍👩‍👧", "é", "-", "ก้", "☃️"])
def test_any_visible_character_is_content(content):
    assert check(f"<think>{content}</think><answer>{content}</answer>")


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
