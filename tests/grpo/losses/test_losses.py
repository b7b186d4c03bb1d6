# ruff: noqa: B023 - the lambdas of a row are called where they are made
"""Losses against golden numbers, a naive triple loop over each paper's equation, limits, and TRL's
trainer on the same tensors.
"""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.config.algorithm import Algorithm
from grpo.config.presets import PRESETS
from grpo.experience import plugins
from grpo.learning.advantages import advantages
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.objective import kl_estimate, mismatch_weights, objective
from grpo.losses import clipped_loss, ratio
from grpo.types import Sample

MAX_TOKENS = 20


def algorithm_of(preset, **changed) -> Algorithm:
    settings = {
        key.removeprefix("algorithm."): value
        for key, value in PRESETS[preset].settings.items()
        if key.startswith("algorithm.")
    }
    return Algorithm(**{"preset": preset} | settings | changed)


def test_clipped_loss_golden_numbers():
    # A = 2: r = 1.5 is clipped to 1.2 -> -2.4; A = -1: r = 0.5 -> min(-0.5, -0.8) -> 0.8; A = -1: r
    # = 1.5 is not clipped -> 1.5
    ratios, values = torch.tensor([1.5, 0.5, 1.5, 1.0]), torch.tensor([2.0, -1.0, -1.0, 3.0])
    clipped = clipped_loss(ratios, values, 0.2, 0.2)
    assert clipped.per_token.tolist() == pytest.approx([-2.4, 0.8, 1.5, -3.0])
    assert clipped.clipped_low.tolist() == [0, 1, 0, 0]
    assert clipped.clipped_high.tolist() == [1, 0, 0, 0]


def test_kl_golden_numbers():
    # pi = -1, ref = -1 + log 2: d = -log 2: k1 -0.693147, k2 0.240227, k3 2 - log 2 - 1 = 0.306853;
    # equal: 0
    own, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-1 + math.log(2), -1.0])
    for estimator, expected in {"k1": -0.693147, "k2": 0.240227, "k3": 0.306853}.items():
        assert kl_estimate(own, ref, estimator).tolist() == pytest.approx([expected, 0], abs=1e-6)


def test_mismatch_golden_numbers():
    # rho per token 1, 4 and 1, 1/4 in two rows of which a third place is padding; of the rows 4 and
    # 1/4, their geometric means 2 and 1/2
    log_rho = torch.tensor([[0.0, math.log(4), 9.0], [0.0, -math.log(4), 9.0]])
    mask = torch.tensor([[True, True, False]] * 2)

    def found(kind, low=None, high=None):
        return mismatch_weights(log_rho, mask, kind, low, high)[:, :2].flatten().tolist()

    assert found("none") == [1, 1, 1, 1]
    assert found("tis") == pytest.approx([1, 2, 1, 0.25])
    assert found("mis_token") == pytest.approx([1, 0, 1, 0.25])
    assert found("icepop") == pytest.approx([1, 4, 1, 0])
    assert found("mis_sequence") == pytest.approx([0, 0, 0.25, 0.25])
    assert found("mis_sequence", 0.5, 5) == pytest.approx([4, 4, 0, 0])
    assert found("mask_sequence", 0.6, 2.5) == [1, 1, 0, 0]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "sapo"])
def test_on_policy_every_recipe_has_reinforces_gradient(preset):
    rows = random_update(4)
    algorithm = algorithm_of(preset, kl_coef=0.0)
    _, gradient = ours(rows, algorithm, 1000, old=False)
    _, expected = ours(rows, algorithm.model_copy(update={"loss": "reinforce"}), 1000, old=False)
    assert torch.allclose(gradient, expected, atol=1e-7) and gradient.abs().max() > 0


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gmpo"])
def test_a_clipped_token_has_exactly_no_gradient(preset):
    rows = [
        row | {"pi": [old + shift for old in row["old"]]}
        for row in random_update(5)
        for shift in [9.0 if row["reward"] else -9.0]
    ]
    _, gradient = ours(rows, algorithm_of(preset, kl_coef=0.0), 1000)
    assert gradient.tolist() == torch.zeros_like(gradient).tolist()


def test_cispo_keeps_the_gradient_of_every_token():
    rows = [row | {"pi": [old + 9.0 for old in row["old"]]} for row in random_update(5)]
    _, gradient = ours(rows, algorithm_of("cispo"), 1000)
    assert all(gradient[i, : row["n"]].abs().min() > 0 for i, row in enumerate(rows))


