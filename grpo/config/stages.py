"""The configs of the stages around GRPO.

The stages are supervised fine-tuning, rejection sampling, distillation, evaluation, quantisation,
and the chain of them.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from grpo.config.algorithm import Algorithm
from grpo.config.reading import Section
from grpo.config.sections import Checkpoint, Data, Eval, Learner, Source, Train
from grpo.config.train import Config, RunConfig, SampledConfig
from grpo.run import ranks


class Sft(Section):
    """Supervised fine-tuning: updates, solutions per update, longest sequence, early stop."""

    updates: int = Field(ge=1)
    batch_size: int = Field(32, ge=1)  # solutions an update
    max_tokens: int = Field(1024, ge=2)  # longest prompt with its solution
    # token accuracy, mean of the last 10 updates, at which a cold start is enough
    stop_at: float | None = Field(None, gt=0, le=1)


def _check_fits(what: str, key: str, tokens: int, learner: Learner) -> None:
    if tokens > learner.micro_batch_tokens:
        raise ValueError(
            f"one {what} can have {key}={tokens} tokens, more than "
            f"learner.micro_batch_tokens={learner.micro_batch_tokens}: raise it, or lower {key}"
        )


class SftLearner(Learner):
    """The learner's settings with a learning rate for supervised training as default."""

    lr: float = Field(2e-5, gt=0)  # TRL's default


class SftConfig(RunConfig):
    """`grpo sft`: supervised fine-tuning on the problems' worked solutions."""

    supervised: ClassVar[bool] = True
    sft: Sft
    learner: SftLearner = SftLearner()
    checkpoint: Checkpoint = Checkpoint(every=100)

    @model_validator(mode="after")
    def _fits(self) -> SftConfig:
        if self.model.warm_start:
            raise ValueError("model.warm_start is for `grpo train`")
        if self.model.teacher:
            raise ValueError("model.teacher is for train and distill")
        if self.learner.sequence_parallel > 1:
            raise ValueError(
                "learner.sequence_parallel is for train and for distill's ways soft and on_policy"
            )
        _check_fits("solution", "sft.max_tokens", self.sft.max_tokens, self.learner)
        return self

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence in tokens: a prompt with its solution."""
        return self.sft.max_tokens

    @property
    def micro_batch(self) -> int:
        """Solutions in one forward and backward pass.

        It is the largest divisor of a rank's batch within `learner.micro_batch_tokens`.
        """
        most, own = (
            self.learner.micro_batch_tokens // self.sft.max_tokens,
            self.sft.batch_size // ranks.world_size(),
        )
        return max(n for n in range(1, own + 1) if own % n == 0 and n <= most)


class Teacher(Section):
    """A model behind an OpenAI-compatible endpoint: a vLLM server, or a service."""

    url: str  # e.g. http://localhost:8000/v1
    model: str  # as it is served
    api_key_env: str | None = None  # environment variable that holds the key
    concurrency: int = Field(32, ge=1)  # requests at once
    timeout_s: float = Field(1800, gt=0)  # of one completion
    retries: int = Field(5, ge=0)


class Collect(Section):
    """Rejection sampling: problems, completions per problem, and which of them become traces."""

    problems: int = Field(ge=1)  # of the training split, each once
    samples: int = Field(4, ge=1)  # N: completions a problem
    keep: int = Field(1, ge=1)  # K: traces a problem at most, the shortest first
    chunk: int = Field(64, ge=1)  # problems sampled and written down at once
    right: bool = True  # only right traces; false: all, e.g. a student's own texts for soft targets
    format: bool = True  # only well-formed traces
    min_tokens: int = Field(1, ge=0)  # length of a trace
    max_tokens: int | None = Field(None, ge=1)
    # least share of the thoughts in the question's language
    language: float = Field(0.0, ge=0, le=1)
    # most share of 20-grams of words that were there before
    repetition: float = Field(1.0, ge=0, le=1)
    # evaluation sets whose test problems must not be among the traces
    decontaminate: dict[str, Source] = {}
    ngram: int = Field(10, ge=2)  # words in a row that count as an overlap (R1: 10)


class CollectConfig(SampledConfig):
    """`grpo collect`: rejection sampling."""

    collect: Collect
    teacher: Teacher | None = None  # default: model.path on an engine of our own

    @model_validator(mode="after")
    def _asked(self) -> CollectConfig:
        if self.model.teacher:
            raise ValueError(
                "model.teacher is for train and distill: collect samples from model.path, or from "
                "teacher.url"
            )
        if self.teacher and (self.prompt.template != "chat" or self.prompt.think_prefill):
            raise ValueError(
                "teacher: an endpoint is asked by chat messages; set prompt.template=chat and no "
                "think_prefill"
            )
        return self


class Soft(Section):
    """Soft targets: the student learns the teacher's distribution at every token of given texts."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    # of both distributions; the divergence counts T^2 times (Hinton)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)  # jsd: 0 is forward, 1 reverse KL (GKD)
    soft_weight: float = Field(1.0, ge=0)
    hard_weight: float = Field(0.0, ge=0)  # of the cross-entropy of the text's own tokens
    updates: int = Field(ge=1)
    batch_size: int = Field(32, ge=1)  # texts an update
    max_tokens: int = Field(1024, ge=2)  # longest prompt with its text
    # teacher's k likeliest tokens and the rest as one, from vLLM, on disk; default: in memory
    teacher_topk: int | None = Field(None, ge=1)
    # of the mean squared error of projected hidden states (FitNets 1412.6550)
    hidden_weight: float = Field(0.0, ge=0)
    # student's layer: teacher's, from 1; default: evenly spread (TinyBERT 1909.10351)
    hidden_layers: dict[int, int] = {}

    @model_validator(mode="after")
    def _teacher(self) -> Soft:
        if self.teacher_topk and (self.temperature != 1 or self.hidden_weight):
            raise ValueError(
                "teacher_topk: what is on disk is for temperature=1 and has no hidden states"
            )
        return self


