"""GRPO's loss against golden numbers, a naive triple loop over the paper's equation, and TRL's trainer on the same tensors."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.batch import micro_batches, token_weights
from grpo.config import Algorithm
from grpo.losses import _terms
from grpo.losses.grpo import loss
from grpo.types import Sample


def test_clipped_golden_numbers():
    # A = 2: r = 1.5 is clipped to 1.2 -> -2.4; A = -1: r = 0.5 -> min(-0.5, -0.8) -> 0.8; A = -1: r = 1.5 is not clipped -> 1.5
    ratios, advantages = torch.tensor([1.5, 0.5, 1.5, 1.0]), torch.tensor([2.0, -1.0, -1.0, 3.0])
    value, low, high = _terms.clipped(ratios, advantages, 0.2, 0.2)
    assert value.tolist() == pytest.approx([-2.4, 0.8, 1.5, -3.0])
    assert low.tolist() == [0, 1, 0, 0] and high.tolist() == [1, 0, 0, 0]


def test_k3_golden_numbers():
    # d = ref - pi = log 2: 2 - log 2 - 1 = 0.306853; d = 0: 0
    assert _terms.k3(torch.tensor([0.0, -1.0]), torch.tensor([math.log(2), -1.0])).tolist() == pytest.approx([0.306853, 0], abs=1e-6)


def test_without_old_logprobs_the_gradient_is_reinforces():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    value, _ = loss(logprobs, tensors([[0.0, 0.0]], advantages=[[3.0, -1.0]]), Algorithm())
    value.sum().backward()
    assert logprobs.grad.tolist() == [[-3.0, 1.0]]


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([[0.5, -0.5]], requires_grad=True)  # ratios 1.65 with A > 0, 0.61 with A < 0
    value, report = loss(logprobs, tensors([[0.0, 0.0]], advantages=[[1.0, -1.0]], old=[[0.0, 0.0]]), Algorithm())
    value.sum().backward()
    assert logprobs.grad.tolist() == [[0.0, 0.0]]
    assert report["clip/high"].tolist() == [[1, 0]] and report["clip/low"].tolist() == [[0, 1]]


def tensors(sampler, *, advantages, old=None, ref=None):
    """A batch of completion tokens only."""
    shape = torch.tensor(sampler).shape
    samples = [Sample(token_ids=(1,) * (shape[1] + 1), prompt_length=1, advantages=tuple(row)) for row in advantages]
    (batch,) = micro_batches(samples, [1.0] * len(samples), max_tokens=1000)
    pad = lambda rows: None if rows is None else torch.nn.functional.pad(torch.tensor(rows), (0, 1))  # noqa: E731
    cut = replace(batch, old_logprobs=pad(old), ref_logprobs=pad(ref))
    keep = lambda value: value[:, : shape[1]] if torch.is_tensor(value) else value  # noqa: E731
    return replace(cut, **{name: keep(getattr(cut, name)) for name in ("advantages", "old_logprobs", "ref_logprobs", "token_weights")})


def random_update(seed, groups=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(groups * size):
        n = int(torch.randint(1, 9, (), generator=generator))
        draw = lambda n=n: (torch.randn(n, generator=generator) * 0.4).tolist()  # noqa: E731
        rows.append({"n": n, "advantage": draw()[0] * 3, "pi": draw(), "old": draw(), "ref": draw()})
    return rows


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_equals_a_naive_triple_loop_over_the_equation(kl_coef, reduction):
    rows = random_update(1)
    total = sum(row["n"] for row in rows)
    expected = 0.0
    for row in rows:
        for t in range(row["n"]):
            ratio = math.exp(row["pi"][t] - row["old"][t])
            clipped = min(max(ratio, 0.8), 1.3)
            d = row["ref"][t] - row["pi"][t]
            term = -min(ratio * row["advantage"], clipped * row["advantage"]) + kl_coef * (math.exp(d) - d - 1)
            weight = {"sequence": 1 / (len(rows) * row["n"]), "token": 1 / total, "constant": 1 / (len(rows) * 20)}[reduction]
            expected += weight * term
    assert ours(rows, Algorithm(clip_high=0.3, kl_coef=kl_coef, reduction=reduction), 1000)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("budget", [10, 25, 1000])
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(budget):
    rows = random_update(2)
    whole, gradient = ours(rows, Algorithm(kl_coef=0.1), 1000)
    value, split = ours(rows, Algorithm(kl_coef=0.1), budget)
    assert value == pytest.approx(whole, abs=1e-6)
    assert torch.allclose(split, gradient, atol=1e-7)


def ours(rows, algorithm, budget):
    """Returns the loss summed over micro-batches and its gradient with respect to every row's logprobs, [rows, 8]."""
    samples = [Sample(token_ids=(1,) * (row["n"] + 2), prompt_length=2, advantages=(row["advantage"],) * row["n"]) for row in rows]
    weights = token_weights([row["n"] for row in rows], algorithm.reduction, 20)
    value, gradient = 0.0, torch.zeros(len(rows), 8)
    for batch in micro_batches(samples, weights, max_tokens=budget):
        grid = {name: torch.zeros(batch.token_mask.shape) for name in ("pi", "old", "ref")}
        for place, i in enumerate(batch.index):
            for name, values in grid.items():
                values[place, 1 : 1 + rows[i]["n"]] = torch.tensor(rows[i][name])
        logprobs = grid["pi"].requires_grad_()
        per_token, _ = loss(logprobs, replace(batch, old_logprobs=grid["old"], ref_logprobs=grid["ref"]), algorithm)
        part = (batch.token_weights * per_token).sum()
        part.backward()
        value += float(part)
        for place, i in enumerate(batch.index):
            gradient[i, : rows[i]["n"]] = logprobs.grad[place, 1 : 1 + rows[i]["n"]]
    return value, gradient


