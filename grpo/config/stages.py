"""The configs of the commands around `grpo train`, and the sections that only they have.

The commands are sft, collect, distill, eval, quantize and pipeline.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from grpo.config.algorithm import AlgorithmSettings
from grpo.config.reading import Section
from grpo.config.sections import (
    DROP_KEYS,
    CheckpointSettings,
    DataSetSettings,
    DataSettings,
    EvalSettings,
    LearnerSettings,
    PromptSettings,
    RewardEntry,
    RewardSettings,
    SamplingSettings,
    TrainSettings,
)
from grpo.config.train import RunConfig, SamplingStageConfig, TrainConfig, set_length_options

R1_MAX_TOKENS = 32768  # length of completions in DeepSeek-R1's evaluation


class SftSettings(Section):
    """Supervised fine-tuning: number and size of updates, maximum length, early stop."""

    updates: int = Field(ge=1, description="Number of optimizer updates.")
    batch_size: int = Field(32, ge=1, description="Number of solutions per update.")
    max_tokens: int = Field(
        1024, ge=2, description="Maximum length in tokens of a prompt with its solution."
    )
    stop_at: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Stop early when the token accuracy, averaged over the last 10 updates, "
        "reaches this share. Default: run all updates.",
    )


def _check_fits_micro_batch(key: str, tokens: int, learner: LearnerSettings) -> None:
    """Raises ValueError if a sequence of `tokens`, the value of `key`, exceeds a micro-batch."""
    if tokens > learner.micro_batch_tokens:
        raise ValueError(
            f"a sequence can have {key}={tokens} tokens, more than "
            f"learner.micro_batch_tokens={learner.micro_batch_tokens}: raise "
            f"learner.micro_batch_tokens, or lower {key}"
        )


def _check_chat_prompt(key: str, prompt: PromptSettings) -> None:
    """Raises ValueError if prompts cannot be sent to the endpoint in `key` as chat messages."""
    if prompt.template != "chat" or prompt.think_prefill:
        raise ValueError(
            f"{key}: an endpoint receives prompts as chat messages. Set prompt.template=chat and "
            "prompt.think_prefill=false"
        )


class SftLearnerSettings(LearnerSettings):
    """The learner of supervised training: section `learner` with a larger learning rate."""

    lr: float = Field(2e-5, gt=0, description="Learning rate after the warmup. Default: TRL's.")


class SftConfig(RunConfig):
    """The config of `grpo sft`: supervised fine-tuning on the problems' worked solutions."""

    is_supervised: ClassVar[bool] = True
    sft: SftSettings = Field(description="Number and size of updates, maximum length, early stop.")
    learner: SftLearnerSettings = Field(
        SftLearnerSettings(),
        description="Optimizer, learning rate schedule, memory and parallelism.",
    )
    checkpoint: CheckpointSettings = Field(
        CheckpointSettings(every=100),
        description="When checkpoints are written and which are kept. Default: one every 100 "
        "updates.",
    )

    @model_validator(mode="after")
    def _check_supervised(self) -> SftConfig:
        if self.model.warm_start:
            raise ValueError("model.warm_start is for `grpo train` only: remove it")
        if self.model.all_teachers:
            raise ValueError("model.teacher is for `grpo train` and `grpo distill` only: remove it")
        self.model.check_sequence_parallel(self.learner.sequence_parallel)
        if self.learner.sequence_parallel > 1 and self.sft.stop_at is not None:
            raise ValueError(
                "sft.stop_at does not support learner.sequence_parallel: set sft.updates to the "
                "number of updates instead"
            )
        _check_fits_micro_batch("sft.max_tokens", self.sft.max_tokens, self.learner)
        return self

    @property
    def max_sequence_tokens(self) -> int:
        """Maximum length of a sequence in tokens: a prompt with its solution."""
        return self.sft.max_tokens

    @property
    def length_keys(self) -> str:
        """The keys that determine the maximum length of a sequence, for error messages."""
        return "sft.max_tokens"

    @property
    def algorithm(self) -> AlgorithmSettings:
        """The cross-entropy of the solution, for training with `learner.sequence_parallel`."""
        return AlgorithmSettings(loss="cross_entropy")

    @property
    def total_updates(self) -> int:
        """Number of optimizer updates over which the learning rate is scheduled."""
        return self.sft.updates

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the learner's log-probabilities."""
        return 1.0


