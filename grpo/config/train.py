"""The config of `grpo train`, the bases of all commands' configs, and how a config is loaded."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from grpo.config.algorithm import SAMPLER_LOSSES, AlgorithmSettings
from grpo.config.model import ModelSettings
from grpo.config.presets import apply_preset
from grpo.config.reading import Section, apply_overrides, did_you_mean, explain, read_yaml
from grpo.config.secrets import find_secrets
from grpo.config.sections import (
    CheckpointSettings,
    DataSettings,
    EngineSettings,
    EvalSettings,
    LearnerSettings,
    LoggingSettings,
    ProbeSettings,
    PromptSettings,
    RewardEntry,
    RewardPoolSettings,
    RewardSettings,
    SamplingSettings,
    TrainSettings,
)
from grpo.types import UserError

# Losses whose ratio is that of a complete sequence.
SEQUENCE_LOSSES = ("gspo", "gmpo")


class RunConfig(Section):
    """The keys that the configs of all commands except `grpo pipeline` have."""

    # The command trains on given texts and samples nothing from the model while it trains.
    is_supervised: ClassVar[bool] = False
    # Section `eval` determines the result of the run, so it cannot change on a resume.
    is_evaluation: ClassVar[bool] = False

    run_dir: str = Field(
        description="Directory of the run, with its metrics, samples, checkpoints and final model."
    )
    seed: int = Field(0, ge=0, description="Seed from which all random choices are derived.")
    model: ModelSettings = Field(description="The model: source, precision and trainable weights.")
    data: DataSettings = Field(description="The problems.")
    prompt: PromptSettings = Field(PromptSettings(), description="How a problem becomes a prompt.")
    learner: LearnerSettings = Field(
        LearnerSettings(), description="Optimizer, learning rate schedule, memory and parallelism."
    )
    checkpoint: CheckpointSettings = Field(
        CheckpointSettings(), description="When checkpoints are written and which are kept."
    )
    logging: LoggingSettings = Field(
        LoggingSettings(),
        description="Trackers, progress output, data for `grpo replay`, and alarms.",
    )

    @property
    def length_keys(self) -> str:
        """The keys that determine the maximum length of a sequence, for error messages."""
        return "prompt.max_tokens + sampling.max_tokens"

    @model_validator(mode="after")
    def _check_model_and_learner(self) -> RunConfig:
        zero_stage = self.learner.zero_stage
        if self.model.dtype == "bfloat16" and zero_stage == 0:
            raise ValueError(
                "learner.zero_stage=0 keeps no float32 master weights, which model.dtype=bfloat16 "
                "needs: set learner.zero_stage to 1, 2 or 3, or model.dtype=float32"
            )
        if self.model.lora and zero_stage == 3:
            raise ValueError(
                "model.lora does not support learner.zero_stage=3, which splits the adapters: set "
                "it to 2 or less"
            )
        if self.model.qat and (self.model.lora or not self.is_supervised):
            raise ValueError(
                "model.qat is for `grpo sft`, and for `grpo distill` with way sequence or soft, "
                "without model.lora"
            )
        if self.learner.offload_optimizer and zero_stage == 0:
            raise ValueError(
                "learner.offload_optimizer does not support learner.zero_stage=0: set it to 1, 2 "
                "or 3"
            )
        return self

    @property
    def max_wait_s(self) -> float:
        """Maximum time in seconds that a rank waits for another one, which may be in an update."""
        return self.learner.timeout_s


def set_length_options(rewards: dict[str, RewardSettings], max_tokens: int) -> None:
    """Sets the options of the reward `length` if it is one of the rewards and has none.

    Args:
        rewards: The rewards by name.
        max_tokens: Maximum length of a completion in tokens.
    """
    length_reward = rewards.get("length")
    if length_reward is not None and not length_reward.options:
        # As in DAPO, the penalty starts in the last fifth of the maximum length.
        length_reward.options["max_tokens"] = max_tokens
        length_reward.options["buffer"] = max(1, max_tokens // 5)


class SamplingStageConfig(RunConfig):
    """The keys that the configs of all commands that sample and score completions have."""

    sampling: SamplingSettings = Field(
        SamplingSettings(), description="How completions are sampled."
    )
    rewards: dict[str, RewardEntry] = Field(
        {"accuracy": RewardSettings(), "format": RewardSettings(weight=0.1)},
        description="Rewards by name, a file in `rewards/`, `module:function` or "
        "`path/to/file.py:function`: the weight alone, or `{weight: ..., options: {...}}`.",
    )
    reward_pool: RewardPoolSettings = Field(
        RewardPoolSettings(),
        description="Worker processes of the rewards that have a time limit, and the share of "
        "completions on which rewards may fail.",
    )
    engine: EngineSettings = Field(
        EngineSettings(), description="The vLLM engine: precision, memory, batch size and servers."
    )

    @model_validator(mode="after")
    def _check_rewards(self) -> SamplingStageConfig:
        """Sets the default options of reward `length`. Raises ValueError without any reward."""
        set_length_options(self.rewards, self.sampling.max_tokens)
        if not self.rewards:
            raise ValueError(
                "rewards is empty: nothing can be learned. Set for example "
                "rewards={accuracy: 1.0, format: 0.1}"
            )
        return self

    def rewards_of_samples(self, name: str) -> dict[str, RewardSettings]:
        """Returns the rewards that score the completions in `samples/NAME.jsonl`."""
        return self.rewards

    @property
    def max_sequence_tokens(self) -> int:
        """Maximum length of a sequence in tokens: a prompt and its completion."""
        return self.prompt.max_tokens + self.sampling.max_tokens

    @property
    def max_wait_s(self) -> float:
        """Maximum time in seconds that a rank waits for another one.

        The other one may be in an update, or may itself wait for an engine.
        """
        engine_wait_s = self.engine.timeout_s + 60
        if self.engine.servers:
            engine_wait_s += 2 * self.engine.servers.sync_timeout_s + 60
        return max(self.learner.timeout_s, engine_wait_s)


class TrainConfig(SamplingStageConfig):
    """The config of `grpo train`."""

    algorithm: AlgorithmSettings = Field(
        AlgorithmSettings(), description="The recipe: advantage, loss, reduction, KL and filters."
    )
    train: TrainSettings = Field(
        description="Number and size of rollouts, and their split into updates."
    )
    probe: ProbeSettings = Field(
        ProbeSettings(), description="Checks that engine and learner have the same weights."
    )
    eval: EvalSettings = Field(EvalSettings(), description="Evaluation on held-out problems.")

    @property
    def total_updates(self) -> int:
        """Number of optimizer updates over which the learning rate is scheduled."""
        return self.train.total_updates

    @property
    def max_undecided(self) -> float:
        """Share of undecided completions in a rollout above which the run stops."""
        if self.algorithm.advantage == "teacher":
            return 1.0  # The rewards are only metrics.
        return self.reward_pool.max_failed

    @property
    def has_tokens_of_older_weights(self) -> bool:
        """Whether an update may contain tokens that earlier weights have sampled.

        Asynchronous rollouts have such tokens, and so have groups that dynamic sampling carries
        over. Without a mismatch correction, their pi_old is that of the sampler.
        """
        return self.train.max_staleness > 0 or self.algorithm.no_signal == "resample"

    @property
    def max_teacher_tokens(self) -> int:
        """Maximum length in tokens of a sequence that a teacher reads, which may have a hint."""
        if self.algorithm.teacher_hint == "none":
            return self.max_sequence_tokens
        return self.max_sequence_tokens + self.algorithm.teacher_hint_tokens

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the learner's log-probabilities: that of the sampler."""
        return self.sampling.temperature

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return apply_preset(tree)

    # One validator for all checks, because EvalConfig replaces it as a unit.
    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        self._check_reference_model()
        self.model.check_sequence_parallel(self.learner.sequence_parallel)
        if self.model.float32_head and self.learner.zero_stage == 3:
            raise ValueError(
                "model.float32_head (set by the presets cispo and scalerl) does not support "
                "learner.zero_stage=3, which splits the head: set learner.zero_stage to 2 or less, "
                "or model.float32_head=false"
            )
        self._check_truncated_sampling()
        self._check_sequence_length()
        if self.train.max_staleness and not self.engine.servers:
            raise ValueError(
                "train.max_staleness needs servers, which accept new weights while they sample: "
                "set engine.servers={count: 1}"
            )
        self._check_keep_best()
        return self

    def _check_reference_model(self) -> None:
        """Raises ValueError if the settings of KL, reference reset and teacher conflict."""
        if self.algorithm.reference_reset and self.algorithm.kl_coef:
            if self.model.lora:
                raise ValueError(
                    "algorithm.reference_reset does not support model.lora, whose reference is the "
                    "model without adapters: remove one of them"
                )
            if self.model.all_teachers:
                raise ValueError(
                    "algorithm.reference_reset would overwrite model.teacher: set it to 0"
                )
        self._check_teachers_of_data_sets()
        has_signal = self.algorithm.teacher_weight > 0
        has_teacher = bool(self.model.all_teachers) or self.algorithm.teacher_hint != "none"
        if has_signal and not has_teacher:
            setting = "advantage=teacher (preset on_policy_distill)"
            if self.algorithm.teacher_coef:
                setting = f"teacher_coef={self.algorithm.teacher_coef:g}"
            raise ValueError(
                f"algorithm.{setting} needs model.teacher: set it to the path of a model, or let "
                "the policy teach itself with algorithm.teacher_hint=solution"
            )
        if self.algorithm.teacher_hint != "none" and self.learner.sequence_parallel > 1:
            raise ValueError(
                "algorithm.teacher_hint does not support learner.sequence_parallel: the prompts of "
                "policy and teacher are split differently. Set learner.sequence_parallel=1"
            )
        if self.model.all_teachers and not has_signal and not self.algorithm.kl_coef:
            raise ValueError(
                "model.teacher has no effect without algorithm.advantage=teacher (preset "
                "on_policy_distill), algorithm.teacher_coef or algorithm.kl_coef: set one of them, "
                "or remove it"
            )

    def _check_teachers_of_data_sets(self) -> None:
        """Raises ValueError if a teacher's data set is unknown, or a data set has no teacher."""
        teachers = self.model.teachers
        if not teachers:
            return
        data_sets = list(self.data.data_sets)
        for name in teachers:
            if name not in data_sets:
                raise ValueError(
                    f"model.teachers.{name}: no such data set{did_you_mean(name, data_sets)}. "
                    f"Available: {', '.join(data_sets)}"
                )
        missing = [name for name in data_sets if name not in teachers]
        if missing and not self.model.teacher:
            raise ValueError(
                f"model.teachers: no teacher for the data set {', '.join(missing)}: add one, or "
                "set model.teacher, which teaches all data sets without one"
            )

    def _check_truncated_sampling(self) -> None:
        """Raises ValueError if truncated sampling spoils the ratios of the recipe.

        With `top_p` or `top_k`, the engine's probabilities are normalized over the tokens that it
        may sample, and the learner's over all tokens. The ratio of a token is too small by up to
        top_p, and the errors of a completion's tokens multiply.
        """
        if not self.sampling.is_truncated:
            return
        algorithm = self.algorithm
        if algorithm.loss in SAMPLER_LOSSES:
            setting, alternative = f"loss={algorithm.loss}", "preset=cispo"
        elif algorithm.old_logprobs == "sampler":
            setting, alternative = "old_logprobs=sampler", "old_logprobs=learner"
        elif algorithm.mismatch.uses_sequence_ratio:
            setting, alternative = f"mismatch={algorithm.mismatch}", "mismatch=tis"
        elif (
            algorithm.loss in SEQUENCE_LOSSES
            and self.has_tokens_of_older_weights
            and algorithm.mismatch.is_none
        ):
            setting, alternative = f"loss={algorithm.loss} without a correction", "mismatch=tis"
        else:
            return
        raise ValueError(
            f"algorithm.{setting} (preset={algorithm.preset}) does not support "
            f"sampling.top_p={self.sampling.top_p:g} and top_k={self.sampling.top_k}: the engine's "
            "probabilities are those of the tokens that it may sample, the learner's of all "
            "tokens, and the error of their ratio grows with every token. Set top_p=1 and top_k=0, "
            f"or algorithm.{alternative}"
        )

    def _check_sequence_length(self) -> None:
        """Raises ValueError if the longest sequence is too short or too long."""
        max_tokens = self.max_sequence_tokens
        if self.probe.tokens >= max_tokens:
            raise ValueError(
                f"probe.tokens={self.probe.tokens} leaves no room for a prompt in sequences of "
                f"{max_tokens} tokens (prompt.max_tokens + sampling.max_tokens): lower it"
            )
        if max_tokens > self.learner.micro_batch_tokens:
            raise ValueError(
                f"a sequence can have prompt.max_tokens + sampling.max_tokens = {max_tokens} "
                "tokens, more than "
                f"learner.micro_batch_tokens={self.learner.micro_batch_tokens}: raise "
                "learner.micro_batch_tokens, or shorten the sequences"
            )

    def _check_keep_best(self) -> None:
        """Raises ValueError if a checkpoint may have no value of the metric that ranks it."""
        metric = self.checkpoint.keep_best
        if not metric or not metric.startswith("eval/"):
            return
        every = self.checkpoint.every
        if not self.eval.every or every % self.eval.every:
            raise ValueError(
                f"checkpoint.keep_best={metric}: checkpoint.every={every} must be a multiple of "
                f"eval.every={self.eval.every}"
            )


