"""Tests of a teacher's signal in `grpo train`: one sample or the exact divergence, and rewards.

References are plain PyTorch in float64, and sums over a small vocabulary.
"""

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from random_loop import make_loop
from tiny_models import tiny_config
from training_samples import TokenGenerator, random_samples

from grpo.config.algorithm import AlgorithmSettings
from grpo.learning import lora, models
from grpo.learning.advantages import recipe_advantages, to_samples
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.divergence import divergence
from grpo.learning.learner import Learner
from grpo.learning.policy import Reference
from grpo.losses.reinforce import loss
from grpo.training.updates import Updater
from grpo.types import Completion, Group, Problem, Sample, ScoredGroup, TeacherText

TEMPERATURE = 1.5  # of the sampler
COEF = 0.7
TEACHER_SIZES = {"": 96, "math": 128, "code": 160}  # intermediate sizes, by name


def kl(p, q):
    """Returns KL(p || q) of log-probabilities [N, V], as a sum over the vocabulary."""
    return (p.exp() * (p - q)).sum(-1)


def exact_divergence(student, teacher, kind, top_k):
    """Returns the divergence of logits [N, V] per position, by its definition."""
    s = (student / TEMPERATURE).log_softmax(-1)
    t = (teacher / TEMPERATURE).log_softmax(-1)
    if top_k is not None and top_k < s.shape[-1]:
        # All tokens but the teacher's k most likely ones count as one.
        ids = t.topk(top_k, dim=-1).indices
        s, t = (
            torch.cat([x.gather(-1, ids), (1 - x.gather(-1, ids).exp().sum(-1, True)).log()], -1)
            for x in (s, t)
        )
    if kind == "reverse_kl":
        return kl(s, t)
    if kind == "forward_kl":
        return kl(t, s)
    mixture = ((s.exp() + t.exp()) / 2).log()
    return (kl(s, mixture) + kl(t, mixture)) / 2


def plain_loss(student, teachers, samples, kind, top_k):
    """Returns the loss of one update, the mean over tokens of -r A + COEF divergence.

    `teachers` has the teachers by the names in the samples.
    """
    num_tokens = sum(sample.completion_length for sample in samples)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        positions = slice(sample.prompt_length - 1, -1)
        logits = student(input_ids=ids).logits[0, positions]
        teacher = teachers[sample.teacher]
        teacher_logits = teacher(input_ids=ids).logits[0, positions].detach()
        completion_ids = torch.tensor(sample.token_ids[sample.prompt_length :])
        logprobs = (logits / TEMPERATURE).log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]
        ratios = (logprobs - logprobs.detach()).exp()
        policy_gradient = -ratios * torch.tensor(sample.advantages, dtype=torch.float64)
        distillation = COEF * exact_divergence(logits, teacher_logits, kind, top_k)
        total = total + (policy_gradient + distillation).sum() / num_tokens
    return total


