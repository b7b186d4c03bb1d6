"""The repetition reward: words, scripts without spaces, repeated characters, honest texts."""

import random
import time

import pytest

from grpo.rewards.repetition import repeated_share, reward
from grpo.types import Completion, Problem

PROBLEM = Problem(id="t/0", question="What is the sum of 1 and 2?", answer="3", source="t")


def completion(text: str) -> Completion:
    return Completion(token_ids=(0,), logprobs=(), text=text, finish_reason="stop", versions=())


def test_repetition_is_the_share_of_ngrams_that_occur_earlier():
    # The 5 bigrams are ab, ba, ab, ba, ab: 3 of them occur earlier in the text.
    assert repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repeated_share("one two three four", 2) == 0.0
    assert repeated_share("short", 2) == 0.0
    # The 3 bigrams are 答案, 案答, 答案: 1 of them occurs earlier in the text.
    assert repeated_share("答案答案", 2) == pytest.approx(1 / 3)
    # 25 times `a` are 25 words and 24 bigrams, of which 23 occur earlier in the text.
    assert repeated_share("a" * 25, 2) == pytest.approx(23 / 24)
    assert repeated_share("a" * 20, 2) == 0.0  # a long word
    # 10 invisible characters, of which 9 are behind another one, and no bigram.
    assert repeated_share("a" + "\u200b" * 10, 2) == 1.0
    assert reward(completion("wait, " * 200), PROBLEM, n=3) < -0.9
    assert reward(completion("wait, no"), PROBLEM) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "a" * 3000,
        "abc" * 1000,
        "WaitNo" * 500,
        "abcdefghijklmnopqrstuvwxyz0123456789" * 100,  # a long period
        "哈" * 3000,
        "したがって答えは五十五です" * 100,
        "ดังนั้นคำตอบคือห้าสิบห้า" * 100,
        "ສະບາຍດີ" * 300,
        "इसलिए उत्तर पचपन है " * 100,
        "0." + "3" * 3000,
        "1234567890" * 300,
        "!" * 3000,
        "_" * 3000,
        "wait_" * 500,
        "w.a.i.t." * 500,
        "\n" * 3000,
        " " * 3000,
        "\u200b" * 3000,
        "a\u200b" * 3000,
        "wait" + "\u200b\u200c" * 3000,
        "\u3164" * 3000,
        "e\u0301" * 3000,
        "😀" * 3000,
        "👨\u200d👩\u200d👧" * 800,
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_repeated_characters_and_texts_without_spaces_are_seen(text):
    assert repeated_share(text, 20) > 0.97
    honest = "First we add the numbers, then we divide the sum by two and compare both results. "
    assert repeated_share(honest + text, 20) > 0.9


def test_case_and_invisible_characters_do_not_make_a_repetition_new():
    generator = random.Random(0)
    case = "".join(generator.choice([char, char.upper()]) for char in "wait no " * 500)
    assert repeated_share(case, 20) > 0.97
    words = ["wait" + generator.choice(["", "\u200b", "\u2060", "\u00ad"]) for _ in range(800)]
    assert repeated_share(" ".join(words), 20) > 0.97


@pytest.mark.parametrize(
    "text",
    [
        "We add 2 and 3, and that is 5. We multiply 5 by 7, and that is 35. So the answer is 35.",
        "ก่อนอื่นเราต้องคำนวณผลรวมของจำนวน จากนั้นเราหารผลลัพธ์ด้วยสอง เพราะแต่ละจำนวนถูกนับสองครั้ง",
        "まず数の和を計算する必要があります。次に、各数が二回数えられるので、結果を二で割ります。",
        "पहले हमें संख्याओं का योग निकालना होगा। फिर हम परिणाम को दो से भाग देते हैं।",
        r"$\frac{1}{2} + \frac{1}{3} = \frac{3}{6} + \frac{2}{6} = \frac{5}{6}$, as above.",
        "def f(x):\n                        return x + 1\n\n\ndef g(x):\n    return x * 2\n",
        "pi is 3.14159265358979323846264338327950288419716939937510",
    ],
)
def test_honest_texts_have_no_repetition(text):
    assert repeated_share(text, 20) == 0.0


@pytest.mark.parametrize("text", ["a" * 10**6, "a b " * 250_000, "\u200b" * 10**6])
def test_the_time_is_linear(text):
    start = time.process_time()
    repeated_share(text, 20)
    assert time.process_time() - start < 8  # measured: at most 0.6 s
