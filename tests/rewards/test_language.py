"""The language reward: languages, mixed texts, text that is hidden from it, and its cost."""

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import limited_file_size

from grpo.rewards.language import (
    _full_identifier,
    detect_language,
    known_languages,
    prepare,
    reward,
    share_in_language,
    thoughts_of,
)
from grpo.types import Completion, Problem, RunError, UserError

QUESTION = Problem(id="t/0", question="What is the sum of 1 and 2?", answer="3", source="t")
ENGLISH = (
    "First we need to compute the sum of the numbers. Then we divide the result by two, because "
    "every number is counted twice. Hence the answer is fifty-five. "
)
GERMAN = (
    "Wir müssen zuerst die Summe der Zahlen berechnen. Dann teilen wir das Ergebnis durch zwei, "
    "weil jede Zahl doppelt gezählt wird. Also ist die Antwort gleich fünfundfünfzig. "
)
CHINESE = "首先我们需要计算这些数的和。然后我们把结果除以二，因为每个数都被数了两次。"
# language -> (a question, thoughts)
TEXTS = {
    "en": ("What is the sum of the first ten integers?", ENGLISH),
    "de": ("Was ist die Summe der ersten zehn Zahlen?", GERMAN),
    "zh": ("前十个数的和是多少？", CHINESE),
    "fr": (
        "Quelle est la somme des dix premiers entiers ?",
        "Nous devons d'abord calculer la somme des nombres. Ensuite nous divisons le résultat par "
        "deux, car chaque nombre est compté deux fois.",
    ),
    "es": (
        "¿Cuál es la suma de los diez primeros números?",
        "Primero tenemos que calcular la suma de los números. Después dividimos el resultado entre "
        "dos, porque cada número se cuenta dos veces.",
    ),
    "nl": (
        "Wat is de som van de eerste tien getallen?",
        "We moeten eerst de som van de getallen berekenen. Daarna delen we het resultaat door "
        "twee, omdat elk getal twee keer wordt geteld.",
    ),
    "pl": (
        "Jaka jest suma pierwszych dziesięciu liczb?",
        "Najpierw musimy obliczyć sumę liczb. Następnie dzielimy wynik przez dwa, ponieważ każda "
        "liczba jest liczona dwa razy.",
    ),
    "tr": (
        "İlk on sayının toplamı kaçtır?",
        "Önce sayıların toplamını hesaplamamız gerekiyor. Sonra sonucu ikiye böleriz, çünkü her "
        "sayı iki kez sayılır.",
    ),
    "vi": (
        "Tổng của mười số đầu tiên là bao nhiêu?",
        "Trước tiên chúng ta cần tính tổng của các số. Sau đó chúng ta chia kết quả cho hai.",
    ),
    "id": (
        "Berapa jumlah sepuluh bilangan pertama?",
        "Pertama kita harus menghitung jumlah bilangan tersebut. Kemudian kita membagi hasilnya "
        "dengan dua, karena setiap bilangan dihitung dua kali.",
    ),
    "ru": (
        "Чему равна сумма первых десяти чисел?",
        "Сначала нам нужно вычислить сумму чисел. Затем мы делим результат на два.",
    ),
    "uk": (
        "Чому дорівнює сума перших десяти чисел?",
        "Спочатку нам потрібно обчислити суму чисел. Потім ми ділимо результат на два.",
    ),
    "ar": (
        "ما هو مجموع الأعداد العشرة الأولى؟",
        "أولا يجب أن نحسب مجموع الأعداد. ثم نقسم النتيجة على اثنين لأن كل عدد يحسب مرتين.",
    ),
    "hi": (
        "पहली दस संख्याओं का योग क्या है?",
        "पहले हमें संख्याओं का योग निकालना होगा। फिर हम परिणाम को दो से भाग देते हैं।",
    ),
    "ja": (
        "最初の十個の数の和は何ですか？",
        "まず数の和を計算する必要があります。次に、各数が二回数えられるので、結果を二で割ります。",
    ),
    "ko": (
        "처음 열 개 수의 합은 얼마입니까?",
        "먼저 수의 합을 계산해야 합니다. 그런 다음 각 수가 두 번 세어지므로 결과를 둘로 나눕니다.",
    ),
    "th": (
        "ผลรวมของจำนวนสิบตัวแรกคือเท่าไร",
        "ก่อนอื่นเราต้องคำนวณผลรวมของจำนวน จากนั้นเราหารผลลัพธ์ด้วยสอง",
    ),
}
BOLD = {ord("a") + index: chr(0x1D41A + index) for index in range(26)}  # a -> 𝐚
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def completion(text: str) -> Completion:
    return Completion(token_ids=(0,), logprobs=(), text=text, finish_reason="stop", versions=())


