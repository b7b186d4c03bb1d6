"""Prompts: templates, the prefilled `<think>`, and which tokens end a completion."""

import pytest

from grpo import config as configs
from grpo.experience.prompts import Prompts, visible
from grpo.learning import models
from grpo.types import Problem, UserError

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBLEM = Problem(id="p", question="What is 2 + 3?", answer="5", source="s")


@pytest.fixture
def tokenizer():
    tokenizer = models.character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


def test_chat_template_with_system_prompt_and_prefill(chat):
    prompts = Prompts(configs.Prompt(system="Think.", think_prefill=True), chat)
    expected = (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWhat is 2 + "
        "3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert prompts.text(PROBLEM) == expected and prompts.prefill(PROBLEM) == "<think>\n"
    assert chat.decode(prompts.ids(PROBLEM)) == expected


def test_a_completion_ends_at_the_turns_end_of_a_chat_template_and_at_eos(chat):
    # a base model's EOS is often not the token that its chat template ends a turn with
    prompts = Prompts(configs.Prompt(), chat, eos_token_ids=[9])
    assert set(prompts.stop_token_ids) == {
        chat.eos_token_id,
        chat.convert_tokens_to_ids("<|im_end|>"),
        9,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "plain"},
        {"template": "plain", "think_prefill": True},
        {"template": "r1_zero"},
        {"template": "r1_zero", "think_prefill": True},
    ],
)
def test_a_base_model_is_saved_with_the_prompts_that_it_was_trained_on(tokenizer, settings):
    prompts = Prompts(configs.Prompt(**settings), tokenizer)
    tokenizer.chat_template = prompts.saved_template()
    other = Problem(id="q", question="{{ 7 }} + 5?\n", answer="", source="")
    for problem in (PROBLEM, other):
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert shown == prompts.text(problem)
    assert (
        Prompts(configs.Prompt(**settings), tokenizer).saved_template() == tokenizer.chat_template
    )


def test_a_chat_model_is_saved_with_its_prefill_once(chat):
    prompts = Prompts(configs.Prompt(think_prefill=True), chat)
    chat.chat_template = prompts.saved_template()
    again = Prompts(configs.Prompt(think_prefill=True), chat)
    assert (
        again.text(PROBLEM) == prompts.text(PROBLEM)
        and again.saved_template() == chat.chat_template
    )
    whole = chat.apply_chat_template(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>a</think> b"}],
        tokenize=False,
    )
    assert whole.count("<think>") == 1


def test_a_template_that_already_ends_in_think_is_not_prefilled_twice(chat):
    chat.chat_template = CHAT.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    prompts = Prompts(configs.Prompt(think_prefill=True), chat)
    assert prompts.text(PROBLEM).count("<think>") == 1 and prompts.prefill(PROBLEM) == "<think>\n"


def test_r1_zero_is_the_papers_text_and_stops_at_the_answers_end(tokenizer):
    prompts = Prompts(configs.Prompt(template="r1_zero"), tokenizer)
    text = prompts.text(PROBLEM)
    assert text.startswith(
        "A conversation between User and Assistant. The User asks a question and the Assistant "
        "solves it."
    )
    assert text.endswith("User: What is 2 + 3? Assistant:")
    # the tags quoted in the prompt are no prefill
    assert prompts.stop == ("</answer>",) and prompts.prefill(PROBLEM) == ""


def test_a_question_with_braces_is_left_as_it_is(tokenizer):
    prompts = Prompts(configs.Prompt(template="plain"), tokenizer)
    braces = Problem(id="b", question=r"\frac{1}{2} {question}", answer="", source="")
    assert prompts.text(braces) == r"\frac{1}{2} {question}" + "\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "chat"}, "this tokenizer has no chat template .*r1_zero or plain"),
        ({"template": "caht"}, "unknown template. Available: chat, r1_zero, plain"),
        ({"template": "plain", "system": "r1"}, "prompt.system requires prompt.template=chat"),
    ],
)
def test_what_cannot_be_rendered_is_told(tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        Prompts(configs.Prompt(**settings), tokenizer)


def test_prompts_that_are_too_long_are_counted_and_the_longest_named(tokenizer):
    problems = [Problem(id=f"p{n}", question="x" * n, answer="", source="") for n in (3, 30, 20)]
    with pytest.raises(
        UserError,
        match=r"2 of 3 prompts are longer than prompt.max_tokens=10. The longest, p30, has 31 "
        r"tokens. Set prompt.max_tokens=31, or drop",
    ):
        Prompts(configs.Prompt(template="plain", max_tokens=10), tokenizer).fitting(problems)
    dropped = Prompts(
        configs.Prompt(template="plain", max_tokens=10, overlong="drop"), tokenizer
    ).fitting(problems)
    assert [problem.id for problem in dropped] == ["p3"]


def test_special_tokens_are_visible(chat):
    assert visible("<|im_start|>user\nx<|im_end|>", chat) == "⟦<|im_start|>⟧user⏎\nx⟦<|im_end|>⟧"


@pytest.mark.parametrize("kind", models.TINY)
def test_the_tiny_tokenizer_gives_any_text_back_whatever_class_reads_it(tiny, kind):
    tokenizer = models.load_tokenizer(tiny(kind))
    text = "<think>7+5=12  é\n</think> <answer>12</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and ids[0] == 2 and max(ids) < 262
