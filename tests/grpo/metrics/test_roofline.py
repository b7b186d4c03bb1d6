"""Tests the lower bounds of a step's time against hand calculations with small numbers."""

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


def make_group(prompt_length, completion_lengths):
    completions = [
        Completion(
            token_ids=(0,) * length,
            logprobs=(0.0,) * length,
            text="",
            finish_reason="stop",
            versions=((0, 0, length),),
        )
        for length in completion_lengths
    ]
    return Group(
        problem=Problem(id="", question="", answer="", source=""),
        prompt_ids=(0,) * prompt_length,
        completions=tuple(completions),
    )


def test_golden_bounds():
    seconds = ROOFLINE.bounds([make_group(3, [1, 2])], updates=1, reference=False)
    # The prefill computes 2 x 20 weights x 3 tokens = 120 FLOP: 120 / 1000 = 0.12 s.
    # Decoding step 0 reads 30 x 2 bytes of weights and (3 + 3) x 2 bytes of cache: 72 / 100 =
    # 0.72 s. Its 2 x 30 x 2 sequences = 120 FLOP take only 120 / 1000 = 0.12 s.
    # Decoding step 1 has one sequence with a context of 4 tokens: (60 + 4 x 2) / 100 = 0.68 s.
    assert seconds["rollout"] == pytest.approx(0.12 + 0.72 + 0.68)
    # A forward pass computes 2 x (20 x 6 tokens + 10 x 3 completion tokens) = 300 FLOP. Forward and
    # backward pass cost three of them: 900 / 1000 = 0.9 s.
    # Adam reads and writes 30 bytes for each of 30 weights: 900 / 100 = 9 s.
    assert seconds["update"] == pytest.approx(0.9 + 9.0)
    # A sync reads and writes 60 bytes of weights.
    assert seconds["sync"] == pytest.approx(2 * 60 / 100)


def test_several_updates_and_a_reference_each_cost_one_more_forward_pass():
    groups = [make_group(3, [1, 2])]
    one_update = ROOFLINE.bounds(groups, updates=1, reference=False)
    two_updates = ROOFLINE.bounds(groups, updates=2, reference=True)
    # Old and reference logprobs cost one forward pass (0.3 s) each; the second update costs 9 s of
    # Adam.
    assert two_updates["update"] - one_update["update"] == pytest.approx(2 * 0.3 + 9.0)


def test_the_bound_of_the_update_is_zero_without_an_update():
    seconds = ROOFLINE.bounds([make_group(3, [1, 2])], updates=0, reference=False)
    assert seconds["update"] == 0


def test_a_prompt_is_counted_once_per_group():
    one_group = ROOFLINE.bounds([make_group(50, [4, 4])], updates=1, reference=False)
    two_groups = ROOFLINE.bounds([make_group(50, [4])] * 2, updates=1, reference=False)
    assert two_groups["update"] > one_group["update"]