@pytest.mark.parametrize(
    ("kind", "top_k"),
    [
        ("reverse_kl", None),
        ("reverse_kl", 8),
        ("reverse_kl", 9999),  # more than the vocabulary has
        ("forward_kl", None),
        ("jsd", None),
    ],
)
def test_loss_and_gradient_equal_plain_torch_in_float64_for_every_split(
    tiny, tmp_path, kind, top_k
):
    teacher_dir = tiny(intermediate_size=128)
    samples = random_samples(count=6)
    student = models.load_model(tiny(), "eager").double()
    teacher = models.load_model(teacher_dir, "eager").double()
    expected_loss = plain_loss(student, {"": teacher}, samples, kind, top_k)
    expected_loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    expected_norm = float(torch.nn.utils.get_total_norm(gradients))

    algorithm = {
        "preset": "dr_grpo",
        "reduction": "token",
        "teacher_coef": COEF,
        "teacher_divergence": kind,
        "teacher_top_k": top_k,
    }
    for max_tokens, attention in ((1000, "packed"), (30, "packed"), (40, "eager")):
        config = tiny_config(
            tmp_path,
            tiny(),
            model={"teacher": str(teacher_dir)},
            algorithm=algorithm,
            sampling={"temperature": TEMPERATURE},
            learner={"lr": 1e-12, "logits_chunk_tokens": 8},
        )
        learner = Learner(
            models.load_model(tiny(), attention),
            config,
            loss,
            {"": Reference(models.load_model(teacher_dir, attention))},
        )
        batches = micro_batches(
            samples,
            token_weights(samples, "token", 20),
            max_tokens=max_tokens,
            packed=attention == "packed",
        )
        report = learner.update(batches)
        assert report["loss"] == pytest.approx(float(expected_loss), rel=1e-4)
        assert report["policy/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)


def samples_of_data_sets():
    """Returns samples of the teachers "math", "code" and "", which alternate."""
    names = itertools.cycle(["math", "", "code"])
    return [replace(sample, teacher=next(names)) for sample in random_samples(count=9)]


def learner_with_teachers(tiny, tmp_path, attention, algorithm):
    """Returns a config and a learner whose teachers are three different models."""
    teacher_dirs = {name: tiny(intermediate_size=size) for name, size in TEACHER_SIZES.items()}
    config = tiny_config(
        tmp_path,
        tiny(),
        data={
            "name": None,
            "options": {},
            "mixture": {name: {"name": "arithmetic"} for name in ("math", "code", "logic")},
        },
        model={
            "teacher": str(teacher_dirs[""]),
            "teachers": {name: str(path) for name, path in teacher_dirs.items() if name},
        },
        algorithm=algorithm,
        sampling={"temperature": TEMPERATURE},
        learner={"lr": 1e-12, "logits_chunk_tokens": 8, "micro_batch_tokens": 60},
    )
    references = lora.load_references(config, tiny(), teacher_dirs)
    learner = Learner(models.load_model(tiny(), attention), config, loss, references)
    teachers = {
        name: models.load_model(path, "eager").double() for name, path in teacher_dirs.items()
    }
    return config, learner, teachers


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_each_data_set_learns_from_its_own_teacher_as_in_plain_torch(tiny, tmp_path, attention):
    samples = samples_of_data_sets()
    algorithm = {
        "preset": "dr_grpo",
        "reduction": "token",
        "teacher_coef": COEF,
        "teacher_divergence": "reverse_kl",
    }
    _, learner, teachers = learner_with_teachers(tiny, tmp_path, attention, algorithm)
    student = models.load_model(tiny(), "eager").double()
    expected_loss = plain_loss(student, teachers, samples, "reverse_kl", None)
    expected_loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    expected_norm = float(torch.nn.utils.get_total_norm(gradients))
    for max_tokens in (1000, 30):
        batches = micro_batches(
            samples,
            token_weights(samples, "token", 20),
            max_tokens=max_tokens,
            packed=attention == "packed",
        )
        assert {batch.teacher for batch in batches} == set(teachers)
        report = learner.update(batches)
        assert report["loss"] == pytest.approx(float(expected_loss), rel=1e-4)
        assert report["policy/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_one_sample_signals_come_from_the_teacher_of_the_data_set(tiny, tmp_path, attention):
    samples = samples_of_data_sets()
    algorithm = {"preset": "on_policy_distill"}
    config, learner, teachers = learner_with_teachers(tiny, tmp_path, attention, algorithm)
    penalties = Updater(config=config, learner=learner).kl_penalties(samples)
    student = models.load_model(tiny(), "eager").double()
    for sample, values in zip(samples, penalties, strict=True):
        prompt_ids = sample.token_ids[: sample.prompt_length]
        completion_ids = torch.tensor(sample.token_ids[sample.prompt_length :])
        expected = torch.zeros(len(completion_ids), dtype=torch.float64)
        for model, sign in ((student, 1), (teachers[sample.teacher], -1)):
            logits = completion_logits(model, prompt_ids, sample) / TEMPERATURE
            logprobs = logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]
            expected += sign * logprobs.detach()
        assert values == pytest.approx(expected.tolist(), abs=1e-5)


def test_samples_name_the_teacher_of_their_data_set():
    groups = []
    for data_set in ("math", "code", "logic"):
        problem = Problem(id="1", question="", answer="", source="hub", data_set=data_set)
        completion = Completion(
            token_ids=(5,), logprobs=(-1.0,), text="", finish_reason="stop", versions=((0, 0, 1),)
        )
        group = Group(problem=problem, prompt_ids=(1,), completions=(completion,))
        groups.append(
            ScoredGroup(group=group, rewards=(1.0,), parts=({},), verdicts=(None,), faults=({},))
        )
    samples = to_samples(groups, [[(0.5,)]] * 3, teachers={"math": "A", "code": "B"})
    assert [sample.teacher for sample in samples] == ["math", "code", ""]


def estimates_of_the_gradient(logits, teacher_logits):
    """Returns the gradient [V, V] of the sampled signal with respect to `logits`, by token.

    For token v it is -A(v) grad log pi(v), with A(v) = log pi_teacher(v) - log pi(v).
    """
    signals = teacher_logits.log_softmax(0) - logits.log_softmax(0)
    gradients_of_logprobs = torch.eye(len(logits)) - logits.softmax(0)
    return -signals[:, None] * gradients_of_logprobs


def test_one_sample_estimates_average_to_the_exact_gradient_and_vary_around_it():
    shares = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(50, generator=generator, dtype=torch.float64) * 2
        teacher_logits = logits + torch.randn(50, generator=generator, dtype=torch.float64) / 2
        estimates = estimates_of_the_gradient(logits, teacher_logits)
        probabilities = logits.softmax(0)[:, None]
        mean = (probabilities * estimates).sum(0)

        logits.requires_grad_()
        exact = divergence(logits[None], teacher_logits[None], "reverse_kl", 1.0)
        [exact_gradient] = torch.autograd.grad(exact.sum(), logits)
        assert torch.allclose(mean, exact_gradient, atol=1e-6)  # `divergence` is in float32
        variance = (probabilities * (estimates - mean).square()).sum()
        shares.append(float(variance / mean.square().sum()))
    # The numbers in docs/algorithms.md.
    assert min(shares) == pytest.approx(2, abs=0.5)
    assert max(shares) == pytest.approx(24, abs=0.5)
    assert statistics.median(shares) == pytest.approx(12, abs=0.5)


def test_a_teacher_beside_rewards_golden_numbers():
    # The rewards 1 and 0 have the advantages 0.5 and -0.5. The teacher finds the first token twice
    # as likely, the second half as likely, the third impossible: +log 2, -log 2 and -10, times 0.1.
    algorithm = AlgorithmSettings(advantage="none", teacher_coef=0.1)
    log2 = 0.693147
    penalties = [[[-log2, log2], [1e6]]]
    [[first, second]] = recipe_advantages(algorithm, [[1, 0]], [[2, 1]], penalties)
    assert [*first, *second] == pytest.approx([0.5693147, 0.4306853, -1.5], abs=1e-6)
    # A completion whose group has equal rewards learns from the teacher only.
    [[first, second]] = recipe_advantages(algorithm, [[1, 1]], [[2, 1]], penalties)
    assert [*first, *second] == pytest.approx([0.0693147, -0.0693147, -1.0], abs=1e-6)


@pytest.mark.parametrize("top_k", [None, 16])
def test_the_exact_divergence_falls_without_any_reward(tiny, tmp_path, top_k):
    def no_reward(completion, problem):
        return 0.0

    sections = {
        "model": {"teacher": "another"},
        "algorithm": {"preset": "on_policy_distill_exact", "teacher_top_k": top_k},
        "learner": {"lr": 1e-2, "zero_stage": 1},
    }
    loop = make_loop(tmp_path, tiny, reward=no_reward, **sections)
    divergences = []
    for _ in range(3):
        loop.step()
        metrics = loop.journal.latest_metrics
        assert metrics["update/made"] == 1
        divergences.append(metrics["policy/divergence"])
    assert divergences[2] < 0.7 * divergences[0]


def with_teacher_prompts(samples):
    """Returns the samples with prompts of a teacher, which the second and the last do not have.

    Their advantages are 0: the divergence is the only signal.
    """
    draw = TokenGenerator(5)
    result = []
    for index, sample in enumerate(samples):
        text = None
        if index not in (1, len(samples) - 1):
            prompt = sample.token_ids[: sample.prompt_length] + draw.tokens(1 + 3 * index)
            text = TeacherText(prompt_ids=prompt)
        zeros = (0.0,) * sample.completion_length
        result.append(replace(sample, advantages=zeros, teacher_text=text))
    return result


def prompt_of_teacher(sample):
    """Returns the prompt that the teacher reads."""
    if sample.teacher_text is None:
        return sample.token_ids[: sample.prompt_length]
    return sample.teacher_text.prompt_ids


def completion_logits(model, prompt_ids, sample):
    """Returns the logits [N, V] that predict a sample's completion after a prompt."""
    completion_ids = sample.token_ids[sample.prompt_length :]
    ids = torch.tensor([(*prompt_ids, *completion_ids)])
    return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]


