"""Tests of the losses.

The references are golden numbers, a naive loop over each paper's equation, limiting cases, and
TRL's trainer on the same tensors.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from grpo.config.algorithm import MISMATCH_FORMS, AlgorithmSettings, MismatchSettings
from grpo.config.presets import PRESETS
from grpo.experience import plugins
from grpo.learning.advantages import advantages, normalized_rewards
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.objective import kl_estimate, mismatch_weights, objective, off_policy_mask
from grpo.losses import clipped_loss, dppo, dppo_kl, ratio
from grpo.types import Sample

MAX_TOKENS = 20  # `sampling.max_tokens`
MAX_COMPLETION_TOKENS = 8  # of a random completion
NUM_GROUPS = 3
GROUP_SIZE = 4
# All presets but those whose loss is a divergence, which grpo/learning/learner.py adds. They are
# tested in tests/grpo/learning/test_on_policy_distillation.py.
RECIPES = [
    name
    for name, preset in PRESETS.items()
    if "algorithm.teacher_divergence" not in preset.settings
]
GDPO_WEIGHTS = {"accuracy": 1.0, "format": 0.5}


def algorithm_of(preset, **changes) -> AlgorithmSettings:
    """Returns the algorithm settings of a preset, with changes."""
    settings = {"preset": preset}
    for key, value in PRESETS[preset].settings.items():
        if key.startswith("algorithm."):
            settings[key.removeprefix("algorithm.")] = value
    settings.update(changes)
    return AlgorithmSettings(**settings)


def test_clipped_loss_golden_numbers():
    # A = 2, r = 1.5: r is clipped to 1.2, so the loss is -2.4.
    # A = -1, r = 0.5: min(-0.5, -0.8) = -0.8, so the loss is 0.8.
    # A = -1, r = 1.5: r is not clipped, and the loss is 1.5.
    # A = 3, r = 1: r is not clipped, and the loss is -3.
    ratios = torch.tensor([1.5, 0.5, 1.5, 1.0])
    token_advantages = torch.tensor([2.0, -1.0, -1.0, 3.0])
    clipped = clipped_loss(ratios, token_advantages, 0.2, 0.2)
    assert clipped.per_token.tolist() == pytest.approx([-2.4, 0.8, 1.5, -3.0])
    assert clipped.clipped_low.tolist() == [0, 1, 0, 0]
    assert clipped.clipped_high.tolist() == [1, 0, 0, 0]


def test_kl_golden_numbers():
    # The first token has log pi = -1 and log ref = -1 + log 2, so d = log pi - log ref = -log 2:
    # k1 = d = -0.693147
    # k2 = d^2 / 2 = 0.240227
    # k3 = exp(-d) + d - 1 = 2 - log 2 - 1 = 0.306853
    # The second token has equal log-probabilities, so every estimate is 0.
    logprobs = torch.tensor([-1.0, -1.0])
    ref_logprobs = torch.tensor([-1 + math.log(2), -1.0])
    for estimator, expected in {"k1": -0.693147, "k2": 0.240227, "k3": 0.306853}.items():
        estimates = kl_estimate(logprobs, ref_logprobs, estimator)
        assert estimates.tolist() == pytest.approx([expected, 0], abs=1e-6)


def test_mismatch_golden_numbers():
    # rho of the tokens is 1 and 4 in the first sequence, 1 and 1/4 in the second. The third
    # position of both is padding. The products over the sequences are 4 and 1/4, the geometric
    # means 2 and 1/2.
    log_ratios = torch.tensor([[0.0, math.log(4), 9.0], [0.0, -math.log(4), 9.0]])
    mask = torch.tensor([[True, True, False]] * 2)

    def token_mismatch_weights(settings):
        return mismatch_weights(log_ratios, mask, settings)[:, :2].flatten().tolist()

    expected = {
        "none": [1, 1, 1, 1],
        "tis": [1, 2, 1, 0.25],
        "mis_token": [1, 0, 1, 0.25],
        "icepop": [1, 4, 1, 0],
        "mis_sequence": [0, 0, 0.25, 0.25],
        "mask_sequence": [0, 0, 0, 0],  # the bounds are 0.999 and 1.001
    }
    assert expected.keys() == MISMATCH_FORMS.keys()
    for name, values in expected.items():
        assert token_mismatch_weights(MISMATCH_FORMS[name]) == pytest.approx(values)
    wider = MismatchSettings(mask="sequence", bounds=(0.5, 5.0), weight="sequence")
    assert token_mismatch_weights(wider) == pytest.approx([4, 4, 0, 0])
    wider = MismatchSettings(mask="geometric", bounds=(0.6, 2.5))
    assert token_mismatch_weights(wider) == [1, 1, 0, 0]
    combined = MismatchSettings(mask="geometric", bounds=(0.6, 2.5), weight="token", max=2.0)
    assert token_mismatch_weights(combined) == pytest.approx([1, 2, 0, 0])


def test_the_geometric_mask_drops_a_completion_from_a_mean_of_a_thousandth_on():
    # 1,000 tokens of which 3 are twice as likely for the learner: the mean of log rho is 0.0021.
    # Of 1 token, it is 0.0007.
    for num_tokens, is_kept in ((3, False), (1, True)):
        log_ratios = torch.zeros(1, 1000)
        log_ratios[0, :num_tokens] = math.log(2)
        mask = torch.ones(1, 1000, dtype=torch.bool)
        weights = mismatch_weights(log_ratios, mask, MISMATCH_FORMS["mask_sequence"])
        assert weights.unique().tolist() == [float(is_kept)]


def one_token_per_row(policy, sampler, token_advantages):
    """Returns log pi [B, 1] and a batch of B completions of one token, from probabilities."""
    samples = [
        Sample(
            token_ids=(1, 1),
            prompt_length=1,
            advantages=(advantage,),
            sampler_logprobs=(math.log(probability),),
        )
        for probability, advantage in zip(sampler, token_advantages, strict=True)
    ]
    [batch] = micro_batches(samples, [1.0] * len(samples), max_tokens=1000)
    logprobs = torch.zeros(batch.token_mask.shape)
    logprobs[:, 0] = torch.tensor(policy).log()
    return logprobs, replace(batch, old_logprobs=batch.sampler_logprobs)


def test_dppo_golden_numbers():
    # 1. pi - mu = 0.2 > 0.15 and A > 0: dropped. 2. The same with A < 0: r = 5/3 stays.
    # 3. pi - mu = -0.2 and A < 0: dropped. 4. The same with A > 0: r = 0.6 stays.
    # 5. r = 100, but pi - mu is only 0.099: kept with weight 20. PPO would clip it.
    policy = [0.5, 0.5, 0.3, 0.3, 0.1]
    sampler = [0.3, 0.3, 0.5, 0.5, 0.001]
    logprobs, batch = one_token_per_row(policy, sampler, [1.0, -1.0, -1.0, 1.0, 1.0])
    logprobs.requires_grad_()
    output = dppo.loss(logprobs, batch, algorithm_of("dppo"))
    output.per_token.sum().backward()
    assert logprobs.grad[:, 0].tolist() == pytest.approx([0, 5 / 3, 0, -0.6, -20])
    assert output.metrics["clip/high"][:, 0].tolist() == [1, 0, 0, 0, 0]
    assert output.metrics["clip/low"][:, 0].tolist() == [0, 0, 1, 0, 0]


def test_dppo_kl_golden_numbers():
    # From mu = 0.5 to pi = 0.8: 0.5 log(5/8) + 0.5 log(5/2) = 0.2231.
    # From mu = 0.5 to pi = 0.6: 0.5 log(5/6) + 0.5 log(5/4) = 0.0204.
    # From mu = 0.5 to pi = 0.2: 0.5 log(5/2) + 0.5 log(5/8) = 0.2231.
    mu = torch.full((3,), 0.5).log()
    divergences = dppo_kl.binary_kl(mu, torch.tensor([0.8, 0.6, 0.2]).log())
    assert divergences.tolist() == pytest.approx([0.2231, 0.0204, 0.2231], abs=1e-4)
    # The limit is 0.05. 1. Dropped. 2. Kept. 3. Dropped. 4. and 5.: against the direction of A.
    policy = [0.8, 0.6, 0.2, 0.8, 0.2]
    logprobs, batch = one_token_per_row(policy, [0.5] * 5, [1.0, 1.0, -1.0, -1.0, 1.0])
    output = dppo_kl.loss(logprobs, batch, algorithm_of("dppo_kl"))
    weights = [0, 1.2, 0, 1.6, 0.4]
    expected = []
    for weight, advantage, pi in zip(weights, [1, 1, -1, -1, 1], policy, strict=True):
        expected.append(-weight * advantage * math.log(pi))
    assert output.per_token[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_binary_kl_is_finite_where_a_probability_is_1():
    logprobs = torch.tensor([0.0, -1e-9, 0.0, -30.0, -1.0])
    other_logprobs = torch.tensor([-1e-9, 0.0, -30.0, 0.0, -1.0])
    divergences = dppo_kl.binary_kl(logprobs, other_logprobs)
    assert divergences.isfinite().all()
    assert divergences.min() > -1e-8
    assert divergences[2] == pytest.approx(30)  # the token was certain and is now impossible


def test_the_off_policy_mask_drops_wrong_completions_that_have_become_unlikely():
    # log(pi_sampler / pi) is 1.0 and 0.2, with mean 0.6, in rows 1 and 2; 0.4 in row 3.
    # Only row 1 is dropped: row 2 has a positive advantage, row 3 a mean below 0.5.
    rows = []
    for advantage, log_ratios in [(-1.0, [1.0, 0.2]), (1.0, [1.0, 0.2]), (-1.0, [0.4, 0.4])]:
        rows.append((advantage, [-1.0 - value for value in log_ratios]))
    samples = [
        Sample(
            token_ids=(1, 1, 1),
            prompt_length=1,
            advantages=(advantage,) * 2,
            sampler_logprobs=(-1.0, -1.0),
        )
        for advantage, _ in rows
    ]
    [batch] = micro_batches(samples, [1.0] * 3, max_tokens=1000)
    logprobs = torch.zeros(batch.token_mask.shape)
    logprobs[:, :2] = torch.tensor([values for _, values in rows])
    is_dropped = off_policy_mask(logprobs, batch, 0.5)
    assert is_dropped[:, :2].tolist() == [[True, True], [False, False], [False, False]]


def test_the_drift_term_is_the_squared_log_ratio_to_the_sampler():
    # log(pi / mu) is log 2 for the first token and 0 for the second. The derivative of
    # 0.5 x^2 at log 2 is log 2.
    logprobs, batch = one_token_per_row([0.6, 0.4], [0.3, 0.4], [0.0, 0.0])
    logprobs.requires_grad_()
    algorithm = algorithm_of("grpo", kl_coef=0.0, drift_coef=0.5)
    loss = plugins.find_function("grpo.losses", "grpo", "loss", "algorithm.loss")
    result = objective(logprobs, torch.zeros_like(logprobs), batch, algorithm, loss)
    expected = [0.5 * math.log(2) ** 2, 0]
    assert result.per_token[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert result.metrics["kl/drift"][:, 0].tolist() == pytest.approx([math.log(2) ** 2, 0])
    result.per_token[:, 0].sum().backward()
    assert logprobs.grad[:, 0].tolist() == pytest.approx([math.log(2), 0], abs=1e-6)


def test_ratios_and_kl_stay_finite_for_any_logprobs():
    # exp(1,000) is infinite in float32, and infinity times 0 is NaN.
    logprobs = torch.tensor([[-1000.0, 0.0]], requires_grad=True)
    other_logprobs = torch.tensor([[0.0, -1000.0]])
    ratios = ratio(logprobs, other_logprobs)
    assert ratios.tolist() == [pytest.approx([math.exp(-20), math.exp(20)])]
    estimates = kl_estimate(logprobs, other_logprobs, "k3")
    assert estimates.tolist() == [[10, 10]]
    (ratios + estimates).sum().backward()
    assert logprobs.grad.isfinite().all()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A completion of an update, with the log-probabilities of its tokens."""

    group: int
    reward: float
    format_reward: float  # the second reward of GDPO
    policy_logprobs: list[float]
    old_logprobs: list[float]  # also those of the sampler
    ref_logprobs: list[float]  # of the reference model or the teacher

    @property
    def length(self) -> int:
        return len(self.policy_logprobs)