class EndpointSettings(Section):
    """A model behind an OpenAI-compatible endpoint: a vLLM server or a service."""

    url: str = Field(description="Base URL of the endpoint, e.g. `http://localhost:8000/v1`.")
    model: str = Field(description="Name under which the endpoint serves the model.")
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the API key. Default: the key `none` is sent, "
        "for servers that need no key.",
    )
    concurrency: int = Field(32, ge=1, description="Maximum number of simultaneous requests.")
    timeout_s: float = Field(1800, gt=0, description="Maximum time in seconds per completion.")
    retries: int = Field(5, ge=0, description="Number of retries of a failed request.")


class CollectSettings(Section):
    """Rejection sampling: which problems are sampled, and which completions become traces."""

    problems: int = Field(
        ge=1, description="Number of different problems of the training split to sample."
    )
    samples: int = Field(4, ge=1, description="N: number of completions per problem.")
    keep: int = Field(
        1, ge=1, description="K: maximum number of traces per problem. The shortest are kept."
    )
    chunk: int = Field(
        64,
        ge=1,
        description="Number of problems that are sampled, scored and written together. A resumed "
        "run continues after the last written chunk.",
    )
    right: bool = Field(
        True,
        description="Keep right completions only. Set it to false to keep all, e.g. a student's "
        "own texts for soft targets.",
    )
    format: bool = Field(True, description="Keep well-formed completions only.")
    min_tokens: int = Field(1, ge=0, description="Minimum length of a trace in tokens.")
    max_tokens: int | None = Field(
        None, ge=1, description="Maximum length of a trace in tokens. Default: no limit."
    )
    language: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Minimum share of a trace's thoughts that is in the question's language.",
    )
    repetition: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Maximum share of a trace's 20-grams of words that repeat an earlier one.",
    )
    decontaminate: dict[str, DataSetSettings] = Field(
        {},
        description="Evaluation sets by name. A problem that shares `ngram` consecutive words with "
        "a problem of their test split is excluded.",
    )
    ngram: int = Field(
        10, ge=2, description="Number of consecutive words that count as an overlap. Default: R1."
    )


class CollectConfig(SamplingStageConfig):
    """The config of `grpo collect`: rejection sampling."""

    collect: CollectSettings = Field(
        description="Which problems are sampled, and which completions become traces."
    )
    teacher: EndpointSettings | None = Field(
        None,
        description="Endpoint that samples the completions. Default: `model.path` on an engine of "
        "the run.",
    )

    @model_validator(mode="after")
    def _check_sampler(self) -> CollectConfig:
        if self.model.all_teachers:
            raise ValueError(
                "model.teacher is for `grpo train` and `grpo distill` only: `grpo collect` samples "
                "from model.path, or from the endpoint teacher.url"
            )
        if self.teacher:
            _check_chat_prompt("teacher", self.prompt)
        return self