ConfigT = TypeVar("ConfigT", bound=Section)


def load(
    path: str,
    overrides: list[str] | None = None,
    kind: type[ConfigT] = TrainConfig,  # type: ignore[assignment]
) -> ConfigT:
    """Returns the validated config in a YAML file.

    Args:
        path: The YAML file.
        overrides: Assignments that replace values of the file, e.g. `["train.rollouts=5"]`.
        kind: The class of the config, which depends on the command.

    Raises:
        UserError: The file, an override or the config is invalid. The message has one line and
            names the keys.
    """
    tree = apply_overrides(read_yaml(path), overrides or [])
    return parse(tree, path, kind)


def parse(
    tree: dict[str, Any],
    where: str = "config",
    kind: type[ConfigT] = TrainConfig,  # type: ignore[assignment]
) -> ConfigT:
    """Returns the validated config of a tree.

    Args:
        tree: The config as nested dicts.
        where: The source of the tree, for error messages.
        kind: The class of the config, which depends on the command.

    Raises:
        UserError: The config is invalid, or contains a secret. The message names every unknown key,
            with the most similar valid one, and every invalid value.
    """
    for message in find_secrets(tree):
        raise UserError(f"{where}: {message}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        messages = [explain(each, kind) for each in error.errors()]
        raise UserError(f"{where}: {'; '.join(messages)}") from None


def dump(config: RunConfig) -> str:
    """Returns the resolved config as YAML, with the defaults of all keys."""
    tree = config.model_dump(mode="json")
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))