def random_update(seed):
    """Returns the rows of an update, group by group. Group g has g + 1 correct completions."""
    generator = torch.Generator().manual_seed(seed)

    def random_logprobs(length):
        # Probabilities from about 0.3 to 0.95.
        return (-0.05 - torch.randn(length, generator=generator).abs() * 0.4).tolist()

    rows = []
    for number in range(NUM_GROUPS * GROUP_SIZE):
        length = int(torch.randint(1, MAX_COMPLETION_TOKENS + 1, (), generator=generator))
        group = number // GROUP_SIZE
        is_correct = number % GROUP_SIZE < group + 1
        row = Row(
            group=group,
            reward=float(is_correct),
            format_reward=float(torch.randint(0, 3, (), generator=generator)) / 2,
            policy_logprobs=random_logprobs(length),
            old_logprobs=random_logprobs(length),
            ref_logprobs=random_logprobs(length),
        )
        rows.append(row)
    return rows


def with_log_ratio(row, log_ratio):
    """Returns the row with log(pi / pi_old) = `log_ratio` at every token."""
    return replace(row, policy_logprobs=[value + log_ratio for value in row.old_logprobs])


def split_by_group(rows):
    groups = [[] for _ in range(NUM_GROUPS)]
    for row in rows:
        groups[row.group].append(row)
    return groups


