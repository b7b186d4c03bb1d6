"""The texts of soft distillation in the tokens of a teacher with another vocabulary."""

import pytest
from tiny_models import merging_tokenizer

from grpo.config import PromptSettings
from grpo.experience.hints import OtherVocabulary
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.alignment import Alignment, read_tokens
from grpo.stages.solutions import SolutionTexts
from grpo.stages.teacher_texts import TeacherTexts
from grpo.types import Problem, UserError

SOLUTIONS = ["<think>12+3=15</think><answer>15</answer>", "<think>7</think><answer>7</answer>"]


@pytest.fixture(scope="module")
def student_prompts():
    return Prompts(PromptSettings(template="plain"), models.character_tokenizer())


def problem(number, solution):
    return Problem(id=str(number), question="12+3=", answer="1", source="a", solution=solution)


def make_texts(problems, student_prompts, teacher_tokenizer):
    """Returns the samples without and with the teacher's tokens."""
    teacher_prompts = Prompts(PromptSettings(template="r1_zero"), teacher_tokenizer)
    student_tokenizer = models.character_tokenizer()
    alignment = Alignment(
        student=read_tokens(student_tokenizer, student_prompts.end_id),
        teacher=read_tokens(teacher_tokenizer, teacher_prompts.end_id),
    )
    texts = SolutionTexts(problems, student_prompts, max_tokens=200, section="soft", weight=0.0)
    return texts, TeacherTexts(texts, problems, OtherVocabulary(teacher_prompts, alignment))


def test_samples_have_the_text_in_the_tokens_and_the_prompt_of_the_teacher(student_prompts):
    tokenizer = merging_tokenizer(SOLUTIONS, vocabulary=290)
    first, second = (problem(number, text) for number, text in enumerate(SOLUTIONS))
    texts, teacher_texts = make_texts([first, second, first], student_prompts, tokenizer)
    samples = teacher_texts[0:3]
    assert samples[0] == samples[2]
    for sample, plain, solution in zip(
        samples, texts[0:3], [*SOLUTIONS, SOLUTIONS[0]], strict=True
    ):
        assert sample.token_ids == plain.token_ids
        text = sample.teacher_text
        assert tokenizer.decode(text.prompt_ids).endswith("User: 12+3= Assistant:")
        assert tokenizer.decode(text.completion_ids) == f"{solution}<|end|>"
        assert text.spans[-1] == (sample.completion_length, len(text.completion_ids))
    # The tags, which are one token of the student, are several tokens of the teacher.
    assert "100.0% of the texts are compared, in spans of 1." in teacher_texts.summary()
    assert "with 257 common tokens" in teacher_texts.summary()


def test_a_tokenizer_that_changes_the_texts_raises(student_prompts):
    tokenizer = merging_tokenizer(SOLUTIONS, vocabulary=290, normalizer="Lowercase")
    changed = problem(0, "<think>A</think><answer>1</answer>")
    with pytest.raises(UserError, match=r"only .*% of the texts can be compared"):
        make_texts([changed], student_prompts, tokenizer)
    # A few such texts are compared up to the change.
    unchanged = [problem(number, SOLUTIONS[0]) for number in range(1, 30)]
    texts, teacher_texts = make_texts([changed, *unchanged], student_prompts, tokenizer)
    [sample] = teacher_texts[0:1]
    assert 0 < sample.teacher_text.spans[-1][0] < texts[0:1][0].completion_length
    assert "100.0%" not in teacher_texts.summary()