# --- honest texts


@pytest.mark.parametrize("language", TEXTS)
def test_thoughts_in_the_language_of_the_question_score_1_and_others_0(language):
    question, thoughts = TEXTS[language]
    assert detect_language(question) == language
    problem = Problem(id="t/1", question=question, answer="55", source="t")
    text = completion(f"<think>{thoughts}</think><answer>55</answer>")
    assert reward(text, problem) == 1.0
    if language != "en":
        assert reward(text, QUESTION) == 0.0


@pytest.mark.parametrize(
    "thoughts",
    [
        "So the answer is three",
        "Wait, no.",
        "Easy.",
        "Substitute $x = 2$: $f(2) = 4$.",
        "The cost is $22,000 per kilogram. The total is $22,000 × 0.250 = $5,500, not $5,000.",
        r"We have \[\begin{aligned} x &= 3 \text{ if } y > 0 \end{aligned}\] and \(\frac{a}{b}\).",
        r"x = \frac{1}{2} \cdot \sqrt{3}, so \alpha is the angle \theta of the triangle ABC.",
        "We loop over the list:\n```python\nfor x in y:\n    s += x\n```\nThen `s` holds the sum.",
        "LET US ADD THE NUMBERS AND THEN DIVIDE THE RESULT BY TWO.",
        "See https://en.wikipedia.org/wiki/Sum for the formula of the sum of the first integers.",
    ],
)
def test_english_thoughts_with_formulas_code_and_prices_score_1(thoughts):
    assert share_in_language(thoughts, "en") == 1.0


def test_the_share_is_the_share_of_letters():
    # Eight Han characters and 121 English letters.
    text = (
        "First we need to compute the sum of the numbers 首先计算. Then we divide the result by 二."
    )
    num_english = sum(char.isascii() and char.isalpha() for char in text)
    assert share_in_language(text, "en") == pytest.approx(num_english / (num_english + 5))
    assert share_in_language(text, "zh") == pytest.approx(5 / (num_english + 5))
    # py3langid judges segments of 40 letters and more, so German sentences reach into English ones.
    num_german = sum(map(str.isalpha, GERMAN))
    share = sum(map(str.isalpha, ENGLISH)) / (sum(map(str.isalpha, ENGLISH)) + num_german)
    assert share_in_language(ENGLISH + GERMAN, "en") == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize(
    "question",
    ["Compute x", "Evaluate", "Simplify.", "1+2=", "", "Convert 2 km to m", "Let $x=1$.", "Hi"],
)
def test_a_short_question_that_can_be_english_is_english(question):
    assert detect_language(question) == "en"


def test_only_the_thoughts_are_scored():
    assert thoughts_of("<think>a</think>b") == "\na\n"
    assert thoughts_of("truncated") == "truncated"
    text = completion(f"<think>{ENGLISH}</think><answer>{GERMAN}</answer>")
    assert reward(text, QUESTION) == 1.0
    assert reward(text, QUESTION, language="de") == 0.0
    assert reward(completion(ENGLISH), QUESTION) == 1.0


# --- attacks


@pytest.mark.parametrize(
    "thoughts",
    [
        "",
        " \n\t",
        "\u200b\u200b",
        "\u3164" * 20,
        "...",
        "1 + 2 = 3",
        "$x = 3$",
        "x",
        "😀 👍",
        "\\alpha \\beta",
    ],
)
def test_thoughts_without_words_score_0(thoughts):
    assert reward(completion(f"<think>{thoughts}</think><answer>3</answer>"), QUESTION) == 0.0