def token_penalties(row, algorithm):
    """Returns the penalty of each token of a row, [L]."""
    if algorithm.kl_coef and algorithm.kl_in == "reward":
        old_logprobs = torch.tensor(row.old_logprobs)
        ref_logprobs = torch.tensor(row.ref_logprobs)
        kl = kl_estimate(old_logprobs, ref_logprobs, algorithm.kl_estimator)
        return (algorithm.kl_coef * kl).tolist()
    if algorithm.advantage == "teacher":
        return [old - ref for old, ref in zip(row.old_logprobs, row.ref_logprobs, strict=True)]
    return [0.0] * row.length


def make_samples(rows, algorithm):
    """Returns one sample per row. The rows are ordered by group."""
    groups = split_by_group(rows)
    rewards_PG = [[row.reward for row in group] for group in groups]
    lengths_PG = [[row.length for row in group] for group in groups]
    if algorithm.advantage == "per_reward":
        parts_PG = [
            [{"accuracy": row.reward, "format": row.format_reward} for row in group]
            for group in groups
        ]
        rewards_PG = normalized_rewards(rewards_PG, parts_PG, GDPO_WEIGHTS)
    penalties_PGL = [[token_penalties(row, algorithm) for row in group] for group in groups]
    advantages_PGL = advantages(rewards_PG, lengths_PG, algorithm.advantage, penalties_PGL)
    samples = []
    for group, advantages_GL in zip(groups, advantages_PGL, strict=True):
        for row, advantages_L in zip(group, advantages_GL, strict=True):
            sample = Sample(
                token_ids=(1,) * (2 + row.length),
                prompt_length=2,
                advantages=advantages_L,
                group=row.group,
                sampler_logprobs=tuple(row.old_logprobs),
            )
            samples.append(sample)
    return samples


