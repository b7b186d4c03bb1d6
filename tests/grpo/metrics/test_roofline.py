"""The bounds, worked by hand on numbers small enough to follow."""

import pytest

from grpo.metrics.roofline import Machine, Shape, bounds
from grpo.types import Completion, Group, Problem

MACHINE = Machine(flops=1000.0, bandwidth=100.0)
SHAPE = Shape(weights=30, body=20, head=10, layers=1, width=0, kv_bytes=2, weight_bytes=2)


def group(prompt, lengths):
    made = [
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
        completions=tuple(made),
    )


def test_golden_bounds():
    found = bounds(MACHINE, SHAPE, [group(3, [1, 2])], updates=1, reference=False)
    # prefill: 2 x 20 weights x 3 tokens / 1000 = 0.12. Step 0 reads 30 x 2 weight bytes + 2 x (3 +
    # 3) cache bytes = 72 / 100 = 0.72 (2 x 30 x 2 sequences / 1000 = 0.12 is less); step 1, one
    # sequence at context 4: (60 + 2 x 4) / 100 = 0.68
    assert found["rollout"] == pytest.approx(0.12 + 0.72 + 0.68)
    # forward: 2 x (20 x 6 tokens + 10 x 3 completion tokens) = 300; three of them / 1000; Adam: 30
    # x 30 bytes / 100
    assert found["update"] == pytest.approx(0.9 + 9.0)
    assert found["sync"] == pytest.approx(2 * 60 / 100)


def test_several_updates_and_a_reference_cost_a_forward_pass_each():
    one = bounds(MACHINE, SHAPE, [group(3, [1, 2])], updates=1, reference=False)
    more = bounds(MACHINE, SHAPE, [group(3, [1, 2])], updates=2, reference=True)
    assert more["update"] - one["update"] == pytest.approx(2 * 0.3 + 9.0)


def test_a_rollout_without_a_signal_has_no_update_to_bound():
    assert bounds(MACHINE, SHAPE, [group(3, [1, 2])], updates=0, reference=False)["update"] == 0


def test_a_prompt_is_counted_once_a_group():
    grouped = bounds(MACHINE, SHAPE, [group(50, [4, 4])], updates=1, reference=False)
    alone = bounds(MACHINE, SHAPE, [group(50, [4])] * 2, updates=1, reference=False)
    assert alone["update"] > grouped["update"]
