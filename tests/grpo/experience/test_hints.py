"""Tests of the hints in a teacher's prompt."""

from dataclasses import replace

import pytest
from tiny_models import merging_tokenizer

from grpo import config as configs
from grpo.experience.hints import OtherVocabulary, TeacherSettings, hint, teacher_texts
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.alignment import Alignment, read_tokens
from grpo.types import Completion, Group, Problem, ScoredGroup, UserError, Verdict

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PROBLEM = Problem(id="p", question="What is 3 + 4?", answer="7", source="t")
CORRECT = Verdict(value="correct")
WRONG = Verdict(value="wrong", reason="no final answer")


def scored_group(verdicts, faults=None, problem=PROBLEM):
    """Returns a group whose completion i has the text "attempt i"."""
    completions = tuple(
        Completion(
            token_ids=(5,),
            logprobs=(-1.0,),
            text=f"attempt {i}",
            finish_reason="stop",
            versions=((0, 0, 1),),
        )
        for i in range(len(verdicts))
    )
    return ScoredGroup(
        group=Group(problem=problem, prompt_ids=(1, 2, 3), completions=completions),
        rewards=(0.0,) * len(verdicts),
        parts=({},) * len(verdicts),
        verdicts=tuple(verdicts),
        faults=tuple(faults or ({},) * len(verdicts)),
    )


def hints(scored, kind):
    return [hint(scored, index, kind) for index in range(len(scored.verdicts))]


def test_a_solution_is_the_worked_one_or_the_answer():
    assert hints(scored_group([None]), "solution") == ["A correct solution:\n7"]
    worked = scored_group([None], problem=replace(PROBLEM, solution="3 + 4 = 7"))
    assert hints(worked, "solution") == ["A correct solution:\n3 + 4 = 7"]
    unknown = scored_group([None], problem=replace(PROBLEM, answer=""))
    assert hints(unknown, "solution") == [None]


def test_a_success_is_another_correct_completion_of_the_group():
    scored = scored_group([WRONG, CORRECT, CORRECT, None])
    first, second = "A correct solution:\nattempt 1", "A correct solution:\nattempt 2"
    assert hints(scored, "success") == [first, second, first, first]
    assert hints(scored_group([WRONG, CORRECT]), "success") == [first, None]
    assert hints(scored_group([WRONG, WRONG]), "success") == [None, None]


def test_feedback_are_the_reasons_for_low_rewards():
    faults = ({"format": "no answer"}, {}, {"format": "no thoughts"})
    scored = scored_group([WRONG, CORRECT, CORRECT], faults)
    prefix = "Feedback on an earlier attempt: "
    assert hints(scored, "feedback") == [
        f"{prefix}no final answer; format: no answer",
        None,
        f"{prefix}format: no thoughts",
    ]


@pytest.mark.parametrize("template", ["plain", "r1_zero", "chat"])
def test_a_hinted_prompt_contains_the_question_and_the_hint_up_to_its_limit(tiny, template):
    tokenizer = models.load_tokenizer(tiny())
    tokenizer.chat_template = CHAT
    prompts = Prompts(configs.PromptSettings(template=template), tokenizer)
    solved = replace(PROBLEM, solution="Three and four are seven.")
    scored = scored_group([WRONG, WRONG], problem=solved)
    [[text, same_text]] = teacher_texts([scored], prompts, TeacherSettings("solution", 100))
    assert text == same_text
    text = tokenizer.decode(text.prompt_ids)
    expected = (
        "What is 3 + 4?\n\nA correct solution:\nThree and four are seven.\n\n"
        "Solve the problem yourself."
    )
    assert expected in text
    assert text.replace(expected, PROBLEM.question) == tokenizer.decode(prompts.token_ids(PROBLEM))

    hint_ids = tokenizer("A correct solution:\nThree", add_special_tokens=False)["input_ids"]
    settings = TeacherSettings("solution", len(hint_ids))
    [[text, _]] = teacher_texts([scored], prompts, settings)
    assert "solution:\nThree\n\nSolve" in tokenizer.decode(text.prompt_ids)
    # Without a hint, the teacher reads what the policy reads.
    for kind in ("success", "none"):
        assert teacher_texts([scored], prompts, TeacherSettings(kind, 100)) == [[None, None]]


def test_a_teacher_with_another_vocabulary_reads_its_own_tokens_and_prompts(tiny):
    tokenizer = models.load_tokenizer(tiny())
    prompts = Prompts(configs.PromptSettings(template="plain"), tokenizer)
    teacher_tokenizer = merging_tokenizer(["attempt 0 attempt 1"], vocabulary=270)
    teacher_prompts = Prompts(configs.PromptSettings(template="plain"), teacher_tokenizer)
    alignment = Alignment(
        student=read_tokens(tokenizer, prompts.end_id),
        teacher=read_tokens(teacher_tokenizer, teacher_prompts.end_id),
    )
    vocabularies = {"math": OtherVocabulary(teacher_prompts, alignment)}
    scored = scored_group([WRONG, WRONG], problem=replace(PROBLEM, data_set="math"))
    ids = tuple(tokenizer("attempt")["input_ids"])
    completions = [replace(each, token_ids=ids) for each in scored.group.completions]
    group = replace(scored.group, completions=tuple(completions))
    scored = replace(scored, group=group)
    other = replace(scored, group=replace(group, problem=PROBLEM))
    for kind in ("none", "solution"):
        settings = TeacherSettings(kind, 100, {"math"}, vocabularies)
        [[text, _], [other_text, _]] = teacher_texts([scored, other], prompts, settings)
        assert teacher_tokenizer.decode(text.completion_ids) == "attempt"
        prompt = teacher_tokenizer.decode(text.prompt_ids)
        assert prompt.startswith(PROBLEM.question)
        assert ("A correct solution" in prompt) == (kind == "solution")
        assert other_text is None or other_text.completion_ids is None


def test_completions_without_any_aligned_token_raise(tiny):
    tokenizer = models.load_tokenizer(tiny())
    prompts = Prompts(configs.PromptSettings(template="plain"), tokenizer)
    alignment = Alignment(
        student=read_tokens(tokenizer, prompts.end_id),
        teacher=read_tokens(merging_tokenizer(["a"], vocabulary=258, normalizer="Lowercase"), 1),
    )
    settings = TeacherSettings("none", 100, vocabularies={"": OtherVocabulary(prompts, alignment)})
    scored = scored_group([WRONG])
    ids = tuple(tokenizer("ABC")["input_ids"])
    [completion] = scored.group.completions
    group = replace(scored.group, completions=(replace(completion, token_ids=ids),))
    with pytest.raises(UserError, match="no completion can be aligned"):
        teacher_texts([replace(scored, group=group)], prompts, settings)