class SoftTargetSettings(Section):
    """Soft targets: the student learns the teacher's distribution at each token of given texts."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="Divergence at each token: `forward_kl` is KL(teacher || student), "
        "`reverse_kl` is KL(student || teacher), `jsd` is the generalized Jensen-Shannon "
        "divergence (GKD 2306.13649 Eq. 1).",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature T of both distributions. The divergence is multiplied by T^2 "
        "(Hinton 1503.02531).",
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="For divergence `jsd`: towards 0 it becomes the forward KL, towards 1 the "
        "reverse KL (GKD 2306.13649).",
    )
    soft_weight: float = Field(1.0, ge=0, description="Weight of the divergence.")
    hard_weight: float = Field(
        0.0, ge=0, description="Weight of the cross-entropy of the text's own tokens."
    )
    updates: int = Field(ge=1, description="Number of optimizer updates.")
    batch_size: int = Field(32, ge=1, description="Number of texts per update.")
    max_tokens: int = Field(
        1024, ge=2, description="Maximum length in tokens of a prompt with its text."
    )
    teacher_topk: int | None = Field(
        None,
        ge=1,
        description="Number k of the teacher's most likely tokens per position. vLLM computes "
        "them once, and they are stored on disk; all other tokens count as one. "
        "Default: the full distribution, with the teacher in memory.",
    )
    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared error between the student's projected hidden "
        "states and the teacher's (FitNets 1412.6550).",
    )
    hidden_layers: dict[int, int] = Field(
        {},
        description="Layers that are compared, `student layer: teacher layer`, counted from 1. "
        "Default: all layers of the student, evenly spaced in the teacher (TinyBERT 1909.10351).",
    )

    @model_validator(mode="after")
    def _check_stored_logprobs(self) -> SoftTargetSettings:
        if self.teacher_topk and (self.temperature != 1 or self.hidden_weight):
            raise ValueError(
                "teacher_topk needs temperature=1 and hidden_weight=0: the stored "
                "log-probabilities have temperature 1, and no hidden states are stored"
            )
        return self


ON_POLICY_LR = 1e-6  # default learning rate of `grpo distill` with way on_policy


class DistillConfig(SamplingStageConfig):
    """The config of `grpo distill`: `model` is the student, `model.teacher` the teacher."""

    # `way: on_policy` is not supervised, but `stage_configs` turns it into a config of grpo train.
    is_supervised: ClassVar[bool] = True
    way: Literal["sequence", "soft", "on_policy"] = Field(
        description="How the student learns: `sequence` fine-tunes it on the teacher's traces, "
        "`soft` matches the teacher's distribution on given texts, `on_policy` lets the teacher "
        "score the student's own completions."
    )
    soft: SoftTargetSettings | None = Field(
        None,
        description="For way soft: training on the solutions of `data`, which are worked solutions "
        "or the traces of `grpo collect`.",
    )
    collect: CollectSettings | None = Field(
        None, description="For way sequence: which completions of the teacher become traces."
    )
    sft: SftSettings | None = Field(
        None, description="For way sequence: the student's fine-tuning on these traces."
    )
    train: TrainSettings | None = Field(
        None,
        description="For way on_policy: the rollouts and updates of `grpo train`, with the preset "
        "`on_policy_distill` or `on_policy_distill_exact`.",
    )
    on_policy_divergence: Literal["sampled", "reverse_kl", "forward_kl", "jsd"] = Field(
        "sampled",
        description="For way on_policy: `algorithm.teacher_divergence` of `grpo train`. `sampled` "
        "compares the sampled tokens only, the others the complete distributions.",
    )
    eval: EvalSettings = Field(
        EvalSettings(), description="For way on_policy: evaluation on held-out problems."
    )
    learner: SftLearnerSettings = Field(
        SftLearnerSettings(),
        description="Optimizer, learning rate schedule, memory and parallelism. With way "
        "on_policy, the default of `lr` is 1e-6 (verl, slime, TRL); verl uses 1e-5 for 0.6B, "
        "Tinker 1e-4 for LoRA.",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_learning_rate_of_on_policy(cls, tree: Any) -> Any:
        """Sets the learning rate of way on_policy, which is RL, if the config does not set it."""
        if not isinstance(tree, dict) or tree.get("way") != "on_policy":
            return tree
        learner = tree.get("learner") or {}
        if not isinstance(learner, dict):
            return tree
        return {**tree, "learner": {"lr": ON_POLICY_LR, **learner}}

    @property
    def algorithm(self) -> AlgorithmSettings:
        """The loss that way soft adds to the divergence: the cross-entropy of the text."""
        return AlgorithmSettings(loss="cross_entropy")

    @model_validator(mode="after")
    def _check_way(self) -> DistillConfig:
        if self.model.warm_start:
            raise ValueError(
                "model.warm_start is for `grpo train` only: fine-tune the student first, and set "
                "model.path to the result"
            )
        if self.model.teachers and self.way != "on_policy":
            raise ValueError(
                f"model.teachers does not support way={self.way}: set model.teacher, or "
                "way=on_policy"
            )
        if not self.model.all_teachers:
            raise ValueError("model.teacher: missing. Set it to the path of a model")
        sections_of_way = {
            "sequence": ("collect", "sft"),
            "soft": ("soft",),
            "on_policy": ("train",),
        }
        if self.on_policy_divergence != "sampled" and self.way != "on_policy":
            raise ValueError(
                f"on_policy_divergence has no effect with way={self.way}: remove it, or set "
                "way=on_policy"
            )
        missing = [name for name in sections_of_way[self.way] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"way={self.way} needs the section {' and '.join(missing)}")
        if self.way == "sequence" and self.learner.sequence_parallel > 1:
            raise ValueError(
                "learner.sequence_parallel does not support way=sequence, which runs in a single "
                "process: run grpo collect, then grpo sft on its traces"
            )
        if self.soft:
            self.model.check_sequence_parallel(self.learner.sequence_parallel)
            _check_fits_micro_batch("soft.max_tokens", self.soft.max_tokens, self.learner)
        self.stage_configs()  # validates the configs of the stages
        return self

    def stage_configs(self) -> dict[str, RunConfig]:
        """Returns the configs of the stages that make up the way, by their folder in run_dir.

        Way sequence has the folders `collect` and `sft`. Way on_policy has one stage in run_dir
        itself, with the key "". Way soft has none.
        """
        tree = self.model_dump(mode="json")
        if self.way == "sequence":
            return {"collect": self._collect_config(tree), "sft": self._sft_config(tree)}
        if self.way == "on_policy":
            return {"": self._train_config(tree)}
        return {}

    def _collect_config(self, tree: dict[str, Any]) -> CollectConfig:
        """Returns the config that samples the teacher. `tree`: this config as nested dicts."""
        teacher_model = dict(tree["model"])
        teacher_model["path"] = self.model.teacher
        for key in ("teacher", "lora", "qat", "revision"):
            teacher_model[key] = None
        return CollectConfig(
            run_dir=f"{self.run_dir}/collect",
            model=teacher_model,
            # `malformed` and `overlong` are about the traces.
            data={**tree["data"], "malformed": "error", "overlong": "error"},
            collect=tree["collect"],
            **_only(tree, *_COMMON_KEYS, *_SAMPLING_KEYS),
        )

    def _sft_config(self, tree: dict[str, Any]) -> SftConfig:
        """Returns the config that fine-tunes the student on the collected traces."""
        return SftConfig(
            run_dir=f"{self.run_dir}/sft",
            model={**tree["model"], "teacher": None},
            data={
                "name": "traces",
                "path": f"{self.run_dir}/collect",
                **_only(tree["data"], *DROP_KEYS),
            },
            **_only(tree, "learner", "sft", *_COMMON_KEYS),
        )

    def _train_config(self, tree: dict[str, Any]) -> TrainConfig:
        """Returns the config that trains the student on its own completions."""
        algorithm = {"preset": "on_policy_distill"}
        if self.on_policy_divergence != "sampled":
            algorithm = {
                "preset": "on_policy_distill_exact",
                "teacher_divergence": self.on_policy_divergence,
            }
        return TrainConfig(
            algorithm=algorithm,
            **_only(tree, "run_dir", "model", "data", "learner", "train", "eval"),
            **_only(tree, *_COMMON_KEYS, *_SAMPLING_KEYS),
        )

    @property
    def max_sequence_tokens(self) -> int:
        """Maximum length of a sequence in tokens: a prompt with its completion or given text."""
        if self.way == "soft" and self.soft:
            return self.soft.max_tokens
        return super().max_sequence_tokens

    @property
    def length_keys(self) -> str:
        """The keys that determine the maximum length of a sequence, for error messages."""
        return "soft.max_tokens" if self.way == "soft" else super().length_keys

    @property
    def total_updates(self) -> int:
        """Optimizer updates of way soft."""
        assert self.soft is not None
        return self.soft.updates

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the learner's log-probabilities in way soft, which has no sampler."""
        return 1.0


