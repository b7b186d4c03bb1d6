"""The config of `grpo train`, what all commands' configs share, and how a config is loaded."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from grpo.config.algorithm import Algorithm
from grpo.config.model import Model
from grpo.config.presets import fill
from grpo.config.reading import Section, apply_overrides, explain, read_yaml
from grpo.config.sections import (
    Checkpoint,
    Data,
    Engine,
    Eval,
    Learner,
    Logging,
    Probe,
    Prompt,
    Reward,
    RewardEntry,
    RewardPool,
    Sampling,
    Train,
)
from grpo.types import UserError


class RunConfig(Section):
    """What every stage's config has."""

    supervised: ClassVar[bool] = False  # learns from texts, and nothing samples from it meanwhile
    evaluation_only: ClassVar[bool] = False  # the section `eval` decides the result of the run
    run_dir: str
    seed: int = Field(0, ge=0)
    model: Model
    data: Data
    prompt: Prompt = Prompt()
    learner: Learner = Learner()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _precision(self) -> RunConfig:
        if self.model.dtype == "bfloat16" and self.learner.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage=0 keeps no float32 master weights: use zero_stage=1 or more, "
                "or model.dtype=float32"
            )
        if self.model.lora and self.learner.zero_stage == 3:
            raise ValueError("model.lora needs whole adapters: use learner.zero_stage 2 or less")
        if self.model.qat and (self.model.lora or not self.supervised):
            raise ValueError(
                "model.qat is for grpo sft, and for grpo distill by way=sequence or soft, without "
                "LoRA"
            )
        if self.learner.offload_optimizer and self.learner.zero_stage == 0:
            raise ValueError("learner.offload_optimizer needs learner.zero_stage 1, 2 or 3")
        return self

    @property
    def longest_wait_s(self) -> float:
        """Longest time in seconds that a rank waits for another, which may be in an update."""
        return self.learner.timeout_s


class SampledConfig(RunConfig):
    """What the stages have that sample and judge."""

    sampling: Sampling = Sampling()
    rewards: dict[str, RewardEntry] = {
        "accuracy": Reward(),
        "format": Reward(weight=0.1),
    }  # by file in rewards/
    reward_pool: RewardPool = RewardPool()
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _rewards(self) -> SampledConfig:
        length = self.rewards.get("length")
        if length is not None and not length.options:  # DAPO's shares
            length.options["max_tokens"] = self.sampling.max_tokens
            length.options["buffer"] = max(1, self.sampling.max_tokens // 5)
        if not self.rewards:
            raise ValueError(
                "rewards is empty: nothing can be learned; try rewards={accuracy: 1.0, format: 0.1}"
            )
        return self

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence in tokens: a prompt and its completion."""
        return self.prompt.max_tokens + self.sampling.max_tokens

    @property
    def longest_wait_s(self) -> float:
        """Longest time in seconds that a rank waits for another.

        The other rank may be in an update, or wait for an engine.
        """
        engine_wait_s = self.engine.timeout_s + 60
        if self.engine.servers:
            engine_wait_s += 2 * self.engine.servers.sync_timeout_s + 60
        return max(self.learner.timeout_s, engine_wait_s)


class Config(SampledConfig):
    """`grpo train`."""

    algorithm: Algorithm = Algorithm()
    train: Train
    probe: Probe = Probe()
    eval: Eval = Eval()

    @property
    def total_updates(self) -> int:
        """Optimizer updates over which the learning rate is scheduled."""
        return self.train.total_updates

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, tree: Any) -> Any:
        return fill(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.algorithm.reference_reset and self.algorithm.kl_coef and self.model.lora:
            raise ValueError(
                "algorithm.reference_reset: with LoRA the reference is the model under it; train "
                "all weights instead"
            )
        if self.algorithm.reference_reset and self.algorithm.kl_coef and self.model.teacher:
            raise ValueError("algorithm.reference_reset would overwrite model.teacher: set it to 0")
        asked = self.algorithm.advantage == "teacher"
        if (asked and not self.model.teacher) or (
            self.model.teacher and not asked and not self.algorithm.kl_coef
        ):
            raise ValueError(
                "model.teacher and algorithm.advantage=teacher (preset on_policy_distill) go "
                "together"
            )
        self.model.check_shared(self.learner.sequence_parallel)
        if self.model.float32_head and self.learner.zero_stage == 3:
            raise ValueError(
                "model.float32_head needs the head whole: use learner.zero_stage 2 or less"
            )
        if self.probe.tokens >= self.max_sequence_tokens:
            raise ValueError(
                f"probe.tokens={self.probe.tokens}: no room for a prompt in sequences of "
                f"{self.max_sequence_tokens} tokens"
            )
        if self.max_sequence_tokens > self.learner.micro_batch_tokens:
            raise ValueError(
                "one sequence can have prompt.max_tokens + sampling.max_tokens = "
                f"{self.max_sequence_tokens} tokens, more than "
                f"learner.micro_batch_tokens={self.learner.micro_batch_tokens}: raise it, or "
                "shorten the sequences"
            )
        if self.train.max_staleness and not self.engine.servers:
            raise ValueError(
                "train.max_staleness needs servers, whose weights change while they sample: "
                "engine.servers={count: 1}"
            )
        best, every = self.checkpoint.keep_best, self.checkpoint.every
        if best and best.startswith("eval/") and (not self.eval.every or every % self.eval.every):
            raise ValueError(
                f"checkpoint.keep_best={best}: checkpoint.every={every} must be a multiple of "
                f"eval.every={self.eval.every}"
            )
        return self


C = TypeVar("C", bound=Section)


def load(path: str, overrides: list[str] | None = None, kind: type[C] = Config) -> C:  # type: ignore[assignment]
    """Returns the checked config of a YAML file with `key.sub=value` overrides.

    Raises UserError with the way out.
    """
    return parse(apply_overrides(read_yaml(path), overrides or []), path, kind)


def parse(tree: dict[str, Any], where: str = "config", kind: type[C] = Config) -> C:  # type: ignore[assignment]
    """Returns the checked config of a plain tree.

    Raises UserError naming every wrong key, the nearest right one, and each wrong value.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{where}: " + "; ".join(explain(e, kind) for e in error.errors())
        ) from None


def dump(config: RunConfig) -> str:
    """Returns the resolved config as YAML, every key present."""
    tree = config.model_dump(mode="json")
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))