def logprob_grid(batch, logprobs_of_rows):
    """Returns the log-probabilities of the batch's completion tokens as a grid [B, T]."""
    grid = torch.zeros(batch.token_mask.shape)
    for position, i in enumerate(batch.sample_indices):
        logprobs = logprobs_of_rows[i]
        # The second prompt token, at position 1, predicts the first completion token.
        grid[position, 1 : 1 + len(logprobs)] = torch.tensor(logprobs)
    return grid


class LossAndGradient(NamedTuple):
    loss: float  # summed over the micro-batches
    gradient: torch.Tensor  # with respect to the policy's logprobs, [rows, MAX_COMPLETION_TOKENS]


def loss_and_gradient(rows, algorithm, *, max_tokens=1000, with_old_logprobs=True):
    """Computes an update with grpo.

    Args:
        rows: the completions, ordered by group.
        algorithm: the recipe.
        max_tokens: upper limit of tokens per micro-batch. By default there is one micro-batch.
        with_old_logprobs: whether the policy differs from the old policy. If not, all ratios are 1.
    """
    samples = make_samples(rows, algorithm)
    weights = token_weights(samples, algorithm.reduction, MAX_TOKENS)
    loss = plugins.find_function("grpo.losses", algorithm.loss, "loss", "algorithm.loss")
    total = 0.0
    gradient = torch.zeros(len(rows), MAX_COMPLETION_TOKENS)
    for batch in micro_batches(samples, weights, max_tokens=max_tokens):
        logprobs = logprob_grid(batch, [row.policy_logprobs for row in rows]).requires_grad_()
        if with_old_logprobs:
            old_logprobs = logprob_grid(batch, [row.old_logprobs for row in rows])
            batch = replace(batch, old_logprobs=old_logprobs)
        if algorithm.kl_coef:
            ref_logprobs = logprob_grid(batch, [row.ref_logprobs for row in rows])
            batch = replace(batch, ref_logprobs=ref_logprobs)
        result = objective(logprobs, torch.zeros_like(logprobs), batch, algorithm, loss)
        batch_loss = (batch.token_weights * result.per_token).sum()
        batch_loss.backward()
        total += float(batch_loss)
        for position, i in enumerate(batch.sample_indices):
            length = rows[i].length
            gradient[i, :length] = logprobs.grad[position, 1 : 1 + length]
    return LossAndGradient(total, gradient)


@pytest.mark.parametrize("preset", [name for name in RECIPES if name != "sapo"])
def test_on_policy_every_recipe_has_the_gradient_of_reinforce(preset):
    rows = random_update(4)
    algorithm = algorithm_of(preset, kl_coef=0.0)
    reinforce = algorithm.model_copy(update={"loss": "reinforce"})
    actual = loss_and_gradient(rows, algorithm, with_old_logprobs=False)
    expected = loss_and_gradient(rows, reinforce, with_old_logprobs=False)
    assert torch.allclose(actual.gradient, expected.gradient, atol=1e-7)
    assert actual.gradient.abs().max() > 0


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gmpo"])
def test_a_clipped_token_has_exactly_zero_gradient(preset):
    rows = []
    for row in random_update(5):
        # A correct completion has a positive advantage, so its ratio is clipped from above.
        log_ratio = 9.0 if row.reward else -9.0
        rows.append(with_log_ratio(row, log_ratio))
    result = loss_and_gradient(rows, algorithm_of(preset, kl_coef=0.0))
    assert torch.equal(result.gradient, torch.zeros_like(result.gradient))


def test_cispo_keeps_the_gradient_of_every_token():
    rows = [with_log_ratio(row, 9.0) for row in random_update(5)]
    result = loss_and_gradient(rows, algorithm_of("cispo"))
    for row, gradient in zip(rows, result.gradient, strict=True):
        assert gradient[: row.length].abs().min() > 0


def test_dual_clip_bounds_the_ratio_where_the_advantage_is_negative():
    rows = [with_log_ratio(row, 9.0) for row in random_update(5)]
    bounded = loss_and_gradient(rows, algorithm_of("grpo", kl_coef=0.0, dual_clip=4.0))
    unbounded = loss_and_gradient(rows, algorithm_of("grpo", kl_coef=0.0))
    assert abs(bounded.loss) < 10
    assert unbounded.loss > 10


