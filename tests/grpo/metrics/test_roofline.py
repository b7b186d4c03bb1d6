"""The bounds, worked by hand on numbers small enough to follow."""

import pytest

from grpo.metrics.roofline import Machine, Roofline, Shape
from grpo.types import Completion, Group, Problem

SHAPE = Shape(
    num_weights=30,
    body_weights=20,
    num_layers=1,
    hidden_size=2,
    vocab_size=5,
    attention_width=0,
    kv_bytes_per_token=2,
    bytes_per_weight=2,
)
ROOFLINE = Roofline(machine=Machine(flops=1000.0, bandwidth=100.0), shape=SHAPE)


def group(prompt, lengths):
    completions = [
        Completion(
            token_ids=(0,) * n,
            logprobs=(0.0,) * n,
            text="",
            finish_reason="stop",
            versions=((0, 0, n),),
        )
        for n in lengths
    ]
    return Group(
        problem=Problem(id="", question="", answer="", source=""),
        prompt_ids=(0,) * prompt,
        completions=tuple(completions),
    )


def test_golden_bounds():
    seconds = ROOFLINE.bounds([group(3, [1, 2])], updates=1, reference=False)
    # prefill: 2 x 20 weights x 3 tokens / 1000 = 0.12. Step 0 reads 30 x 2 weight bytes + 2 x (3 +
    # 3) cache bytes = 72 / 100 = 0.72 (2 x 30 x 2 sequences / 1000 = 0.12 is less); step 1, one
    # sequence at context 4: (60 + 2 x 4) / 100 = 0.68
    assert seconds["rollout"] == pytest.approx(0.12 + 0.72 + 0.68)
    # forward: 2 x (20 x 6 tokens + 10 x 3 completion tokens) = 300; three of them / 1000; Adam: 30
    # x 30 bytes / 100
    assert seconds["update"] == pytest.approx(0.9 + 9.0)
    assert seconds["sync"] == pytest.approx(2 * 60 / 100)


def test_several_updates_and_a_reference_cost_a_forward_pass_each():
    one = ROOFLINE.bounds([group(3, [1, 2])], updates=1, reference=False)
    several = ROOFLINE.bounds([group(3, [1, 2])], updates=2, reference=True)
    assert several["update"] - one["update"] == pytest.approx(2 * 0.3 + 9.0)


def test_a_rollout_without_a_signal_has_no_update_to_bound():
    assert ROOFLINE.bounds([group(3, [1, 2])], updates=0, reference=False)["update"] == 0


def test_a_prompt_is_counted_once_per_group():
    grouped = ROOFLINE.bounds([group(50, [4, 4])], updates=1, reference=False)
    alone = ROOFLINE.bounds([group(50, [4])] * 2, updates=1, reference=False)
    assert alone["update"] > grouped["update"]