# Keys that a distillation and each of its stages share, and those of the stages that sample.
_COMMON_KEYS = ("seed", "prompt", "checkpoint", "logging")
_SAMPLING_KEYS = ("sampling", "rewards", "reward_pool", "engine")


def _only(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: tree[key] for key in keys}


class EvalDataSettings(DataSettings):
    """The problems of an evaluation without `sets`, or with `path` alone the files of all sets."""

    @model_validator(mode="after")
    def _check_one_of_name_and_mixture(self) -> EvalDataSettings:
        if self.name and self.mixture:
            raise ValueError("set either name (one problem set) or mixture (several)")
        if self.options and not self.name:
            raise ValueError("options has no effect without name: set the options of each set")
        return self

    @property
    def has_problems(self) -> bool:
        """Whether the section names a problem set. If not, its path is for those of `sets`."""
        return bool(self.name or self.mixture)


class EvalSetSettings(DataSettings):
    """One set of an evaluation: its problems, and settings that replace those of the config."""

    rewards: dict[str, RewardEntry] | None = Field(
        None, description="Rewards of this set. Default: those of the config."
    )
    prompt: PromptSettings | None = Field(
        None,
        description="Keys of section `prompt` with another value for this set, e.g. `{system: "
        "...}`. All other keys have the values of the config.",
    )
    sampling: SamplingSettings | None = Field(
        None,
        description="Keys of section `sampling` with another value for this set, e.g. "
        "`{max_tokens: 512}`. All other keys have the values of the config.",
    )
    problems: int | None = Field(
        None,
        ge=1,
        description="Maximum number of problems of this set. Default: `eval.problems`.",
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="Number of completions per problem of this set. Default: `eval.samples`.",
    )