@pytest.mark.parametrize(
    "hiding",
    [
        "${}$",
        "$${}$$",
        r"\({}\)",
        r"\[{}\]",
        r"$\text{{{}}}$",
        r"$x\mbox{{{}}}$",
        r"\begin{{align*}}{}\end{{align*}}",
        "```\n{}\n```",
        "```german\n{}",  # never closed
        "`{}`",
        "`{}",
        "${}",
        r"\({}",
        r"\begin{{align}}{}",
    ],
)
@pytest.mark.parametrize("foreign", [GERMAN.strip(), CHINESE])
def test_foreign_text_in_formulas_and_code_is_not_hidden(hiding, foreign):
    share = share_in_language(ENGLISH + hiding.format(foreign), "en")
    num_english = sum(map(str.isalpha, ENGLISH))
    assert share <= num_english / (num_english + sum(map(str.isalpha, foreign))) + 0.01


@pytest.mark.parametrize(
    "foreign",
    [
        GERMAN.replace(" ", "_"),
        GERMAN.replace(" ", ""),
        "\u200b".join(GERMAN),
        "\u00ad".join(GERMAN),
        " ".join(GERMAN.replace(" ", "")),
        "-".join(GERMAN.replace(" ", "")),
        "\n".join(GERMAN.replace(" ", "")),
        " ".join("\\" + word for word in GERMAN.split()),
        "https://example.com/" + GERMAN.replace(" ", "/"),
        base64.b64encode(GERMAN.encode()).decode(),
        GERMAN.encode().hex(),
        GERMAN.translate(BOLD),
        GERMAN.translate(FULL_WIDTH),
        GERMAN.upper(),
        GERMAN.replace(".", "").replace(",", ""),
    ],
)
def test_disguised_foreign_text_lowers_the_score(foreign):
    assert share_in_language(ENGLISH + foreign, "en") < 0.65


@pytest.mark.parametrize(
    "thoughts",
    [
        f"<think>{ENGLISH}</think>{GERMAN}</think>",  # the last </think> ends the thoughts
        f"</think>{GERMAN}</think>",
        f"<think>{ENGLISH}</think><answer>3</answer><think>{GERMAN}",
        f"{GERMAN}<think>{ENGLISH}</think>",
    ],
)
def test_thoughts_in_several_think_tags_all_count(thoughts):
    assert reward(completion(thoughts), QUESTION) < 0.65


def test_one_sentence_before_a_long_formula_is_not_enough():
    formula = "x^2 + 1 = 5, y = 3 \\\\ " * 200
    assert share_in_language(rf"So we compute. \[{formula}\]", "en") == 0.0


def test_a_long_sentence_is_cut_so_that_its_majority_does_not_pay_for_the_rest():
    one_sentence = (ENGLISH * 2 + GERMAN * 2).replace(".", ",")
    assert share_in_language(one_sentence, "en") < 0.7


# --- options and cost


def test_an_unknown_language_raises_a_user_error_with_similar_ones():
    assert {"en", "de", "zh", "la", "eo"} <= set(known_languages())
    prepare()
    prepare(language="la")
    with pytest.raises(UserError, match=r"options.language: unknown language 'enn' \(did you mean"):
        prepare(language="enn")
    with pytest.raises(UserError, match=r"unknown language 'english'.*Available: ace, af"):
        prepare(language="english")


def test_a_full_temporary_folder_is_a_run_error_that_names_tmpdir():
    load_model = _full_identifier.__wrapped__  # not from the cache
    with limited_file_size(1_000_000), pytest.raises(RunError, match="File too large; set TMPDIR"):
        load_model()


def test_a_language_that_is_not_common_can_be_expected():
    latin = "Primum summam numerorum computare debemus. Deinde summam per duo dividimus."
    assert share_in_language(latin, "la") == 1.0
    assert share_in_language(latin, "en") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "$ " * 100_000,
        r"\(" * 100_000,
        "`" * 200_000,
        r"\begin{align}" * 20_000,
        "https:" * 40_000,
        "a" + "\u0301\u0323" * 100_000,
        "ก้" * 100_000,
        "这" * 200_000,
        "a" * 200_000,
        "a " * 100_000,
        "\\a" * 100_000,
        ENGLISH * 1_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_the_time_is_linear(text):
    share_in_language("load the model", "en")
    start = time.process_time()
    share_in_language(text, "en")
    assert time.process_time() - start < 3  # measured: at most 0.2 s


@given(st.text(max_size=200), st.sampled_from(["en", "de", "zh", "ja", "la"]))
def test_any_text_has_a_language_and_a_share_between_0_and_1(text, expected_language):
    assert 0 <= share_in_language(text, expected_language) <= 1
    assert detect_language(text) in known_languages()
