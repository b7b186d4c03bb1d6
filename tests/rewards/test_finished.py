"""The reward for ending: the finish reason decides, not the text."""

import pytest

from grpo.rewards.finished import reward
from grpo.types import Completion, Problem

PROBLEM = Problem(id="t/0", question="?", answer="2", source="t")


@pytest.mark.parametrize("text", ["", "<think>a", "<answer>2</answer>", "<|im_end|>", "</s> Done."])
@pytest.mark.parametrize(("finish_reason", "expected"), [("stop", 1.0), ("length", 0.0)])
def test_only_a_completion_that_ended_by_itself_is_finished(text, finish_reason, expected):
    completion = Completion(
        token_ids=(1,), logprobs=(), text=text, finish_reason=finish_reason, versions=()
    )
    assert reward(completion, PROBLEM) == expected