def test_kl_in_the_loss_with_the_ratio_has_the_gradient_of_the_exact_kl():
    # For one token of a vocabulary of 3, the gradient of KL(pi || ref) is the sum over the
    # vocabulary of old(v) d/dz [ratio(v) k(v)], with the logits z.
    logits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    ref_logprobs = torch.log_softmax(torch.tensor([-0.1, 0.4, 0.2]), 0)
    logprobs = torch.log_softmax(logits, 0)
    exact_kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    [expected] = torch.autograd.grad(exact_kl, logits)
    for estimator in ("k1", "k3"):
        logprobs = torch.log_softmax(logits, 0)
        estimates = ratio(logprobs, None) * kl_estimate(logprobs, ref_logprobs, estimator)
        mean_estimate = (logprobs.exp().detach() * estimates).sum()
        [actual] = torch.autograd.grad(mean_estimate, logits)
        assert torch.allclose(actual, expected, atol=1e-6)


def mean(values):
    return sum(values) / len(values)


def population_std(values):
    values_mean = mean(values)
    variance = mean([(value - values_mean) ** 2 for value in values])
    return variance**0.5


@dataclass(frozen=True)
class NaiveUpdate:
    """The quantities of the papers' equations, for token t of completion i, in plain Python.

    `policy_logprobs[i][t]` are the arguments of which the loss is a function. Where an equation
    stops the gradient, the log-probabilities of `rows` are used instead.
    """

    rows: list[Row]
    policy_logprobs: list[list[float]]

    def group_of(self, i):
        return [row for row in self.rows if row.group == self.rows[i].group]

    def group_rewards(self, i):
        return [row.reward for row in self.group_of(i)]

    def centered_reward(self, i):
        return self.rows[i].reward - mean(self.group_rewards(i))

    def advantage(self, i):
        """Returns GRPO's advantage."""
        return self.centered_reward(i) / population_std(self.group_rewards(i))

    def centered_reward_of_tokens(self):
        """Returns the centered reward of the completion of each token of the update."""
        values = []
        for j, row in enumerate(self.rows):
            values += [self.centered_reward(j)] * row.length
        return values

    def log_ratio(self, i, t):
        return self.policy_logprobs[i][t] - self.rows[i].old_logprobs[t]

    def ratio(self, i, t):
        return math.exp(self.log_ratio(i, t))

    def ratio_without_gradient(self, i, t):
        row = self.rows[i]
        return math.exp(row.policy_logprobs[t] - row.old_logprobs[t])

    def k3(self, i, t):
        d = self.rows[i].ref_logprobs[t] - self.policy_logprobs[i][t]
        return math.exp(d) - d - 1

    def k2(self, i, t):
        return (self.policy_logprobs[i][t] - self.rows[i].ref_logprobs[t]) ** 2 / 2

    def per_completion(self, i):
        """Returns the token weight of the mean over completions of the mean over tokens."""
        return 1 / (len(self.rows) * self.rows[i].length)

    def per_token(self):
        """Returns the token weight of the mean over all tokens."""
        return 1 / sum(row.length for row in self.rows)

    def per_max_tokens(self):
        """Returns the token weight of the sum over tokens, divided by a constant."""
        return 1 / (len(self.rows) * MAX_TOKENS)

    def per_group(self, i):
        """Returns the token weight of the mean over groups of the mean over a group's tokens."""
        return 1 / (NUM_GROUPS * sum(row.length for row in self.group_of(i)))


def naive_clipped_loss(r, advantage, low, high):
    clipped = min(max(r, 1 - low), 1 + high)
    return -min(r * advantage, clipped * advantage)


def reward_to_go(row, t, kl_coef):
    """Returns the reward minus the k1 penalties of token t and all later tokens."""
    penalties = [row.old_logprobs[s] - row.ref_logprobs[s] for s in range(t, row.length)]
    return row.reward - kl_coef * sum(penalties)


# Each of the following functions is the equation of a paper, with the sign of a loss, for token t
# of completion i. The loss of an update is the sum over its tokens. docs/algorithms.md cites the
# papers.


def naive_grpo(update, i, t):
    clipped = naive_clipped_loss(update.ratio(i, t), update.advantage(i), 0.2, 0.2)
    return (clipped + 0.04 * update.k3(i, t)) * update.per_completion(i)


def naive_r1(update, i, t):
    clipped = naive_clipped_loss(update.ratio(i, t), update.advantage(i), 10, 10)
    return (clipped + 0.001 * update.k3(i, t)) * update.per_completion(i)


def naive_dr_grpo(update, i, t):
    clipped = naive_clipped_loss(update.ratio(i, t), update.centered_reward(i), 0.2, 0.2)
    return clipped * update.per_max_tokens()


def naive_dapo(update, i, t):
    clipped = naive_clipped_loss(update.ratio(i, t), update.advantage(i), 0.2, 0.28)
    return clipped * update.per_token()


def naive_gspo(update, i, t):
    length = update.rows[i].length
    sequence_ratio = math.exp(mean([update.log_ratio(i, s) for s in range(length)]))
    clipped = naive_clipped_loss(sequence_ratio, update.advantage(i), 3e-4, 4e-4)
    return clipped * update.per_completion(i)


def naive_cispo(update, i, t):
    weight = min(update.ratio_without_gradient(i, t), 5)
    loss = -weight * update.advantage(i) * update.policy_logprobs[i][t]
    return loss * update.per_token()


