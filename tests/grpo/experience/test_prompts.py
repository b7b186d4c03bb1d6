"""Prompts: templates, the prefilled `<think>`, and the tokens that end a completion."""

import pytest

from grpo import config as configs
from grpo.experience.prompts import Prompts, mark_special_tokens
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


def test_a_chat_template_is_rendered_with_system_prompt_and_prefill(chat):
    prompts = Prompts(configs.PromptSettings(system="Think.", think_prefill=True), chat)
    expected = (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWhat is 2 + "
        "3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert prompts.text(PROBLEM) == expected
    assert prompts.prefill(PROBLEM) == "<think>\n"
    assert chat.decode(prompts.token_ids(PROBLEM)) == expected


def test_a_chat_template_from_a_file_replaces_the_tokenizers_and_is_saved(tokenizer, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(CHAT)
    prompts = Prompts(configs.PromptSettings(chat_template=str(file)), tokenizer)
    expected = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.text(PROBLEM) == expected
    assert prompts.chat_template_to_save() == CHAT
    with pytest.raises(UserError, match=r"prompt\.chat_template=nowhere: /.*/nowhere cannot be"):
        Prompts(configs.PromptSettings(chat_template="nowhere"), tokenizer)
    with pytest.raises(UserError, match=r"requires prompt\.template=chat"):
        Prompts(configs.PromptSettings(chat_template=str(file), template="plain"), tokenizer)


def test_the_llama_3_template_is_that_of_the_instruct_models(tokenizer):
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"bos_token": tokens[0], "additional_special_tokens": tokens[1:]})
    settings = configs.PromptSettings(
        chat_template="configs/llama3.jinja", system="Think.", think_prefill=True
    )
    prompts = Prompts(settings, tokenizer)
    assert prompts.text(PROBLEM) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nThink.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n"
    )
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in prompts.stop_token_ids


def test_a_completion_ends_at_the_end_of_turn_token_and_at_eos(chat):
    # The EOS token of a base model often differs from the end-of-turn token of its chat template.
    prompts = Prompts(configs.PromptSettings(), chat, eos_token_ids=[9])
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
def test_the_saved_chat_template_of_a_base_model_renders_its_training_prompts(tokenizer, settings):
    prompts = Prompts(configs.PromptSettings(**settings), tokenizer)
    tokenizer.chat_template = prompts.chat_template_to_save()
    with_braces = Problem(id="q", question="{{ 7 }} + 5?\n", answer="", source="")
    for problem in (PROBLEM, with_braces):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text == prompts.text(problem)
    reloaded = Prompts(configs.PromptSettings(**settings), tokenizer)
    assert reloaded.chat_template_to_save() == tokenizer.chat_template


def test_the_saved_chat_template_contains_the_prefill_only_once(chat):
    prompts = Prompts(configs.PromptSettings(think_prefill=True), chat)
    chat.chat_template = prompts.chat_template_to_save()
    reloaded = Prompts(configs.PromptSettings(think_prefill=True), chat)
    assert reloaded.text(PROBLEM) == prompts.text(PROBLEM)
    assert reloaded.chat_template_to_save() == chat.chat_template
    conversation = chat.apply_chat_template(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>a</think> b"}],
        tokenize=False,
    )
    assert conversation.count("<think>") == 1


def test_a_template_that_already_ends_in_think_is_not_prefilled_twice(chat):
    chat.chat_template = CHAT.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    prompts = Prompts(configs.PromptSettings(think_prefill=True), chat)
    assert prompts.text(PROBLEM).count("<think>") == 1
    assert prompts.prefill(PROBLEM) == "<think>\n"


def test_r1_zero_is_the_template_of_the_paper_and_stops_at_the_closing_answer_tag(tokenizer):
    prompts = Prompts(configs.PromptSettings(template="r1_zero"), tokenizer)
    text = prompts.text(PROBLEM)
    assert text.startswith(
        "A conversation between User and Assistant. The User asks a question and the Assistant "
        "solves it."
    )
    assert text.endswith("User: What is 2 + 3? Assistant:")
    assert prompts.stop == ("</answer>",)
    assert prompts.prefill(PROBLEM) == ""  # the instructions quote the tags, but end without one


def test_braces_in_a_question_are_not_replaced(tokenizer):
    prompts = Prompts(configs.PromptSettings(template="plain"), tokenizer)
    problem = Problem(id="b", question=r"\frac{1}{2} {question}", answer="", source="")
    assert prompts.text(problem) == r"\frac{1}{2} {question}" + "\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "chat"}, "this tokenizer has no chat template .*r1_zero or plain"),
        ({"template": "caht"}, "unknown template. Available: chat, r1_zero, plain"),
        ({"template": "plain", "system": "r1"}, "prompt.system requires prompt.template=chat"),
    ],
)
def test_invalid_prompt_settings_are_errors(tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        Prompts(configs.PromptSettings(**settings), tokenizer)


def test_overlong_prompts_are_an_error_or_dropped(tokenizer):
    problems = [Problem(id=f"p{n}", question="x" * n, answer="", source="") for n in (3, 30, 20)]
    prompts = Prompts(configs.PromptSettings(template="plain", max_tokens=10), tokenizer)
    with pytest.raises(
        UserError,
        match=r"2 of 3 prompts are longer than prompt.max_tokens=10. The longest, p30, has 31 "
        r"tokens. Set prompt.max_tokens=31, or drop",
    ):
        prompts.without_overlong(problems)
    settings = configs.PromptSettings(template="plain", max_tokens=10, overlong="drop")
    remaining = Prompts(settings, tokenizer).without_overlong(problems)
    assert [problem.id for problem in remaining] == ["p3"]


def test_special_tokens_and_newlines_are_made_visible(chat):
    assert (
        mark_special_tokens("<|im_start|>user\nx<|im_end|>", chat)
        == "⟦<|im_start|>⟧user⏎\nx⟦<|im_end|>⟧"
    )


@pytest.mark.parametrize("kind", models.TINY_MODELS)
def test_the_tiny_tokenizer_decodes_its_tokens_to_the_same_text(tiny, kind):
    tokenizer = models.load_tokenizer(tiny(kind))
    text = "<think>7+5=12  é\n</think> <answer>12</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[0] == 2  # <think>
    assert max(ids) < 262
