"""Tests of the learner against plain PyTorch, for every ZeRO stage and dtype.

They cover log-probabilities and their gradients, AdamW updates, checkpoints, skipped updates and
the learning rate.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_config
from training_samples import STAGES_AND_DTYPES, grouped_samples, padded_batches, random_samples
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from grpo import config as configs
from grpo.learning import models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.deepspeed_setup import learning_rate
from grpo.learning.learner import Learner
from grpo.learning.policy import HeadOptions, Policy
from grpo.losses.grpo import loss
from grpo.types import RunError, Sample


def make_learner(tiny, tmp_path, attention="eager", **sections):
    """Returns a learner of a tiny model. The config sections are those of `tiny_config`."""
    config = tiny_config(tmp_path, tiny(), **sections)
    return Learner(models.load_model(tiny(), attention), config, loss)


def copy_weights(learner):
    return {name: weight.clone() for name, weight in learner.weights()}


def assert_weights_equal(learner, expected):
    for name, weight in learner.weights():
        assert torch.equal(expected[name], weight), name


def completion_logits(model, sample, temperature=1.0):
    """Returns the logits that predict the completion tokens, [L, V]."""
    logits = model(input_ids=torch.tensor([sample.token_ids])).logits[0, :-1].float()
    return logits[sample.prompt_length - 1 :] / temperature


def completion_logprobs(logits, sample):
    """Returns the log-probabilities of the completion tokens, [L], from their logits [L, V]."""
    completion_ids = torch.tensor(sample.token_ids[sample.prompt_length :])
    return logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]


@pytest.mark.parametrize("kind", models.TINY_MODELS)
def test_logprobs_and_entropies_equal_transformers_at_a_temperature(tiny, kind):
    model = models.load_model(tiny(kind), "eager")
    rows = random_samples()
    [batch] = padded_batches(rows, 10_000)
    with torch.no_grad():
        policy = Policy(model, HeadOptions(temperature=0.7, chunk_tokens=16))
        logprobs, entropies, *_ = policy(batch)
        for position, i in enumerate(batch.sample_indices):
            mask = batch.token_mask[position]
            logits = completion_logits(model, rows[i], temperature=0.7)
            expected_logprobs = completion_logprobs(logits, rows[i])
            assert torch.allclose(logprobs[position][mask], expected_logprobs, atol=1e-5)
        first_logits = completion_logits(model, rows[batch.sample_indices[0]], temperature=0.7)
        expected_entropies = torch.distributions.Categorical(logits=first_logits).entropy()
    assert torch.allclose(entropies[0][batch.token_mask[0]], expected_entropies, atol=1e-5)


@pytest.mark.parametrize("float32_head", [False, True])
def test_logprobs_and_entropies_have_the_gradients_of_plain_autograd(tiny, float32_head):
    model = models.load_model(tiny(), "eager")
    rows = random_samples()
    [batch] = padded_batches(rows, 10_000)
    head = HeadOptions(temperature=0.7, chunk_tokens=7, float32=float32_head, entropy_gradient=True)
    logprobs, entropies, *_ = Policy(model, head)(batch)
    generator = torch.Generator().manual_seed(0)
    logprob_weights, entropy_weights = torch.rand(2, *logprobs.shape, generator=generator)
    (logprob_weights * logprobs - 3 * entropy_weights * entropies).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    for position, i in enumerate(batch.sample_indices):
        mask = batch.token_mask[position]
        logits = completion_logits(model, rows[i], temperature=0.7)
        log_distribution = logits.log_softmax(-1)  # [L, V]
        negative_entropies = (log_distribution.exp() * log_distribution).sum(-1)  # [L]
        per_token = logprob_weights[position][mask] * completion_logprobs(logits, rows[i])
        per_token = per_token + 3 * entropy_weights[position][mask] * negative_entropies
        per_token.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-4), name


def plain_adamw(model):
    """Returns AdamW with weight decay for matrices and without weight decay for vectors."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


def naive_loss(model, rows):
    """Returns the on-policy GRPO loss of all samples, computed one sample at a time."""
    total = torch.zeros(())
    for row, weight in zip(rows, token_weights(rows, "sequence", 20), strict=True):
        logprobs = completion_logprobs(completion_logits(model, row), row)
        ratios = torch.exp(logprobs - logprobs.detach())
        total = total - weight * (ratios * torch.tensor(row.advantages)).sum()
    return total