class DistillConfig(SampledConfig):
    """`grpo distill`: `model` is the student, `model.teacher` the teacher."""

    supervised: ClassVar[bool] = True  # but on_policy, whose part is a train config
    way: Literal["sequence", "soft", "on_policy"]
    # way soft: on the solutions of `data` (worked ones, or the traces of `grpo collect`)
    soft: Soft | None = None
    collect: Collect | None = None  # way sequence: what the teacher samples ...
    sft: Sft | None = None  # ... and how the student learns from it
    # way on_policy: GRPO's loop, the advantage is log pi_teacher - log pi
    train: Train | None = None
    eval: Eval = Eval()
    learner: SftLearner = SftLearner()

    @property
    def algorithm(self) -> Algorithm:
        """What a soft update has beside the divergence: cross-entropy of the text."""
        return Algorithm(loss="cross_entropy")

    @model_validator(mode="after")
    def _complete(self) -> DistillConfig:
        if self.model.warm_start:
            raise ValueError(
                "model.warm_start is for `grpo train`: fine-tune the student first and give its "
                "path"
            )
        if not self.model.teacher:
            raise ValueError("model.teacher: none given; give the path of a model")
        needed = {"sequence": ("collect", "sft"), "soft": ("soft",), "on_policy": ("train",)}[
            self.way
        ]
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"way={self.way} needs the section {' and '.join(missing)}")
        if self.soft:
            self.model.check_shared(self.learner.sequence_parallel)
            _check_fits("text", "soft.max_tokens", self.soft.max_tokens, self.learner)
        self.parts()
        return self

    def parts(self) -> dict[str, RunConfig]:
        """Returns the configs of the stages that a way is made of, by their folder in run_dir.

        The folder "" is run_dir itself. The way soft has no such stages.
        """
        tree = self.model_dump(mode="json")
        common = {key: tree[key] for key in ("seed", "prompt", "checkpoint", "logging", "data")}
        sampled = {key: tree[key] for key in ("sampling", "rewards", "reward_pool", "engine")}
        if self.way == "sequence":
            teacher = tree["model"] | {
                "path": self.model.teacher,
                "teacher": None,
                "lora": None,
                "qat": None,
                "revision": None,
            }
            student = {
                "model": tree["model"] | {"teacher": None},
                "learner": tree["learner"],
                "sft": tree["sft"],
            }
            traces = {"data": {"name": "traces", "path": f"{self.run_dir}/collect"}}
            return {
                "collect": CollectConfig(
                    run_dir=f"{self.run_dir}/collect",
                    model=teacher,
                    collect=tree["collect"],
                    **common,
                    **sampled,
                ),
                "sft": SftConfig(run_dir=f"{self.run_dir}/sft", **student, **common | traces),
            }
        if self.way == "soft":
            return {}
        rest = {key: tree[key] for key in ("run_dir", "model", "learner", "train", "eval")}
        return {"": Config(algorithm={"preset": "on_policy_distill"}, **rest, **common, **sampled)}

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence in tokens: a prompt with its text (way soft) or its completion."""
        return (
            self.soft.max_tokens
            if self.soft and self.way == "soft"
            else super().max_sequence_tokens
        )

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the way soft."""
        assert self.soft is not None
        return self.soft.updates