@pytest.mark.parametrize(("reduction", "loss_type"), [("sequence", "grpo"), ("constant", "dr_grpo")])
def test_equals_trl_on_the_same_tensors(reduction, loss_type):
    trl = pytest.importorskip("trl")
    rows = random_update(3)
    size = max(row["n"] for row in rows)
    grid = {name: torch.tensor([row[name] + [0.0] * (size - row["n"]) for row in rows]) for name in ("pi", "old", "ref")}
    mask = torch.tensor([[1] * row["n"] + [0] * (size - row["n"]) for row in rows])
    logprobs = grid["pi"].clone().requires_grad_()
    value = trl_loss(trl, logprobs, grid, mask, torch.tensor([row["advantage"] for row in rows]), loss_type)
    value.backward()
    mine, gradient = ours(rows, Algorithm(kl_coef=0.04, reduction=reduction), 1000)
    assert mine == pytest.approx(float(value), abs=1e-6)
    assert torch.allclose(gradient[:, :size], logprobs.grad, atol=1e-7)


def trl_loss(trl, logprobs, grid, mask, advantages, loss_type):
    """Calls GRPOTrainer's own `_compute_loss` on a bare object that has what it reads."""
    from collections import defaultdict

    class Bare(trl.GRPOTrainer):
        def __init__(self):  # no model, no accelerator
            metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False)
            accelerator = SimpleNamespace(gather=lambda x: x, device="cpu", num_processes=1, reduce=lambda x, **_: x)
            self.__dict__.update(
                args=arguments, beta=0.04, epsilon_low=0.2, epsilon_high=0.2, loss_type=loss_type, importance_sampling_level="token",
                top_entropy_quantile=1.0, entropy_coef=0.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=20,
                current_gradient_accumulation_steps=1, accelerator=accelerator, _metrics=metrics, model=SimpleNamespace(training=True),
                vllm_importance_sampling_correction=False, scale_rewards="group", aux_loss_enabled=False, _entropy_bonus_enabled=False,
            )  # fmt: skip

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return logprobs, torch.zeros_like(logprobs), None

    inputs = {
        "prompt_ids": torch.ones(len(mask), 2, dtype=torch.long), "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": torch.ones_like(mask), "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": grid["old"], "ref_per_token_logps": grid["ref"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return Bare()._compute_loss(SimpleNamespace(training=True), inputs)
