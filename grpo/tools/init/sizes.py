"""The lengths, numbers and learning rates of a new config: everything but memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grpo.config import PromptSettings
from grpo.metrics.roofline import ModelShape
from grpo.tools.init.data import DataFacts
from grpo.tools.init.hardware import Hardware
from grpo.tools.init.model import ModelFacts, PromptChoice
from grpo.tools.init.settings import Overrides, Setting, make_tree
from grpo.types import UserError

GROUP_SIZE = 8  # TRL's default
GPU_PROBLEMS = 64  # per rollout, as in the GSM8K configs in configs/
PROBLEMS_PER_GPU = 16  # at least, so that every GPU samples 128 completions
CPU_PROBLEMS = 16  # as in configs/gsm8k_smollm2.yaml
GPU_ROLLOUTS = 200
CPU_ROLLOUTS = 12
SFT_EPOCHS = 3
MAX_SFT_UPDATES = 2000
MAX_CPU_SFT_UPDATES = 60  # as in configs/gsm8k_smollm2_sft.yaml
MAX_TINY_SFT_UPDATES = 600  # of a model with random weights, as in configs/tiny_sft.yaml
MAX_DROPPED = 0.05  # share of the solutions; the default of `data.max_dropped`
GPU_EVAL_EVERY = 25  # rollouts
CPU_EVAL_EVERY = 6

DEFAULT_COMPLETION_TOKENS = 1024
MAX_COMPLETION_TOKENS = 4096
MIN_COMPLETION_TOKENS = 16
CPU_COMPLETION_TOKENS = 192  # as in configs/gsm8k_smollm2.yaml
SOLUTION_RATIO = 4  # a model that thinks writes more than a worked solution
CPU_SOLUTION_RATIO = 1.25  # after a cold start, completions are about as long as solutions
UNMEASURED_RATIO = 1.1  # the longest text of a set over the longest measured one
OUTLIER_RATIO = 2  # longer texts than this many times the 99th percentile are dropped


class LearningRates(NamedTuple):
    """The learning rates of models up to a size, as in configs/."""

    max_weights: float
    train: float
    sft: float


LEARNING_RATES = (
    LearningRates(20e6, train=1e-4, sft=1e-3),  # tiny.yaml
    LearningRates(400e6, train=1e-5, sft=1e-4),  # gsm8k_smollm2.yaml
    LearningRates(math.inf, train=1e-6, sft=2e-5),  # DeepSeekMath, TRL
)
LORA_RATIO = 10  # adapters need about ten times the learning rate


def learning_rate(shape: ModelShape, stage: str) -> float:
    """Returns the learning rate for a model of this size."""
    rates = next(rates for rates in LEARNING_RATES if shape.num_weights <= rates.max_weights)
    return rates.train if stage == "train" else rates.sft


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths in tokens of the measured problems. `solutions` is empty without worked solutions.

    Example: `Lengths(prompts=(57, 61), solutions=(102, 88))`.
    """

    prompts: tuple[int, ...]
    solutions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts on which the sizes depend."""

    data: DataFacts
    model: ModelFacts
    prompt: PromptChoice
    lengths: Lengths
    hardware: Hardware
    overrides: Overrides

    @property
    def on_gpu(self) -> bool:
        """Whether the run trains on GPUs."""
        return self.hardware.num_gpus > 0

    @property
    def are_all_measured(self) -> bool:
        """Whether the lengths are those of all training problems."""
        return len(self.data.problems) == self.data.num_training


def measure_lengths(
    data: DataFacts, model: ModelFacts, prompt: PromptChoice, overrides: Overrides
) -> Lengths:
    """Returns the lengths of prompts and solutions under the model's tokenizer.

    Raises:
        UserError: The prompt does not work with the tokenizer.
    """
    section = make_tree(prompt.settings, overrides)["prompt"]
    prompts = model.prompts(PromptSettings.model_validate(section))
    return Lengths(
        prompts=tuple(len(prompts.token_ids(problem)) for problem in data.problems),
        solutions=tuple(
            len(prompts.solution_ids(problem)) for problem in data.problems if problem.solution
        ),
    )


def percentile(lengths: Sequence[int], share: float) -> int:
    """Returns the smallest length that this share of the lengths does not exceed."""
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def round_up(number: float, multiple: int) -> int:
    """Returns the smallest multiple that is not below the number."""
    return math.ceil(number / multiple) * multiple


class Limit(NamedTuple):
    """A maximum length, and the number of measured texts above it."""

    tokens: int
    num_longer: int


def choose_limit(lengths: Sequence[int], *, all_measured: bool) -> Limit:
    """Returns a maximum length with room for all texts but outliers."""
    longest = max(lengths)
    longest = min(longest, OUTLIER_RATIO * percentile(lengths, 0.99))
    ratio = 1.0 if all_measured else UNMEASURED_RATIO
    tokens = round_up(ratio * longest, 32)
    return Limit(tokens, sum(length > tokens for length in lengths))


def prompt_settings(facts: Facts) -> list[Setting]:
    """Returns the section `prompt`."""
    lengths = facts.lengths.prompts
    limit = choose_limit(lengths, all_measured=facts.are_all_measured)
    comment = f"the longest of {facts.data.measured} has {max(lengths):,} tokens"
    if limit.num_longer:
        comment += f"; {limit.num_longer:,} longer ones are dropped"
    return [
        *facts.prompt.settings,
        Setting("prompt.max_tokens", limit.tokens, comment),
        Setting("prompt.overlong", "drop"),
    ]


def train_settings(facts: Facts) -> list[Setting]:
    """Returns the sections of `grpo train` but model, data, prompt and engine.

    Raises:
        UserError: The model's context has no room for completions.
    """
    data = facts.data
    settings = [_completion_setting(facts), Setting("sampling.temperature", 1.0)]
    if data.reward:
        rewards = {data.reward: 1.0}
        if facts.prompt.has_tags:
            rewards["format"] = 0.1
        settings.append(Setting("rewards", rewards, data.reward_reason))
    num_problems = CPU_PROBLEMS
    if facts.on_gpu:
        num_problems = max(GPU_PROBLEMS, PROBLEMS_PER_GPU * facts.hardware.num_gpus)
    num_problems = min(num_problems, data.num_training)
    group_size = facts.overrides.get("train.group_size", GROUP_SIZE)
    comment = f"{num_problems} x {group_size} = {num_problems * group_size:,} completions"
    return [
        *settings,
        Setting("train.rollouts", GPU_ROLLOUTS if facts.on_gpu else CPU_ROLLOUTS),
        Setting("train.problems", num_problems, comment),
        Setting("train.group_size", GROUP_SIZE),
        _lr_setting(facts.model, "train"),
        Setting("learner.betas", [0.9, 0.95]),
        Setting("learner.warmup_updates", 10 if facts.on_gpu else 2),
        *_eval_settings(facts),
        Setting("algorithm.preset", "grpo", "the recipe: docs/algorithms.md lists the others"),
        Setting("algorithm.mismatch", "tis", "corrects for the rounding of the engine"),
    ]


def _completion_setting(facts: Facts) -> Setting:
    key = "sampling.max_tokens"
    solutions = facts.lengths.solutions
    if not solutions and facts.on_gpu:
        comment = "a first guess: grpo doctor reports how many completions are cut off"
        return Setting(key, DEFAULT_COMPLETION_TOKENS, comment)
    if not solutions:
        return Setting(key, CPU_COMPLETION_TOKENS, "bounds the time of a rollout on a CPU")
    solution_tokens = percentile(solutions, 0.95)
    comment = f"95 % of the worked solutions have at most {solution_tokens:,}"
    if not facts.on_gpu:
        tokens = min(CPU_COMPLETION_TOKENS, round_up(CPU_SOLUTION_RATIO * solution_tokens, 32))
        return Setting(key, tokens, comment)
    tokens = round_up(SOLUTION_RATIO * solution_tokens, 512)
    tokens = min(MAX_COMPLETION_TOKENS, max(DEFAULT_COMPLETION_TOKENS, tokens))
    return Setting(key, tokens, f"{comment}; thoughts are longer")


def _lr_setting(model: ModelFacts, stage: str) -> Setting:
    comment = f"for a model of {model.num_weights} weights, as in configs/"
    return Setting("learner.lr", learning_rate(model.shape, stage), comment)


def _eval_settings(facts: Facts) -> list[Setting]:
    """Returns the sections `eval` and `checkpoint`."""
    data, overrides = facts.data, facts.overrides
    every = overrides.get("eval.every", GPU_EVAL_EVERY if facts.on_gpu else CPU_EVAL_EVERY)
    if data.num_held_out == 0 or every == 0:
        comment = f"no held-out problems: {data.no_held_out_reason}" if every else ""
        return [
            Setting("eval.every", 0, comment),
            Setting("checkpoint.every", every or GPU_EVAL_EVERY),
        ]
    num_problems = min(256 if facts.on_gpu else 64, data.num_held_out)
    settings = [
        Setting("eval.every", every),
        Setting("eval.problems", num_problems, f"of {data.num_held_out:,} held-out problems"),
        Setting("checkpoint.every", every),
    ]
    can_keep_best = overrides.get("checkpoint.every", every) % every == 0
    if data.reward and can_keep_best:
        comment = "also keeps the best checkpoint"
        settings.append(Setting("checkpoint.keep_best", f"eval/{data.reward}", comment))
    return settings


def sft_settings(facts: Facts) -> list[Setting]:
    """Returns the sections of `grpo sft` but model, data and prompt.

    Raises:
        UserError: The model's context is shorter than the solutions.
    """
    num_training = facts.data.num_training
    batch_size = min(32 if facts.on_gpu else 16, num_training)
    num_updates = min(math.ceil(SFT_EPOCHS * num_training / batch_size), _max_sft_updates(facts))
    epochs = num_updates * batch_size / num_training
    return [
        Setting("data.overlong", "drop"),
        Setting("sft.updates", num_updates, f"{epochs:.1f} passes over {num_training:,} problems"),
        Setting("sft.batch_size", batch_size),
        _solution_limit(facts),
        _lr_setting(facts.model, "sft"),
        Setting("learner.schedule", "cosine"),
        Setting("learner.min_lr_ratio", 0.1),
        Setting("learner.warmup_updates", max(1, num_updates // 20)),
        Setting("checkpoint.every", 100 if facts.on_gpu else 0),
    ]


def _max_sft_updates(facts: Facts) -> int:
    if facts.on_gpu:
        return MAX_SFT_UPDATES
    if facts.model.shape.num_weights <= LEARNING_RATES[0].max_weights:
        return MAX_TINY_SFT_UPDATES
    return MAX_CPU_SFT_UPDATES


def _solution_limit(facts: Facts) -> Setting:
    """Returns `sft.max_tokens`.

    Raises:
        UserError: The model's context is shorter than too many solutions.
    """
    data, lengths = facts.data, facts.lengths
    prompts_with_solution = [
        length
        for problem, length in zip(data.problems, lengths.prompts, strict=True)
        if problem.solution
    ]
    totals = [
        prompt_length + solution_length
        for prompt_length, solution_length in zip(
            prompts_with_solution, lengths.solutions, strict=True
        )
    ]
    max_tokens = choose_limit(totals, all_measured=facts.are_all_measured).tokens
    context_tokens = facts.model.context_tokens
    if context_tokens and not facts.overrides.has("model.rope"):
        max_tokens = min(max_tokens, context_tokens)
    num_longer = sum(total > max_tokens for total in totals)
    if num_longer > MAX_DROPPED * len(totals):
        raise UserError(
            f"--model: its context of {max_tokens:,} tokens is too short for {num_longer:,} of "
            f"{len(totals):,} solutions: choose a model with a longer context, or set model.rope"
        )
    comment = f"the longest prompt with its solution has {max(totals):,}"
    if num_longer:
        comment += f"; {num_longer:,} of {len(totals):,} are longer and dropped"
    return Setting("sft.max_tokens", max_tokens, comment)


def fit_context(settings: list[Setting], facts: Facts) -> list[Setting]:
    """Returns the settings with `sampling.max_tokens` lowered to the model's context.

    Raises:
        UserError: The prompts leave no room for completions.
    """
    context_tokens, overrides = facts.model.context_tokens, facts.overrides
    if context_tokens is None or overrides.has("model.rope"):
        return settings
    tree = make_tree(settings, overrides)
    prompt_tokens = tree["prompt"]["max_tokens"]
    room = context_tokens - prompt_tokens
    if room < MIN_COMPLETION_TOKENS:
        raise UserError(
            f"prompt.max_tokens={prompt_tokens:,} leaves no room for completions in the model's "
            f"context of {context_tokens:,} tokens: choose a model with a longer context, or "
            "shorter problems (add prompt.max_tokens=N)"
        )
    if tree["sampling"]["max_tokens"] <= room:
        return settings
    if overrides.has("sampling.max_tokens"):
        raise UserError(
            f"sampling.max_tokens={tree['sampling']['max_tokens']:,} with prompts of up to "
            f"{prompt_tokens:,} tokens exceeds the model's context of {context_tokens:,} tokens: "
            f"set it to {room:,} or less, or set model.rope"
        )
    comment = f"what the context of {context_tokens:,} tokens leaves after the prompt"
    return [*settings, Setting("sampling.max_tokens", room, comment)]