def balance_loss_of_transformers(model, rows):
    """Returns the load-balancing loss of the tokens that predict completion tokens."""
    length = max(len(row.token_ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length)
    counted = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        num_tokens = len(row.token_ids)
        ids[i, :num_tokens] = torch.tensor(row.token_ids)
        attention_mask[i, :num_tokens] = 1
        counted[i, row.prompt_length - 1 : num_tokens - 1] = 1
    output = model(input_ids=ids, attention_mask=attention_mask, output_router_logits=True)
    config = model.config
    return load_balancing_loss_func(
        output.router_logits, config.num_experts, config.num_experts_per_tok, counted
    )


@pytest.mark.parametrize(
    ("attention", "max_tokens"), [("eager", 10_000), ("eager", 60), ("packed", 60)]
)
def test_the_balance_loss_is_that_of_the_whole_update(tiny, tmp_path, attention, max_tokens):
    model_dir = tiny("tiny-qwen3-moe")
    # Without advantages, only the balance loss trains the model.
    rows = [replace(row, advantages=(0.0,) * len(row.advantages)) for row in grouped_samples()]
    reference = models.load_model(model_dir, "eager")
    expected_loss = balance_loss_of_transformers(reference, rows)
    (10 * expected_loss).backward()
    gradients = [parameter.grad for parameter in reference.parameters()]
    expected_norm = torch.nn.utils.get_total_norm([each for each in gradients if each is not None])

    settings = {"model": {"router_aux_coef": 10.0}, "algorithm": {"kl_coef": 0.0}}
    config = tiny_config(tmp_path, model_dir, **settings)
    learner = Learner(models.load_model(model_dir, attention), config, loss)
    batches = micro_batches(
        rows,
        token_weights(rows, "sequence", 20),
        max_tokens=max_tokens,
        packed=attention == "packed",
    )
    assert (len(batches) > 1) == (max_tokens == 60)
    metrics = learner.update(batches)
    assert metrics["router/balance"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(10 * expected_loss.item(), rel=1e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(float(expected_norm), rel=1e-4)


@pytest.mark.parametrize(("stage", "dtype"), STAGES_AND_DTYPES)
def test_updates_equal_plain_adamw_and_a_checkpoint_continues_them_bit_for_bit(
    tiny, tmp_path, stage, dtype
):
    """Makes three updates with clipping, weight decay and warm-up.

    Each update is split into micro-batches of a different size. The tolerances of bfloat16 are
    wide.
    """
    settings = {
        "lr": 1e-2,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "warmup_updates": 2,
        "max_grad_norm": 0.5,
        "zero_stage": stage,
    }
    if dtype == "float32":
        norm_tolerance = 1e-4
        weight_tolerance = 2e-5
    else:
        norm_tolerance = 0.05
        weight_tolerance = 2e-2
    model = models.load_model(tiny(), "eager")
    optimizer = plain_adamw(model)
    learner = make_learner(tiny, tmp_path, "packed", model={"dtype": dtype}, learner=settings)
    rows = random_samples()
    for update, max_tokens in enumerate((10_000, 100, 40)):
        report = learner.update(padded_batches(rows, max_tokens))
        lr = 1e-2 * min(1.0, (update + 1) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        expected_loss = naive_loss(model, rows)
        optimizer.zero_grad()
        expected_loss.backward()
        expected_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        assert report["policy/grad_norm"] == pytest.approx(expected_norm, rel=norm_tolerance)
        assert report["policy/lr"] == pytest.approx(lr)
        assert report["loss"] == pytest.approx(float(expected_loss), abs=1e-5)
    expected_weights = dict(model.named_parameters())
    for name, weight in learner.weights():
        assert torch.allclose(weight.float(), expected_weights[name], atol=weight_tolerance), name

    learner.save(tmp_path / "saved")
    learner.update(padded_batches(rows, 100))
    weights_after_fourth_update = copy_weights(learner)
    learner.load(tmp_path / "saved")
    assert learner.num_updates == 3
    learner.update(padded_batches(rows, 100))
    assert_weights_equal(learner, weights_after_fourth_update)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_gradient_checkpointing_changes_no_gradient(tiny, tmp_path, attention):
    norms = []
    weights = []
    for checkpointing in (False, True):
        learner = make_learner(
            tiny, tmp_path, attention, model={"gradient_checkpointing": checkpointing}
        )
        report = learner.update(padded_batches(random_samples(), 100))
        norms.append(report["policy/grad_norm"])
        weights.append(copy_weights(learner))
    assert learner._policy.model.is_gradient_checkpointing
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for name, weight in weights[1].items():
        assert torch.allclose(weights[0][name], weight, atol=1e-6), name


def test_perturbed_changes_every_weight_and_restores_it_bit_for_bit(tiny, tmp_path):
    learner = make_learner(tiny, tmp_path)
    before = copy_weights(learner)
    with learner.perturbed(seed=3):
        for name, weight in learner.weights():
            mean_change = float((weight - before[name]).abs().mean())
            assert mean_change > 0.05 * float(before[name].abs().mean()), name
    assert_weights_equal(learner, before)


def test_an_interrupt_between_micro_batches_changes_no_weight(tiny, tmp_path):
    learner = make_learner(tiny, tmp_path)
    before = copy_weights(learner)

    def interrupt(num_done, num_batches):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.update(padded_batches(random_samples(), 40), interrupt)
    assert learner.num_updates == 0
    assert_weights_equal(learner, before)


@pytest.mark.parametrize(("stage", "dtype"), STAGES_AND_DTYPES)
def test_a_non_finite_update_is_skipped_and_the_third_in_a_row_stops_the_run(
    tiny, tmp_path, stage, dtype
):
    learner = make_learner(tiny, tmp_path, model={"dtype": dtype}, learner={"zero_stage": stage})
    learner.update(padded_batches(random_samples(), 1000))
    before = copy_weights(learner)
    nan_advantages = (float("nan"),) * 2
    sample = Sample(token_ids=(7, 8, 9), prompt_length=1, advantages=nan_advantages)
    nan_batches = padded_batches([sample], 100)

    for _ in range(2):
        assert learner.update(nan_batches)["update/not_finite"] == 1
    assert_weights_equal(learner, before)

    # A finite update is applied and resets the count of skipped updates.
    assert learner.update(padded_batches(random_samples(), 1000))["update/not_finite"] == 0
    has_finite_change = False
    for name, weight in learner.weights():
        if not torch.equal(before[name], weight) and weight.isfinite().all():
            has_finite_change = True
    assert has_finite_change

    for _ in range(2):
        learner.update(nan_batches)
    with pytest.raises(RunError, match=r"not finite or above .*, 3 times in a row"):
        learner.update(nan_batches)


def samples_with_large_advantages():
    rows = []
    for row in random_samples():
        rows.append(replace(row, advantages=tuple(1e4 * value for value in row.advantages)))
    return rows


@pytest.mark.parametrize(("stage", "dtype"), STAGES_AND_DTYPES)
def test_an_update_with_an_exploding_gradient_is_skipped_and_its_norm_reported(
    tiny, tmp_path, stage, dtype
):
    learner = make_learner(
        tiny,
        tmp_path,
        model={"dtype": dtype},
        learner={"zero_stage": stage, "skip_grad_norm": 100.0},
    )
    usual = learner.update(padded_batches(random_samples(), 1000))
    before = copy_weights(learner)
    skipped = learner.update(padded_batches(samples_with_large_advantages(), 1000))
    assert skipped["update/not_finite"] == 1
    assert 100 < skipped["policy/grad_norm"] < 1e6 * usual["policy/grad_norm"]
    assert_weights_equal(learner, before)
    assert learner.update(padded_batches(random_samples(), 1000))["update/not_finite"] == 0


def norms_and_skipped_update(learner):
    """Returns the gradient norms of three updates, and whether an exploding fourth is skipped."""
    norms = []
    for _ in range(3):
        report = learner.update(padded_batches(random_samples(), 1000))
        norms.append(report["policy/grad_norm"])
    report = learner.update(padded_batches(samples_with_large_advantages(), 1000))
    return norms, report["update/not_finite"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_makes_the_same_updates(tiny, tmp_path, stage):
    results = {}
    for offload in (False, True):
        settings = {
            "lr": 1e-2,
            "zero_stage": stage,
            "offload_optimizer": offload,
            "skip_grad_norm": 1000.0,
        }
        learner = make_learner(tiny, tmp_path, model={"dtype": "bfloat16"}, learner=settings)
        results[offload] = norms_and_skipped_update(learner)
    expected_norms, expected_skipped = results[False]
    norms, skipped = results[True]
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    assert norms[0] != norms[1]
    assert expected_skipped == 1
    assert skipped == 1


def test_metrics_are_means_over_completion_tokens_for_any_split_into_micro_batches(tiny, tmp_path):
    learner = make_learner(tiny, tmp_path, learner={"lr": 1e-12})
    expected = learner.update(padded_batches(random_samples(), 10_000))
    actual = learner.update(padded_batches(random_samples(), 40))
    for name in ("policy/entropy", "mismatch/abs", "ratio/mean", "policy/grad_norm", "loss"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_no_operator_is_compiled(tmp_path):
    """DeepSpeed compiles operators under a file lock that a killed process does not release.

    All later processes would wait for it forever.
    """
    program = (
        "from grpo.learning.deepspeed_setup import init_deepspeed; "
        "init_deepspeed(); print('initialized')"
    )
    environment = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        environment.pop(name, None)
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "initialized" in process.stdout, process.stderr
    assert not list(tmp_path.iterdir()), process.stderr


def test_learning_rate_golden_numbers():
    cosine = configs.LearnerSettings(lr=1.0, warmup_updates=2, schedule="cosine", min_lr_ratio=0.1)
    # The warm-up is 1/2, 1. The cosine then decays from 1 to 0.1 over 8 updates, and update 6 is
    # halfway: 0.1 + 0.9 * 0.5 = 0.55.
    rates = [learning_rate(cosine, update, 10) for update in (0, 1, 2, 6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.55])

    linear = configs.LearnerSettings(lr=1.0, schedule="linear")
    assert [learning_rate(linear, update, 4) for update in range(4)] == [1.0, 0.75, 0.5, 0.25]

    # `min_lr_ratio` has no effect on the default schedule, which is constant.
    assert learning_rate(configs.LearnerSettings(lr=1.0, min_lr_ratio=0.5), 3, 4) == 1.0