def test_dual_clip_bounds_the_ratio_where_the_advantage_is_negative():
    rows = [row | {"pi": [old + 9.0 for old in row["old"]]} for row in random_update(5)]
    value, _ = ours(rows, algorithm_of("grpo", kl_coef=0.0, dual_clip=4.0), 1000)
    assert abs(value) < 10 < ours(rows, algorithm_of("grpo", kl_coef=0.0), 1000)[0]


def test_kl_in_the_loss_with_the_ratio_has_the_gradient_of_the_exact_kl():
    # one token of a vocabulary of 3: sum over its tokens of old(v) d/dz [ratio(v) k(v)] is the
    # gradient of KL(pi || ref)
    logits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.1, 0.4, 0.2]), 0)
    own = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((own.exp() * (own - ref)).sum(), logits)[0]
    for estimator in ("k1", "k3"):
        own = torch.log_softmax(logits, 0)
        weighted = own.exp().detach() * ratio(own, None) * kl_estimate(own, ref, estimator)
        assert torch.allclose(torch.autograd.grad(weighted.sum(), logits)[0], exact, atol=1e-6)


def random_update(seed, groups=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(groups * size):
        n = int(torch.randint(1, 9, (), generator=generator))

        def draw(n=n):
            return (torch.randn(n, generator=generator) * 0.4).tolist()

        reward = float(number % size < 1 + number // size)  # 1, 2 and 3 of four are right
        rows.append(
            {
                "group": number // size,
                "n": n,
                "reward": reward,
                "pi": draw(),
                "old": draw(),
                "ref": draw(),
            }
        )
    return rows


def ours(rows, algorithm, budget, old=True):
    """Returns the loss summed over micro-batches and its gradient with respect to every row's
    logprobs, [rows, 8].
    """
    groups = [
        [row for row in rows if row["group"] == number]
        for number in range(1 + max(row["group"] for row in rows))
    ]
    penalties = None
    if algorithm.advantage == "teacher":
        penalties = [
            [[old - ref for old, ref in zip(row["old"], row["ref"], strict=True)] for row in group]
            for group in groups
        ]
    if algorithm.kl_coef and algorithm.kl_in == "reward":

        def cost(row):
            return kl_estimate(
                torch.tensor(row["old"]), torch.tensor(row["ref"]), algorithm.kl_estimator
            )

        penalties = [
            [(algorithm.kl_coef * cost(row)).tolist() for row in group] for group in groups
        ]
    values = advantages(
        [[r["reward"] for r in g] for g in groups],
        [[r["n"] for r in g] for g in groups],
        algorithm.advantage,
        penalties,
    )
    flat = [value for group in values for value in group]
    samples = [
        Sample(
            token_ids=(1,) * (row["n"] + 2),
            prompt_length=2,
            advantages=value,
            group=row["group"],
            sampler_logprobs=tuple(row["old"]),
        )
        for row, value in zip(rows, flat, strict=True)
    ]
    weights = token_weights(samples, algorithm.reduction, MAX_TOKENS)
    loss = plugins.find("grpo.losses", algorithm.loss, "loss", "algorithm.loss")
    total, gradient = 0.0, torch.zeros(len(rows), 8)
    for batch in micro_batches(samples, weights, max_tokens=budget):
        grid = {name: torch.zeros(batch.token_mask.shape) for name in ("pi", "old", "ref")}
        for place, i in enumerate(batch.index):
            for name, put in grid.items():
                put[place, 1 : 1 + rows[i]["n"]] = torch.tensor(rows[i][name])
        logprobs = grid["pi"].requires_grad_()
        batch = replace(
            batch,
            old_logprobs=grid["old"] if old else None,
            ref_logprobs=grid["ref"] if algorithm.kl_coef else None,
        )
        result = objective(logprobs, torch.zeros_like(logprobs), batch, algorithm, loss)
        part = (batch.token_weights * result.per_token).sum()
        part.backward()
        total += float(part)
        for place, i in enumerate(batch.index):
            gradient[i, : rows[i]["n"]] = logprobs.grad[place, 1 : 1 + rows[i]["n"]]
    return total, gradient


def naive(preset, rows, pi):
    """Each paper's equation, sign turned, in loops over groups, completions and tokens.

    `pi` [rows][tokens] are the logprobs.
    """

    def mean(xs):
        return sum(xs) / len(xs)

    def std(xs):
        return mean([(x - mean(xs)) ** 2 for x in xs]) ** 0.5

    def clip(r, a, low, high):
        return -min(r * a, min(max(r, 1 - low), 1 + high) * a)

    def k1(row, t):
        return row["old"][t] - row["ref"][t]

    everything = [row["reward"] for row in rows]
    total_tokens = sum(row["n"] for row in rows)
    returns = [
        [
            row["reward"] - 0.001 * sum(k1(row, s) for s in range(t, row["n"]))
            for t in range(row["n"])
        ]
        for row in rows
    ]
    flat = [value for row in returns for value in row]
    loss = 0.0
    for i, row in enumerate(rows):
        group = [other for other in rows if other["group"] == row["group"]]
        rewards = [other["reward"] for other in group]
        r_mean, n = mean(rewards), row["n"]
        a = (row["reward"] - r_mean) / std(rewards)
        ratios = [math.exp(pi[i][t] - row["old"][t]) for t in range(n)]
        fixed = [math.exp(row["pi"][t] - row["old"][t]) for t in range(n)]  # stop-gradient
        s = math.exp(mean([pi[i][t] - row["old"][t] for t in range(n)]))
        for t in range(n):
            d = row["ref"][t] - pi[i][t]
            k3 = math.exp(d) - d - 1
            a_batch = (row["reward"] - r_mean) / std(everything)
            a_centered = (row["reward"] - r_mean) / std(
                [
                    o["reward"] - mean([p["reward"] for p in rows if p["group"] == o["group"]])
                    for o in rows
                ]
            )
            bounded = [min(math.log(x), 0.4) if a > 0 else max(math.log(x), -0.4) for x in ratios]
            tau = 1.0 if a > 0 else 1.05
            own = row["reward"] - 0.03 * sum(k1(row, u) for u in range(n))
            others = [
                o["reward"] - 0.03 * sum(k1(o, u) for u in range(o["n"]))
                for o in group
                if o is not row
            ]
            loss += {
                "grpo": lambda: (clip(ratios[t], a, 0.2, 0.2) + 0.04 * k3) / (len(rows) * n),
                "r1_zero": lambda: (clip(ratios[t], a, 10, 10) + 0.001 * k3) / (len(rows) * n),
                "r1": lambda: (clip(ratios[t], a, 10, 10) + 0.001 * k3) / (len(rows) * n),
                "dr_grpo": lambda: (
                    clip(ratios[t], row["reward"] - r_mean, 0.2, 0.2) / (len(rows) * MAX_TOKENS)
                ),
                "dapo": lambda: clip(ratios[t], a, 0.2, 0.28) / total_tokens,
                "gspo": lambda: clip(s, a, 3e-4, 4e-4) / (len(rows) * n),
                "cispo": lambda: -min(fixed[t], 5) * a * pi[i][t] / total_tokens,
                "rloo": lambda: -ratios[t] * (own - mean(others)) / (len(rows) * MAX_TOKENS),
                "reinforce_pp": lambda: (
                    clip(ratios[t], (returns[i][t] - mean(flat)) / std(flat), 0.2, 0.2)
                    / (len(rows) * n)
                ),
                "lite_ppo": lambda: clip(ratios[t], a_batch, 0.2, 0.2) / total_tokens,
                "scalerl": lambda: (
                    -min(fixed[t], 5) * a_centered * pi[i][t] / (3 * sum(o["n"] for o in group))
                ),
                "sapo": lambda: (
                    -4 / tau / (1 + math.exp(-tau * (ratios[t] - 1))) * a / (len(rows) * n)
                ),
                "on_policy_distill": lambda: (
                    -ratios[t] * (row["ref"][t] - row["old"][t]) / total_tokens
                ),
                "gmpo": lambda: -a * math.exp(mean(bounded)) / (len(rows) * n),
            }[preset]()
    return loss


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_a_naive_triple_loop_over_the_papers_equation(preset):
    rows = random_update(1)
    algorithm = algorithm_of(preset)
    value, gradient = ours(rows, algorithm, 1000)
    pi = [list(row["pi"]) for row in rows]
    assert value == pytest.approx(naive(preset, rows, pi), abs=2e-5)
    # and its gradient, by central differences
    for i, t in [(0, 0), (3, 0), (5, 0), (8, 0), (11, rows[11]["n"] - 1)]:
        sides = []
        for step in (1e-4, -1e-4):
            moved = [list(row) for row in pi]
            moved[i][t] += step
            sides.append(naive(preset, rows, moved))
        assert float(gradient[i, t]) == pytest.approx((sides[0] - sides[1]) / 2e-4, abs=2e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches_or_the_order(preset):
    rows = random_update(2)
    algorithm = algorithm_of(preset)
    whole, gradient = ours(rows, algorithm, 1000)
    for budget in (10, 25):
        value, split = ours(rows, algorithm, budget)
        assert value == pytest.approx(whole, abs=1e-5)
        assert torch.allclose(split, gradient, atol=1e-6)
    turned = [row | {"group": 2 - row["group"]} for row in rows[::-1]]
    value, backwards = ours(turned, algorithm, 1000)
    assert value == pytest.approx(whole, abs=1e-5)
    assert torch.allclose(backwards.flip(0), gradient, atol=1e-6)


TRL = {  # ours, TRL's arguments. Where TRL has a recipe but another number: docs/algorithms.md
    "grpo": (algorithm_of("grpo"), {"loss_type": "grpo"}),
    "dr_grpo": (algorithm_of("dr_grpo", kl_coef=0.04), {"loss_type": "dr_grpo"}),
    "dapo": (algorithm_of("dapo", kl_coef=0.04), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        algorithm_of("gspo", kl_coef=0.04),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "cispo": (algorithm_of("cispo", kl_coef=0.04), {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": (algorithm_of("sapo", kl_coef=0.04), {"loss_type": "sapo"}),
    "two-sided": (algorithm_of("grpo", dual_clip=1.3), {"loss_type": "grpo", "delta": 1.3}),
    "kl_unbiased": (
        algorithm_of("grpo", kl_unbiased=True),
        {"loss_type": "grpo", "use_bias_correction_kl": True},
    ),
}


@pytest.mark.parametrize("recipe", TRL)
def test_equals_trl_on_the_same_tensors(recipe):
    trl = pytest.importorskip("trl")
    algorithm, arguments = TRL[recipe]
    rows = random_update(3)
    values = advantages(
        [[r["reward"] for r in rows[n : n + 4]] for n in (0, 4, 8)],
        [[1] * 4] * 3,
        algorithm.advantage,
    )
    size = max(row["n"] for row in rows)
    grid = {
        name: torch.tensor([row[name] + [0.0] * (size - row["n"]) for row in rows])
        for name in ("pi", "old", "ref")
    }
    mask = torch.tensor([[1] * row["n"] + [0] * (size - row["n"]) for row in rows])
    logprobs = grid["pi"].clone().requires_grad_()
    value = trl_loss(
        trl,
        logprobs,
        grid,
        mask,
        torch.tensor([value for group in values for (value,) in group]),
        arguments,
    )
    value.backward()
    mine, gradient = ours(rows, algorithm, 1000)
    assert mine == pytest.approx(float(value), abs=1e-6)
    assert torch.allclose(gradient[:, :size], logprobs.grad, atol=1e-6)


def trl_loss(trl, logprobs, grid, mask, values, arguments):
    """Calls GRPOTrainer's own `_compute_loss` on a bare object that has what it reads."""
    chosen = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "delta": None,
    } | arguments

    class Bare(trl.GRPOTrainer):
        def __init__(self):  # no model, no accelerator
            metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            args = SimpleNamespace(
                delta=chosen.pop("delta"),
                use_bias_correction_kl=chosen.pop("use_bias_correction_kl", False),
                sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05,
                steps_per_generation=1,
            )
            accelerator = SimpleNamespace(
                gather=lambda x: x, device="cpu", num_processes=1, reduce=lambda x, **_: x
            )
            self.__dict__.update(
                args=args,
                beta=0.04,
                top_entropy_quantile=1.0,
                entropy_coef=0.0,
                off_policy_mask_threshold=None,
                use_vllm=False,
                max_completion_length=MAX_TOKENS,
                current_gradient_accumulation_steps=1,
                accelerator=accelerator,
                _metrics=metrics,
                model=SimpleNamespace(training=True),
                vllm_importance_sampling_correction=False,
                scale_rewards="group",
                aux_loss_enabled=False,
                _entropy_bonus_enabled=False,
                **chosen,
            )

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return logprobs, torch.zeros_like(logprobs), None

    inputs = {
        "prompt_ids": torch.ones(len(mask), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": values,
        "old_per_token_logps": grid["old"],
        "ref_per_token_logps": grid["ref"],
        "num_items_in_batch": mask.sum(),
    }
    return Bare()._compute_loss(SimpleNamespace(training=True), inputs)