def self_distillation_loss(policy, samples):
    """Returns the mean over tokens of KL(policy || policy with the teacher's prompt)."""
    num_tokens = sum(sample.completion_length for sample in samples)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        prompt_ids = sample.token_ids[: sample.prompt_length]
        logits = completion_logits(policy, prompt_ids, sample)
        teacher_prompt = prompt_of_teacher(sample)
        teacher_logits = completion_logits(policy, teacher_prompt, sample).detach()
        total = total + exact_divergence(logits, teacher_logits, "reverse_kl", None).sum()
    return total / num_tokens


def self_distillation_learner(tiny, tmp_path, attention, zero_stage=0, **algorithm):
    config = tiny_config(
        tmp_path,
        tiny(),
        algorithm={"preset": "self_distill", **algorithm},
        sampling={"temperature": TEMPERATURE},
        learner={"lr": 1e-12, "logits_chunk_tokens": 8, "zero_stage": zero_stage},
    )
    return config, Learner(models.load_model(tiny(), attention), config, loss)


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_a_policy_with_hints_teaches_itself_as_in_plain_torch(
    tiny, tmp_path, attention, zero_stage
):
    samples = with_teacher_prompts(random_samples(count=6))
    policy = models.load_model(tiny(), "eager").double()
    expected_loss = self_distillation_loss(policy, samples)
    expected_loss.backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    expected_norm = float(torch.nn.utils.get_total_norm(gradients))
    for max_tokens in (1000, 50):
        _, learner = self_distillation_learner(tiny, tmp_path, attention, zero_stage)
        batches = micro_batches(
            samples,
            token_weights(samples, "token", 20),
            max_tokens=max_tokens,
            packed=attention == "packed",
        )
        report = learner.update(batches)
        learner.close()
        assert report["policy/divergence"] == pytest.approx(float(expected_loss), rel=1e-4)
        assert report["policy/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_one_sample_of_a_policy_with_hints_is_its_logprob_with_the_hint(tiny, tmp_path, attention):
    samples = with_teacher_prompts(random_samples(count=6))
    config, learner = self_distillation_learner(
        tiny, tmp_path, attention, teacher_divergence="sampled"
    )
    penalties = Updater(config=config, learner=learner).kl_penalties(samples)
    policy = models.load_model(tiny(), "eager")
    for sample, actual in zip(samples, penalties, strict=True):
        completion_ids = torch.tensor(sample.token_ids[sample.prompt_length :])
        prompt_ids = sample.token_ids[: sample.prompt_length]
        logprobs = [
            (completion_logits(policy, prompt, sample) / TEMPERATURE)
            .log_softmax(-1)
            .gather(1, completion_ids[:, None])[:, 0]
            for prompt in (prompt_ids, prompt_of_teacher(sample))
        ]
        assert torch.allclose(torch.tensor(actual), logprobs[0] - logprobs[1], atol=1e-5)
    assert any(abs(value) > 0.01 for value in penalties[0])
    assert penalties[1] == pytest.approx([0.0] * samples[1].completion_length, abs=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_has_room_for_the_longer_prompts_of_a_teacher(packed):
    # Each sample has 20 tokens for the policy and 40 for the teacher.
    samples = [
        Sample(
            token_ids=(number,) * 10 + (50,) * 10,
            prompt_length=10,
            advantages=(0.0,) * 10,
            teacher_text=TeacherText(prompt_ids=(number,) * 30),
        )
        for number in range(1, 5)
    ]
    batches = micro_batches(samples, [0.1] * 4, max_tokens=80, packed=packed)
    assert [len(batch.sequences) for batch in batches] == [2, 2]
    for batch in batches:
        assert batch.teacher_batch.input_ids.shape == (2, 40)
        assert int(batch.teacher_batch.token_mask.sum()) == int(batch.token_mask.sum()) == 20