def naive_rloo(update, i, t):
    row = update.rows[i]
    others = [other for other in update.group_of(i) if other is not row]
    baseline = mean([reward_to_go(other, 0, kl_coef=0.03) for other in others])
    advantage = reward_to_go(row, 0, kl_coef=0.03) - baseline
    return -update.ratio(i, t) * advantage * update.per_max_tokens()


def naive_reinforce_pp(update, i, t):
    returns = []
    for row in update.rows:
        returns += [reward_to_go(row, s, kl_coef=0.001) for s in range(row.length)]
    token_return = reward_to_go(update.rows[i], t, kl_coef=0.001)
    advantage = (token_return - mean(returns)) / population_std(returns)
    clipped = naive_clipped_loss(update.ratio(i, t), advantage, 0.2, 0.2)
    return clipped * update.per_completion(i)


def naive_lite_ppo(update, i, t):
    batch_std = population_std([row.reward for row in update.rows])
    advantage = update.centered_reward(i) / batch_std
    clipped = naive_clipped_loss(update.ratio(i, t), advantage, 0.2, 0.2)
    return clipped * update.per_token()


def naive_scalerl(update, i, t):
    centered_rewards = [update.centered_reward(j) for j in range(len(update.rows))]
    advantage = update.centered_reward(i) / population_std(centered_rewards)
    weight = min(update.ratio_without_gradient(i, t), 5)
    return -weight * advantage * update.policy_logprobs[i][t] * update.per_group(i)


def naive_sapo(update, i, t):
    advantage = update.advantage(i)
    tau = 1.0 if advantage > 0 else 1.05
    gate = 4 / tau / (1 + math.exp(-tau * (update.ratio(i, t) - 1)))
    return -gate * advantage * update.per_completion(i)


def naive_gmpo(update, i, t):
    advantage = update.advantage(i)
    log_ratios = [update.log_ratio(i, s) for s in range(update.rows[i].length)]
    if advantage > 0:
        clipped = [min(value, 0.4) for value in log_ratios]
    else:
        clipped = [max(value, -0.4) for value in log_ratios]
    return -advantage * math.exp(mean(clipped)) * update.per_completion(i)


def naive_dppo(update, i, t):
    row = update.rows[i]
    advantage = update.centered_reward(i)
    change = math.exp(row.policy_logprobs[t]) - math.exp(row.old_logprobs[t])
    if (advantage > 0 and change > 0.15) or (advantage < 0 and change < -0.15):
        return 0.0
    weight = min(update.ratio_without_gradient(i, t), 20)
    return -weight * advantage * update.policy_logprobs[i][t] * update.per_max_tokens()


def naive_dppo_kl(update, i, t):
    row = update.rows[i]
    advantage = update.centered_reward(i)
    pi = math.exp(row.policy_logprobs[t])
    mu = math.exp(row.old_logprobs[t])
    kl = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
    if kl > 0.05 and advantage * (pi - mu) > 0:
        return 0.0
    weight = min(update.ratio_without_gradient(i, t), 20)
    return -weight * advantage * update.policy_logprobs[i][t] * update.per_max_tokens()


def naive_deepseek_v32(update, i, t):
    row = update.rows[i]
    advantage = update.centered_reward(i)
    log_ratios = []
    for old, policy in zip(row.old_logprobs, row.policy_logprobs, strict=True):
        log_ratios.append(old - policy)
    is_kept = advantage >= 0 or mean(log_ratios) <= 0.5
    r = update.ratio(i, t)
    clipped = naive_clipped_loss(r, advantage, 0.2, 0.2) if is_kept else 0.0
    return (clipped + 0.001 * r * update.k3(i, t)) * update.per_completion(i)


def naive_maxrl(update, i, t):
    advantage = update.centered_reward(i) / mean(update.group_rewards(i))
    clipped = naive_clipped_loss(update.ratio(i, t), advantage, 0.2, 0.2)
    return clipped * update.per_token()


def naive_gdpo(update, i, t):
    sums = []
    for j, row in enumerate(update.rows):
        format_rewards = [other.format_reward for other in update.group_of(j)]
        normalized_format = row.format_reward - mean(format_rewards)
        if max(format_rewards) != min(format_rewards):
            normalized_format /= population_std(format_rewards)
        normalized_accuracy = 0.0
        if max(update.group_rewards(j)) != min(update.group_rewards(j)):
            normalized_accuracy = update.advantage(j)
        sums.append(normalized_accuracy + 0.5 * normalized_format)
    advantage = (sums[i] - mean(sums)) / population_std(sums)
    clipped = naive_clipped_loss(update.ratio(i, t), advantage, 0.2, 0.2)
    return clipped * update.per_token()


def naive_centered_batch_loss(update, i, t, clip_high):
    """Returns the loss of REINFORCE++ with baseline, without the KL and the token weight."""
    centered = update.centered_reward_of_tokens()
    advantage = 0.0
    if max(update.group_rewards(i)) != min(update.group_rewards(i)):
        advantage = (update.centered_reward(i) - mean(centered)) / population_std(centered)
    return naive_clipped_loss(update.ratio(i, t), advantage, 0.2, clip_high)