class EvalConfig(Config):
    """`grpo eval`: takes a train config, or one without the training.

    It uses the config's model, prompts, rewards and problems.
    """

    evaluation_only: ClassVar[bool] = True
    train: Train = Train(rollouts=1)
    # a model behind an OpenAI-compatible endpoint; default: model.path on an engine of our own
    endpoint: Teacher | None = None
    # evaluation sets by name; default: eval.data, or the test split of data
    sets: dict[str, Data] = {}
    chunk: int = Field(64, ge=1)  # problems sampled and written down at once

    @model_validator(mode="after")
    def _combinations(self) -> EvalConfig:
        """Instead of what a training needs."""
        if self.model.warm_start:
            raise ValueError(
                "grpo eval judges model.path as it is: give model.path=RUN, and model.warm_start= "
                "(nothing)"
            )
        if self.endpoint and (self.prompt.template != "chat" or self.prompt.think_prefill):
            raise ValueError(
                "endpoint: it is asked by chat messages; set prompt.template=chat and no "
                "think_prefill"
            )
        if bad := [name for name in self.sets if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", name)]:
            raise ValueError(
                f"sets.{bad[0]}: a set's name begins with a letter and has letters, digits, _ and "
                ". only"
            )
        return self

    @property
    def judged(self) -> dict[str, Data]:
        """The evaluation sets by name; "" for one that has none."""
        return self.sets or {"": self.eval.data or self.data}

    def by_protocol(self) -> EvalConfig:
        """Returns the config with what `eval.protocol` says in the place of its own.

        Source: DeepSeek-R1 2501.12948 section 3.
        """
        sampling: dict[str, Any] = {"r1": {"max_tokens": 32768, "top_p": 0.95}}.get(
            self.eval.protocol, {}
        )
        judged: dict[str, Any] = {
            "r1": {"temperature": 0.6},
            "greedy": {"temperature": 0.0, "samples": 1},
        }.get(self.eval.protocol, {})
        update = {
            "sampling": self.sampling.model_copy(update=sampling),
            "eval": self.eval.model_copy(update=judged),
        }
        return self.model_copy(update=update)


class Quantize(Section):
    """Quantisation: the schemes that are written, and how many weights share a scale in int4."""

    # weights a channel, a tensor, a group
    schemes: list[Literal["int8", "int8_tensor", "int4"]] = Field(["int8", "int4"], min_length=1)
    group_size: int = Field(32, ge=2)  # int4: weights that share a scale


class QuantizeConfig(SampledConfig):
    """`grpo quantize`: a finished model in fewer bits."""

    quantize: Quantize = Quantize()
    eval: Eval | None = None  # judges the model and every scheme, as `grpo eval` would

    @model_validator(mode="after")
    def _finished(self) -> QuantizeConfig:
        if self.model.warm_start or self.model.teacher or self.model.lora:
            raise ValueError(
                "grpo quantize takes a finished model: no model.warm_start, model.teacher or "
                "model.lora"
            )
        self.judged()
        return self

    def judged(self) -> dict[str, EvalConfig]:
        """Returns the evaluations by model: `parent`, then each scheme. None without `eval`."""
        if self.eval is None:
            return {}
        tree = self.model_dump(mode="json", exclude={"quantize", "checkpoint", "learner"})
        models = {"parent": self.model.path} | {
            scheme: f"{self.run_dir}/{scheme}" for scheme in self.quantize.schemes
        }
        found = {}
        for name, path in models.items():
            # its kernels know no float32
            engine = tree["engine"] | ({"dtype": "bfloat16"} if name == "int4" else {})
            # theirs have it in their config
            model = tree["model"] | {"path": path} | ({} if name == "parent" else {"rope": None})
            own = {"run_dir": f"{self.run_dir}/eval-{name}", "model": model, "engine": engine}
            found[name] = EvalConfig(**tree | own)
        return found


class Step(Section):
    """One stage of a pipeline: a command, its config, and what it takes from stages before it."""

    command: Literal["sft", "train", "collect", "distill", "quantize"]
    config: str  # YAML file of that command
    # stage whose final model this one starts from; default: the config's own
    model: str | None = None
    traces: str | None = None  # `collect` stage whose traces this one learns from
    teacher: str | None = None  # stage whose final model is the teacher
    set: dict[str, Any] = {}  # overrides: {train.rollouts: 5}


class Judged(Section):
    """How the model of every stage is judged."""

    config: str  # a train config: its data, prompts, rewards and eval section
    set: dict[str, Any] = {}
    start: bool = True  # the first stage's own model too


class PipelineConfig(Section):
    """`grpo pipeline`: runs stages in their order and evaluates their models.

    Each stage has a folder in run_dir. One table shows all models on all evaluation sets.
    """

    run_dir: str
    seed: int = Field(0, ge=0)
    ranks: int = Field(1, ge=1)  # learner ranks of sft, train and distill, on this machine
    stages: dict[str, Step] = Field(min_length=1)
    eval: dict[str, Judged] = {}  # evaluation sets by name

    @model_validator(mode="after")
    def _order(self) -> PipelineConfig:
        before: dict[str, Step] = {}
        for name, step in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in (
                "start",
                "samples",
                "checkpoints",
            ):
                raise ValueError(
                    f"stages.{name}: a stage's name is a folder's: letters, digits and _, not "
                    "start, samples or checkpoints"
                )
            if step.teacher and step.command not in ("train", "distill"):
                raise ValueError(f"stages.{name}.teacher: `grpo {step.command}` has none")
            for key in ("model", "traces", "teacher"):
                wanted = getattr(step, key)
                if wanted is not None and wanted not in before:
                    raise ValueError(
                        f"stages.{name}.{key}={wanted}: no stage of that name before it; have "
                        f"{', '.join(before) or 'none'}"
                    )
                if wanted is not None and (
                    (made := before[wanted].command) == "quantize"
                    or (made == "collect") != (key == "traces")
                ):
                    raise ValueError(f"stages.{name}.{key}={wanted}: that stage is a `grpo {made}`")
            before[name] = step
        return self