# Sections of which a set may change some keys.
_SET_SECTIONS = ("prompt", "sampling")
AVERAGE = "average"  # the last row of the table of several sets


class EvalConfig(TrainConfig):
    """The config of `grpo eval`: a train config, which may omit the sections for training.

    The evaluation uses its model, prompts, rewards and problems. A config of `grpo sft` is accepted
    too.
    """

    is_evaluation: ClassVar[bool] = True
    data: EvalDataSettings = Field(
        EvalDataSettings(),
        description="The problems of an evaluation without `sets`. With `sets`, `data: {path: "
        "FOLDER}` is the folder in which every set without a path finds its file.",
    )
    train: TrainSettings = Field(
        TrainSettings(rollouts=1),
        description="Not used by the evaluation. The section is allowed so that a train config can "
        "be evaluated without changes.",
    )
    sft: SftSettings | None = Field(
        None, description="Not used by the evaluation. Allowed for configs of `grpo sft`."
    )
    endpoint: EndpointSettings | None = Field(
        None,
        description="Endpoint with the model to evaluate. Default: `model.path` on an engine of "
        "the run.",
    )
    sets: dict[str, EvalSetSettings] = Field(
        {},
        description="Evaluation sets by name. Each can have its own rewards, prompt and limits. An "
        "empty value, `sets.NAME=`, removes a set. Default: one set, `eval.data` or the test split "
        "of `data`.",
    )
    chunk: int = Field(
        64,
        ge=1,
        description="Number of problems that are sampled, scored and written together. A resumed "
        "run continues after the last written chunk.",
    )
    price: float | None = Field(
        None,
        gt=0,
        description="Price of the machine per hour. The table then has the cost of each set.",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_sets(cls, tree: Any) -> Any:
        """Removes empty sets, and completes the sections of each set with those of the config.

        A dumped config has complete sections, so that it can be parsed again.
        """
        if not isinstance(tree, dict) or not isinstance(tree.get("sets"), dict):
            return tree
        sets = {}
        for name, settings in tree["sets"].items():
            if isinstance(settings, dict):
                sets[name] = _with_complete_sections(settings, tree)
            elif settings is not None:
                sets[name] = settings
        return {**tree, "sets": sets}

    @model_validator(mode="after")
    def _check_combinations(self) -> EvalConfig:
        """Replaces the checks of `TrainConfig`, which are about training."""
        if self.model.warm_start:
            raise ValueError(
                "model.warm_start: `grpo eval` evaluates model.path without training it. Set "
                "model.path=RUN, and model.warm_start= (empty)"
            )
        if self.endpoint:
            _check_chat_prompt("endpoint", self.prompt)
        if not self.sets:
            self._check_single_set()
        for name, settings in self.sets.items():
            self._check_set(name, settings)
        return self

    def _check_single_set(self) -> None:
        """Raises ValueError if an evaluation without `sets` has no held-out problems."""
        if not self.eval.data and not self.data.has_problems:
            raise ValueError(
                "no problems: set data.name, or sets, for example sets={math500: {name: math}}"
            )
        data = self.eval.data or self.data
        names = [source.name for source in data.data_sets.values()]
        if "traces" in names:
            raise ValueError(
                "data.traces has no test split, so these are the problems of the training: set the "
                "problems to evaluate on, for example eval.data={name: math}"
            )

    def _check_set(self, name: str, settings: EvalSetSettings) -> None:
        """Raises ValueError if a set is wrong. Sets the default options of its reward `length`."""
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", name):
            raise ValueError(
                f"sets.{name}: invalid name. A name starts with a letter, and has letters, "
                "digits, _ and . only"
            )
        if name == AVERAGE:
            raise ValueError(
                f"sets.{name}: this is the name of the table's last row: choose another name"
            )
        if settings.sampling and settings.sampling.temperature != self.sampling.temperature:
            raise ValueError(
                f"sets.{name}.sampling.temperature has no effect: evaluations use eval.temperature"
            )
        if settings.rewards is not None:
            if not settings.rewards:
                raise ValueError(f"sets.{name}.rewards is empty: set a reward, or remove the key")
            sampling = settings.sampling or self.sampling
            set_length_options(settings.rewards, sampling.max_tokens)
        if settings.prompt is not None:
            self._check_set_prompt(name, settings.prompt)
        num_samples = settings.samples or self.eval.samples
        if num_samples > 1 and self.eval.temperature == 0 and self.eval.protocol == "own":
            raise ValueError(
                f"sets.{name}.samples={num_samples} with eval.temperature=0: greedy completions "
                "are all the same. Set eval.temperature above 0"
            )

    def _check_set_prompt(self, name: str, prompt: PromptSettings) -> None:
        if prompt.chat_template != self.prompt.chat_template:
            raise ValueError(
                f"sets.{name}.prompt.chat_template: all sets have the same chat template: set "
                "prompt.chat_template"
            )
        if self.endpoint:
            _check_chat_prompt(f"sets.{name}: endpoint", prompt)

    @property
    def evaluation_sets(self) -> dict[str, DataSettings]:
        """The evaluation sets by name. A single set without a name has the name ""."""
        if not self.sets:
            return {"": self.eval.data or self.data}
        if self.data.has_problems:
            return dict(self.sets)
        return {
            name: settings.model_copy(update={"path": settings.path or self.data.path})
            for name, settings in self.sets.items()
        }

    def set_configs(self) -> dict[str, EvalConfig]:
        """Returns a config for each evaluation set, in which its settings are those of the config.

        The names are those of `evaluation_sets`.
        """
        if not self.sets:
            return {"": self}
        return {name: self._set_config(name) for name in self.sets}

    def _set_config(self, name: str) -> EvalConfig:
        settings = self.sets[name]
        changes: dict[str, Any] = {"sets": {name: settings}}
        for key in ("rewards", *_SET_SECTIONS):
            value = getattr(settings, key)
            if value is not None:
                changes[key] = value
        eval_changes = {
            "problems": settings.problems or self.eval.problems,
            "samples": settings.samples or self.eval.samples,
        }
        changes["eval"] = self.eval.model_copy(update=eval_changes)
        return self.model_copy(update=changes)

    def rewards_of_samples(self, name: str) -> dict[str, RewardSettings]:
        """Returns the rewards that score the completions in `samples/NAME.jsonl`.

        A file is `eval-SET.jsonl` or, before the set is finished, `part-SET-000000.jsonl`.
        """
        set_name = re.sub(r"^(eval|part)-|-\d{6}$", "", name)
        settings = self.sets.get(set_name)
        if settings is None or settings.rewards is None:
            return self.rewards
        return settings.rewards

    @property
    def max_sequence_tokens(self) -> int:
        """Maximum length of a sequence in tokens: a prompt and its completion, of any set."""
        if not self.sets:
            return super().max_sequence_tokens
        return max(self._max_tokens_of_set(settings) for settings in self.sets.values())

    def _max_tokens_of_set(self, settings: EvalSetSettings) -> int:
        prompt = settings.prompt or self.prompt
        sampling = settings.sampling or self.sampling
        return prompt.max_tokens + sampling.max_tokens

    @property
    def length_keys(self) -> str:
        """The keys that determine the maximum length of a sequence, for error messages."""
        if self.eval.protocol == "r1":
            return (
                f"prompt.max_tokens + {R1_MAX_TOKENS} (eval.protocol=r1; own has the limit of the "
                "config)"
            )
        if not self.sets:
            return super().length_keys
        longest = max(self.sets, key=lambda name: self._max_tokens_of_set(self.sets[name]))
        settings = self.sets[longest]
        prompt_section = f"sets.{longest}.prompt" if settings.prompt else "prompt"
        sampling_section = f"sets.{longest}.sampling" if settings.sampling else "sampling"
        return f"{prompt_section}.max_tokens + {sampling_section}.max_tokens"

    def with_protocol(self) -> EvalConfig:
        """Returns the config with the settings that `eval.protocol` prescribes for all sets.

        Source: DeepSeek-R1 2501.12948 section 3.
        """
        if self.eval.protocol == "own":
            return self
        sampling_changes: dict[str, Any] = {}
        eval_changes: dict[str, Any] = {"temperature": 0.0, "samples": 1}
        if self.eval.protocol == "r1":
            sampling_changes = {"max_tokens": R1_MAX_TOKENS, "top_p": 0.95}
            eval_changes = {"temperature": 0.6}
        sets = {}
        for name, settings in self.sets.items():
            set_changes: dict[str, Any] = {"samples": None}
            if settings.sampling is not None:
                set_changes["sampling"] = settings.sampling.model_copy(update=sampling_changes)
            sets[name] = settings.model_copy(update=set_changes)
        return self.model_copy(
            update={
                "sampling": self.sampling.model_copy(update=sampling_changes),
                "eval": self.eval.model_copy(update=eval_changes),
                "sets": sets,
            }
        )


def _with_complete_sections(settings: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a set's tree in which the keys of its sections are added to those of the config."""
    completed = dict(settings)
    for key in _SET_SECTIONS:
        section, common = settings.get(key), tree.get(key)
        if isinstance(section, dict) and isinstance(common, dict):
            completed[key] = {**common, **section}
    return completed


class QuantizeSettings(Section):
    """The quantization schemes that are written, and the group size of int4."""

    schemes: list[Literal["int8", "int8_tensor", "int4"]] = Field(
        ["int8", "int4"],
        min_length=1,
        description="Schemes to write. Weights share a scale per channel (`int8`), per tensor "
        "(`int8_tensor`) or per group (`int4`).",
    )
    group_size: int = Field(
        32, ge=2, description="Number of weights that share a scale, for scheme int4."
    )


class QuantizeConfig(SamplingStageConfig):
    """The config of `grpo quantize`: writes a finished model with fewer bits per weight."""

    quantize: QuantizeSettings = Field(
        QuantizeSettings(), description="Schemes to write, and the group size."
    )
    eval: EvalSettings | None = Field(
        None,
        description="Evaluate the model and each scheme on held-out problems, as `grpo eval` does. "
        "Default: no evaluation.",
    )

    @model_validator(mode="after")
    def _check_finished_model(self) -> QuantizeConfig:
        if self.model.warm_start or self.model.all_teachers or self.model.lora:
            raise ValueError(
                "`grpo quantize` needs a finished model: remove model.warm_start, model.teacher "
                "and model.lora"
            )
        self.evaluation_configs()  # validates the configs of the evaluations
        return self

    def evaluation_configs(self) -> dict[str, EvalConfig]:
        """Returns the configs of the evaluations by model: `parent`, then each scheme.

        The result is empty without section `eval`.
        """
        if self.eval is None:
            return {}
        evaluations = {"parent": self._evaluation("parent", self.model.path)}
        for scheme in self.quantize.schemes:
            evaluations[scheme] = self._evaluation(scheme, f"{self.run_dir}/{scheme}")
        return evaluations

    def _evaluation(self, name: str, path: str) -> EvalConfig:
        """Returns the config that evaluates the model at `path`: `parent` or a scheme."""
        tree = self.model_dump(mode="json", exclude={"quantize", "checkpoint", "learner"})
        tree["run_dir"] = f"{self.run_dir}/eval-{name}"
        tree["model"]["path"] = path
        if name != "parent":
            tree["model"]["rope"] = None  # already in the config of the quantized model
        if name == "int4":
            tree["engine"]["dtype"] = "bfloat16"  # vLLM's int4 kernels do not support float32
        return EvalConfig(**tree)


class PipelineStageSettings(Section):
    """One stage of a pipeline: a command, its config, and its inputs from earlier stages."""

    command: Literal["sft", "train", "collect", "distill", "quantize"] = Field(
        description="Command of the stage."
    )
    config: str = Field(description="YAML file with the command's config.")
    model: str | None = Field(
        None,
        description="Earlier stage from whose final model this stage starts. Default: the config's "
        "own `model.path`.",
    )
    traces: str | None = Field(
        None, description="Earlier `collect` stage whose traces this stage learns from."
    )
    teacher: str | None = Field(
        None, description="Earlier stage whose final model is the teacher of this stage."
    )
    teachers: dict[str, str] = Field(
        {},
        description="Earlier stages whose final models are the `model.teachers` of this stage, by "
        "data set: `{math: math_rl, code: code_rl}`.",
    )
    set: dict[str, Any] = Field(
        {}, description="Overrides of the config, e.g. `{train.rollouts: 5}`."
    )


class PipelineEvalSettings(Section):
    """One evaluation set of a pipeline, on which the model of each stage is evaluated."""

    config: str = Field(
        description="YAML file of a train config: its data, prompts, rewards and section `eval` "
        "are used."
    )
    set: dict[str, Any] = Field(
        {}, description="Overrides of the config, e.g. `{eval.problems: 400}`."
    )
    start: bool = Field(
        True, description="Also evaluate the model from which the first stage starts."
    )


class PipelineConfig(Section):
    """The config of `grpo pipeline`: runs stages in order and evaluates their models.

    Each stage has a folder in run_dir. One table has all models and all evaluation sets.
    """

    run_dir: str = Field(description="Directory of the pipeline, with a folder per stage.")
    seed: int = Field(0, ge=0, description="Seed of all stages and evaluations.")
    ranks: int = Field(
        1,
        ge=1,
        description="Number of learner ranks of the stages sft, train and distill, on this "
        "machine.",
    )
    stages: dict[str, PipelineStageSettings] = Field(
        min_length=1, description="Stages by name, in order."
    )
    eval: dict[str, PipelineEvalSettings] = Field({}, description="Evaluation sets by name.")

    @model_validator(mode="after")
    def _check_stages(self) -> PipelineConfig:
        earlier_stages: dict[str, PipelineStageSettings] = {}
        for name, stage in self.stages.items():
            _check_stage(name, stage, earlier_stages)
            earlier_stages[name] = stage
        return self


# For each input of a stage, the commands of the stages that can provide it.
_COMMANDS_OF_INPUTS = {
    "model": ("sft", "train", "distill"),
    "traces": ("collect",),
    "teacher": ("sft", "train", "distill"),
}


def _check_stage(
    name: str, stage: PipelineStageSettings, earlier_stages: dict[str, PipelineStageSettings]
) -> None:
    """Raises ValueError if a stage's name is invalid, or no earlier stage can provide an input."""
    is_reserved = name in ("start", "samples", "checkpoints")
    if is_reserved or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(
            f"stages.{name}: invalid name. The name becomes a folder: use letters, digits and _, "
            "but not start, samples or checkpoints"
        )
    if (stage.teacher or stage.teachers) and stage.command not in ("train", "distill"):
        raise ValueError(f"stages.{name}.teacher: `grpo {stage.command}` has no teacher: remove it")
    sources = [(key, key, getattr(stage, key)) for key in _COMMANDS_OF_INPUTS]
    sources += [
        (f"teachers.{data_set}", "teacher", source) for data_set, source in stage.teachers.items()
    ]
    for key, kind, source in sources:
        if source is None:
            continue
        commands = _COMMANDS_OF_INPUTS[kind]
        if source not in earlier_stages:
            available = ", ".join(earlier_stages) or "none"
            raise ValueError(
                f"stages.{name}.{key}={source}: not an earlier stage. Available: {available}"
            )
        command = earlier_stages[source].command
        if command not in commands:
            expected = " or ".join(f"`grpo {each}`" for each in commands)
            raise ValueError(
                f"stages.{name}.{key}={source}: that stage is a `grpo {command}`, expected "
                f"{expected}"
            )