def naive_reinforce_pp_baseline(update, i, t):
    clipped = naive_centered_batch_loss(update, i, t, clip_high=0.2)
    return (clipped + 1e-5 * update.k2(i, t)) * update.per_token()


def naive_prorl_v2(update, i, t):
    # IcePop drops no token: the sampler's logprobs of the rows are the old ones.
    clipped = naive_centered_batch_loss(update, i, t, clip_high=0.27)
    return (clipped + 1e-4 * update.k2(i, t)) * update.per_token()


def naive_on_policy_distill(update, i, t):
    row = update.rows[i]
    advantage = row.ref_logprobs[t] - row.old_logprobs[t]
    return -update.ratio(i, t) * advantage * update.per_token()


NAIVE_LOSSES = {
    "grpo": naive_grpo,
    "r1_zero": naive_r1,
    "r1": naive_r1,
    "dr_grpo": naive_dr_grpo,
    "dapo": naive_dapo,
    "gspo": naive_gspo,
    "cispo": naive_cispo,
    "rloo": naive_rloo,
    "reinforce_pp": naive_reinforce_pp,
    "lite_ppo": naive_lite_ppo,
    "scalerl": naive_scalerl,
    "sapo": naive_sapo,
    "gmpo": naive_gmpo,
    "dppo": naive_dppo,
    "dppo_kl": naive_dppo_kl,
    "deepseek_v32": naive_deepseek_v32,
    "maxrl": naive_maxrl,
    "gdpo": naive_gdpo,
    "reinforce_pp_baseline": naive_reinforce_pp_baseline,
    "prorl_v2": naive_prorl_v2,
    "on_policy_distill": naive_on_policy_distill,
}


def naive_loss(preset, rows, policy_logprobs):
    update = NaiveUpdate(rows, policy_logprobs)
    token_loss = NAIVE_LOSSES[preset]
    total = 0.0
    for i, row in enumerate(rows):
        for t in range(row.length):
            total += token_loss(update, i, t)
    return total


def central_difference(preset, rows, i, t):
    """Returns the derivative of the naive loss with respect to the policy's logprob of a token."""
    losses = []
    for step in (1e-4, -1e-4):
        policy_logprobs = [list(row.policy_logprobs) for row in rows]
        policy_logprobs[i][t] += step
        losses.append(naive_loss(preset, rows, policy_logprobs))
    return (losses[0] - losses[1]) / 2e-4


@pytest.mark.parametrize("preset", RECIPES)
def test_loss_and_gradient_equal_a_naive_loop_over_the_papers_equation(preset):
    rows = random_update(1)
    result = loss_and_gradient(rows, algorithm_of(preset))
    expected_loss = naive_loss(preset, rows, [row.policy_logprobs for row in rows])
    assert result.loss == pytest.approx(expected_loss, abs=2e-5)
    for i, t in [(0, 0), (3, 0), (5, 0), (8, 0), (11, rows[11].length - 1)]:
        expected_gradient = central_difference(preset, rows, i, t)
        assert float(result.gradient[i, t]) == pytest.approx(expected_gradient, abs=2e-5)


@pytest.mark.parametrize("preset", ["dppo", "dppo_kl", "deepseek_v32"])
def test_the_update_of_the_naive_loop_has_kept_and_dropped_tokens(preset):
    rows = random_update(1)
    unbounded = {"clip_low": 1e3, "clip_high": 1e3, "off_policy_max": None, "kl_coef": 0.0}
    bounded = algorithm_of(preset, kl_coef=0.0)
    if preset == "deepseek_v32":  # so that only the mask, not the clip, drops tokens
        bounded = algorithm_of(preset, kl_coef=0.0, clip_low=1e3, clip_high=1e3)
    gradient = loss_and_gradient(rows, bounded).gradient
    unbounded_gradient = loss_and_gradient(rows, algorithm_of(preset, **unbounded)).gradient
    is_token = unbounded_gradient != 0
    is_dropped = is_token & (gradient == 0)
    assert is_dropped.any()
    assert torch.equal(gradient[~is_dropped], unbounded_gradient[~is_dropped])
    assert is_dropped.sum() < is_token.sum() / 2


@pytest.mark.parametrize("preset", RECIPES)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches_or_the_order(preset):
    rows = random_update(2)
    algorithm = algorithm_of(preset)
    expected = loss_and_gradient(rows, algorithm)
    for max_tokens in (10, 25):
        split = loss_and_gradient(rows, algorithm, max_tokens=max_tokens)
        assert split.loss == pytest.approx(expected.loss, abs=1e-5)
        assert torch.allclose(split.gradient, expected.gradient, atol=1e-6)
    reversed_rows = [replace(row, group=NUM_GROUPS - 1 - row.group) for row in rows[::-1]]
    backwards = loss_and_gradient(reversed_rows, algorithm)
    assert backwards.loss == pytest.approx(expected.loss, abs=1e-5)
    assert torch.allclose(backwards.gradient.flip(0), expected.gradient, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class TrlCase:
    """A recipe of grpo, and TRL's options for the same loss."""

    algorithm: AlgorithmSettings
    loss_type: str
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    importance_sampling_level: str = "token"
    delta: float | None = None
    use_bias_correction_kl: bool = False
    off_policy_mask_threshold: float | None = None


TRL_KL_COEF = 0.04

# For recipes that TRL has with other constants, see docs/algorithms.md.
TRL_CASES = {
    "grpo": TrlCase(algorithm=algorithm_of("grpo"), loss_type="grpo"),
    "dr_grpo": TrlCase(algorithm=algorithm_of("dr_grpo", kl_coef=TRL_KL_COEF), loss_type="dr_grpo"),
    "dapo": TrlCase(
        algorithm=algorithm_of("dapo", kl_coef=TRL_KL_COEF), loss_type="dapo", epsilon_high=0.28
    ),
    "gspo": TrlCase(
        algorithm=algorithm_of("gspo", kl_coef=TRL_KL_COEF),
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
    ),
    "cispo": TrlCase(
        algorithm=algorithm_of("cispo", kl_coef=TRL_KL_COEF), loss_type="cispo", epsilon_high=5.0
    ),
    "sapo": TrlCase(algorithm=algorithm_of("sapo", kl_coef=TRL_KL_COEF), loss_type="sapo"),
    "two-sided": TrlCase(
        algorithm=algorithm_of("grpo", dual_clip=1.3), loss_type="grpo", delta=1.3
    ),
    "kl_unbiased": TrlCase(
        algorithm=algorithm_of("grpo", kl_unbiased=True),
        loss_type="grpo",
        use_bias_correction_kl=True,
    ),
    "deepseek_v32": TrlCase(
        algorithm=algorithm_of("deepseek_v32", kl_coef=TRL_KL_COEF),
        loss_type="grpo",
        use_bias_correction_kl=True,
        off_policy_mask_threshold=0.5,
    ),
}


def pad(values, length):
    return values + [0] * (length - len(values))


def trl_inputs(rows, algorithm):
    """Returns the inputs of TRL's loss, except the policy's log-probabilities."""
    length = max(row.length for row in rows)
    mask = torch.tensor([pad([1] * row.length, length) for row in rows])
    rewards_PG = [[row.reward for row in group] for group in split_by_group(rows)]
    lengths_PG = [[1] * GROUP_SIZE] * NUM_GROUPS  # TRL has one advantage per completion
    completion_advantages = []
    for advantages_GL in advantages(rewards_PG, lengths_PG, algorithm.advantage):
        completion_advantages += [advantage for (advantage,) in advantages_GL]
    return {
        "prompt_ids": torch.ones(len(rows), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(rows), 2, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(completion_advantages),
        "old_per_token_logps": torch.tensor([pad(row.old_logprobs, length) for row in rows]),
        "ref_per_token_logps": torch.tensor([pad(row.ref_logprobs, length) for row in rows]),
        "num_items_in_batch": mask.sum(),
    }


def unchanged(tensor, **_):
    """Stands in for a collective of a single process."""
    return tensor


def trl_trainer(trl, case, logprobs):
    """Returns a GRPOTrainer without a model that has the attributes read by `_compute_loss`."""

    class TrainerWithoutModel(trl.GRPOTrainer):
        def __init__(self):
            pass

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return logprobs, torch.zeros_like(logprobs), None

    trainer = TrainerWithoutModel()
    vars(trainer).update(
        args=SimpleNamespace(
            delta=case.delta,
            use_bias_correction_kl=case.use_bias_correction_kl,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        loss_type=case.loss_type,
        epsilon_low=case.epsilon_low,
        epsilon_high=case.epsilon_high,
        importance_sampling_level=case.importance_sampling_level,
        beta=TRL_KL_COEF,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        off_policy_mask_threshold=case.off_policy_mask_threshold,
        use_vllm=False,
        max_completion_length=MAX_TOKENS,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            gather=unchanged, reduce=unchanged, device="cpu", num_processes=1
        ),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        model=SimpleNamespace(training=True),
        vllm_importance_sampling_correction=False,
        scale_rewards="group",
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
    )
    return trainer


@pytest.mark.parametrize("recipe", TRL_CASES)
def test_loss_and_gradient_equal_trl_on_the_same_tensors(recipe):
    trl = pytest.importorskip("trl")
    case = TRL_CASES[recipe]
    rows = random_update(3)
    inputs = trl_inputs(rows, case.algorithm)
    length = inputs["completion_mask"].shape[1]
    padded_logprobs = [pad(row.policy_logprobs, length) for row in rows]
    logprobs = torch.tensor(padded_logprobs, requires_grad=True)
    trainer = trl_trainer(trl, case, logprobs)
    trl_loss = trainer._compute_loss(SimpleNamespace(training=True), inputs)
    trl_loss.backward()
    result = loss_and_gradient(rows, case.algorithm)
    assert result.loss == pytest.approx(float(trl_loss), abs=1e-6)
    assert torch.allclose(result.gradient[:, :length], logprobs.grad, atol=1e-6)
