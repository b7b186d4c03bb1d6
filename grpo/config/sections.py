"""The config sections that several commands share.

The other sections are in model.py (`model`), algorithm.py (`algorithm`) and stages.py (`sft`,
`collect`, `soft`, `quantize` and the sections of `grpo pipeline`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from grpo.config.reading import Section

# Fields of a problem that can have a column in a stored set.
ProblemField = Literal["question", "answer", "solution", "id", "source"]
Columns = dict[ProblemField, str | None]


class DataSetSettings(Section):
    """One problem set of a mixture. It is named as in `DataSettings.name`."""

    name: str | None = Field(
        None,
        description="Name of the problem set, as `data.name`. With it, a mixture can contain a set "
        "several times, for example `hub`; the ids of its problems then start with the name of "
        "the entry. Default: the name of this entry.",
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the mixture, relative to the weights of the other sets."
    )
    path: str | None = Field(
        None,
        description="Local file or directory with the set's problems, or for `hub` the id of a set "
        "on the hub. Default: `data.path`, or the hub if that is not set.",
    )
    split: str | None = Field(None, description="As `data.split`.")
    columns: Columns = Field({}, description="As `data.columns`.")
    options: dict[str, Any] = Field(
        {}, description="Keyword arguments of the set's `load` function."
    )


# Keys of `data` for problems that cannot be used.
DROP_KEYS = ("malformed", "overlong", "max_dropped")


class DataSettings(Section):
    """The problems: one problem set, or a weighted mixture of several."""

    name: str | None = Field(
        None,
        description="Name of a problem set: a file in `data/`, `module:function` or "
        "`path/to/file.py:function`. Set either `name` or `mixture`.",
    )
    options: dict[str, Any] = Field(
        {}, description="Keyword arguments of the `load` function of the set `name`."
    )
    mixture: dict[str, DataSetSettings] = Field(
        {}, description="Several problem sets by name, mixed by weight."
    )
    path: str | None = Field(
        None,
        description="Local file or directory with the files of all sets, or for `hub` the id of a "
        "set on the hub. Default: the hub.",
    )
    split: str | None = Field(
        None,
        description="Split of the stored set that is read, as the set calls it. For the set `hub`. "
        "`data.options.test_split` is the split for evaluations. Default: `train`, or the one "
        "of a published set.",
    )
    columns: Columns = Field(
        {},
        description="Columns of the stored set for the fields of a problem: `{question: prompt, "
        "answer: reward_model.ground_truth}`. A dotted path leads into nested values. null: no "
        "column. For the set `hub`. Default: those of a published set, or the usual names.",
    )
    malformed: Literal["error", "drop"] = Field(
        "error",
        description="Rows that cannot be read as a problem, and in supervised stages problems "
        "without a solution: `error` stops the command, `drop` skips and counts them. `drop` is "
        "for the sets `traces`, `jsonl` and `hub`. A line that is not JSON is always an error.",
    )
    overlong: Literal["error", "drop"] = Field(
        "error",
        description="Supervised stages: problems that are longer than the `max_tokens` of the "
        "stage with their solution: `error` stops the command, `drop` skips and counts them. "
        "`prompt.overlong` is for prompts.",
    )
    max_dropped: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Largest share of problems that `malformed` and `overlong` may each drop, of "
        "at least 200 problems. Above it, the command stops.",
    )
    curriculum: str | None = Field(
        None,
        description="Numeric field of the problems' `meta`. The first epoch of each set is sorted "
        "by it, smallest value first. Default: random order.",
    )

    @model_validator(mode="after")
    def _check_one_of_name_and_mixture(self) -> DataSettings:
        if bool(self.name) == bool(self.mixture):
            raise ValueError("set either name (one problem set) or mixture (several)")
        for key in ("options", "split", "columns"):
            if self.mixture and getattr(self, key):
                raise ValueError(
                    f"{key} has no effect with mixture: set mixture.NAME.{key} for each set"
                )
        return self

    @property
    def data_sets(self) -> dict[str, DataSetSettings]:
        """All problem sets, by the name of their entry, with their own name and path.

        A set without a path has that of the section.
        """
        sources = self.mixture
        if not sources:
            source = DataSetSettings(split=self.split, columns=self.columns, options=self.options)
            sources = {self.name or "": source}
        data_sets = {}
        for key, source in sources.items():
            update = {"name": source.name or key, "path": source.path or self.path}
            data_sets[key] = source.model_copy(update=update)
        return data_sets

    @property
    def shared_path(self) -> str | None:
        """The path, if other sections that have none can use it; not the path of a set `hub`."""
        return None if self.name == "hub" else self.path


class PromptSettings(Section):
    """How a problem becomes a prompt: template, system prompt, prefill, stop strings, length."""

    template: str = Field(
        "chat",
        description="Prompt template: `chat` (the tokenizer's), `r1_zero` (DeepSeek-R1, Table 1, "
        "for base models) or `plain` (the question and a line break).",
    )
    chat_template: str | None = Field(
        None,
        description="Jinja file with a chat template, for template `chat`. It replaces the "
        "tokenizer's, and is saved with the final model. Default: the tokenizer's.",
    )
    system: str | None = Field(
        None,
        description="System prompt, for template `chat` only. `r1` is a built-in prompt that "
        "requests the tags `<think>` and `<answer>`. Default: none.",
    )
    think_prefill: bool = Field(False, description="End the prompt with `<think>`.")
    stop: list[str] = Field(
        [],
        description="Stop strings in addition to the EOS token. Template `r1_zero` adds "
        "`</answer>`.",
    )
    max_tokens: int = Field(512, ge=1, description="Maximum length of a prompt in tokens.")
    overlong: Literal["error", "drop"] = Field(
        "error",
        description="Problems with a prompt of more than `max_tokens`: `error` stops the command, "
        "`drop` skips them.",
    )


class SamplingSettings(Section):
    """How completions are sampled: maximum length, temperature, top-p and top-k."""

    max_tokens: int = Field(1024, ge=1, description="Maximum length of a completion in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature. Default: R1-Zero (Nature 2025)."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the most likely tokens with this total "
        "probability. Below 1, the engine's probabilities are larger than the policy's: `grpo "
        "train` then supports neither a mismatch correction of whole sequences nor "
        "`algorithm.old_logprobs: sampler`.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Sample from this many most likely tokens. 0: from all tokens. Above 0, the "
        "same limits apply as with `top_p` below 1.",
    )
    ignore_eos: bool = Field(
        False, description="Always sample `max_tokens` tokens, past the EOS token. For benchmarks."
    )

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0


class RewardSettings(Section):
    """The weight and the options of one reward.

    A config gives the weight alone, `accuracy: 1.0`, or both, `length: {weight: 0.5, options:
    {max_tokens: 4096, buffer: 1024}}`.
    """

    weight: float = Field(1.0, description="Weight of the reward in the sum of all rewards.")
    options: dict[str, Any] = Field({}, description="Keyword arguments of the reward function.")


def _expand_weight(value: Any) -> Any:
    """Returns `{"weight": value}` for a number, and any other value unchanged."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"weight": value}
    return value


RewardEntry = Annotated[
    RewardSettings, BeforeValidator(_expand_weight, json_schema_input_type=float | RewardSettings)
]


class RewardPoolSettings(Section):
    """The worker processes of the rewards that have a time limit (`TIMEOUT_S` in their file).

    `max_failed` concerns all rewards.
    """

    workers: int | None = Field(
        None,
        ge=1,
        description="Number of worker processes. Default: the number of CPU cores, at most 8.",
    )
    memory_gb: float = Field(
        4.0, gt=0, description="Maximum address space of each worker process in GB."
    )
    max_failed: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Maximum share of a rollout's completions that may be undecided: their gold "
        "answer cannot be read, a worker was lost, or a reward in `rewards/` raised an exception. "
        "Above it, `grpo train` stops and shows the first case, if at least two problems are "
        "affected. Evaluations do not stop, nor does `algorithm.advantage: teacher`, for which "
        "rewards are only metrics. 1: never stop.",
    )


class TrainSettings(Section):
    """The number of rollouts, their size, and how they are split into updates."""

    rollouts: int = Field(
        ge=1, description="Number of rollouts, which is how often the policy is sampled."
    )
    problems: int = Field(32, ge=1, description="P: number of problems per rollout.")
    group_size: int = Field(
        8, ge=2, description="G: number of completions per problem. Default: TRL's."
    )
    updates_per_rollout: int = Field(
        1,
        ge=1,
        description="Number of mini-batches into which a rollout's completions are split. There is "
        "one update per mini-batch and epoch.",
    )
    epochs: int = Field(1, ge=1, description="Number of passes over a rollout's completions.")
    max_staleness: int = Field(
        0,
        ge=0,
        description="Maximum age of the weights that sample a completion, in versions behind the "
        "learner's. Above 0, sampling continues during updates, which needs `engine.servers`.",
    )

    @model_validator(mode="after")
    def _check_even_split(self) -> TrainSettings:
        total = self.num_completions
        num_updates = self.updates_per_rollout
        if total % num_updates == 0:
            return self
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        smaller = [n for n in divisors if n < num_updates]
        larger = [n for n in divisors if n > num_updates]
        nearest = smaller[-1:] + larger[:1]
        raise ValueError(
            f"{self.problems} problems x {self.group_size} completions = {total} completions "
            f"cannot be split evenly into updates_per_rollout={num_updates} mini-batches. "
            f"Nearest valid values: {', '.join(map(str, nearest))}"
        )

    @property
    def num_completions(self) -> int:
        """Completions per rollout: P x G."""
        return self.problems * self.group_size

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the run if none is skipped."""
        return self.rollouts * self.epochs * self.updates_per_rollout


class LearnerSettings(Section):
    """The learner: optimizer, learning rate schedule, memory and parallelism."""

    lr: float = Field(
        1e-6,
        gt=0,
        description="Learning rate after the warmup. Default: DeepSeekMath; R1-Zero uses 3e-6. "
        "Small models need 1e-5 or more.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate schedule after the warmup."
    )
    warmup_updates: int = Field(
        0, ge=0, description="Number of updates over which the learning rate rises linearly."
    )
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Final learning rate of the schedules `linear` and `cosine`, as a share of "
        "`lr`.",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay of AdamW on matrices. Norms and biases have none."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="Betas of AdamW. Default: PyTorch's."
    )
    eps: float = Field(1e-8, gt=0, description="Epsilon of AdamW. Default: PyTorch's.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm. 0: no clipping."
    )
    skip_grad_norm: float = Field(
        1e4,
        gt=0,
        description="An update with a larger or non-finite gradient norm is skipped. The third "
        "skipped update in a row stops the run.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage. Stage 0 requires `model.dtype: float32`."
    )
    offload_optimizer: bool = Field(
        False,
        description="Keep the optimizer states in CPU memory, for GPU runs with ZeRO stage 1 to 3.",
    )
    micro_batch_tokens: int = Field(
        8192,
        ge=1,
        description="Maximum number of tokens per forward and backward pass, including padding.",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Number of ranks that share each forward and backward pass, for long sequences "
        "(DeepSpeed's Ulysses). In `grpo sft`, grpo's own learner then replaces TRL's trainer.",
    )
    logits_chunk_tokens: int = Field(
        512,
        ge=1,
        description="Number of completion tokens whose logits [chunk, vocabulary] are in memory at "
        "the same time.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Number of CPU threads per rank. Default: all cores, divided by the ranks of "
        "the machine.",
    )
    timeout_s: float = Field(
        1800, gt=0, description="Maximum time in seconds that a rank waits for another rank."
    )


class ServerSettings(Section):
    """vLLM servers that replace the engine in a child process.

    They run on this machine or on others (launch/server.sh).
    """

    count: int = Field(
        0, ge=0, description="Number of local servers. Rank 0 starts, watches and restarts them."
    )
    urls: list[str] = Field(
        [], description="Servers that are started separately, each as `http://HOST:PORT`."
    )
    tensor_parallel: int = Field(1, ge=1, description="Number of GPUs per server.")
    cores: list[int] | None = Field(
        None,
        description="Indices of the CPU cores that the local servers share, on a machine without "
        "GPUs. Default: all cores.",
    )
    transfer: Literal["auto", "memory", "file", "nccl"] = Field(
        "auto",
        description="How weights are sent to the servers. `auto` is `nccl` on GPUs; otherwise "
        "`file` with `urls`, and `memory` without.",
    )
    folder: str | None = Field(
        None,
        description="Directory for `transfer: file`, on a file system that all machines share. "
        "Default: a folder of the run directory.",
    )
    token_env: str = Field(
        "GRPO_ENGINE_TOKEN",
        description="Environment variable with the access token of the servers. It is required "
        "with `urls`; otherwise a token is generated if it is not set.",
    )
    retries: int = Field(
        3,
        ge=0,
        description="Number of retries of a failed request. A retry has the same seed and may run "
        "on another server.",
    )
    restarts: int = Field(
        20, ge=0, description="Maximum number of restarts of local servers per run."
    )
    stall_s: float = Field(
        120,
        gt=0,
        description="A server with requests that generates no token for this many seconds counts "
        "as lost.",
    )
    sync_timeout_s: float = Field(
        600,
        gt=0,
        description="A server that has not loaded new weights within this many seconds counts as "
        "lost.",
    )

    @model_validator(mode="after")
    def _check_servers(self) -> ServerSettings:
        if not self.count and not self.urls:
            raise ValueError(
                "no servers: set count (local servers), urls (other servers) or both, or remove "
                "the section to use an engine in a child process"
            )
        if self.transfer == "memory" and self.urls:
            raise ValueError(
                "transfer=memory reaches servers on this machine only: use file or nccl with urls"
            )
        return self


class EngineSettings(Section):
    """The vLLM engine: precision, memory, batch size, timeouts and servers."""

    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Precision of the engine. Default: `model.dtype`."
    )
    kv_cache_gb: float | None = Field(
        None,
        gt=0,
        description="Size of the KV cache in GiB. Default: 2 on a CPU; on a GPU, what "
        "`memory_fraction` leaves after weights, activations and CUDA graphs. In any case vLLM "
        "needs `memory_fraction` of the GPU to be free when it starts.",
    )
    memory_fraction: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="Share of a GPU's memory that the engine uses. `grpo doctor CONFIG --gpus` "
        "prints the largest one.",
    )
    max_sequences: int = Field(
        256, ge=1, description="Maximum number of sequences that are decoded at the same time."
    )
    eager: bool | None = Field(
        None,
        description="Run without torch.compile and CUDA graphs. Default: true on a CPU, where the "
        "engine then starts in 9 s instead of 58 s and is no slower; false on a GPU.",
    )
    block_size: int | None = Field(
        None,
        description="Number of tokens per block of the KV cache. Default: 32 on a CPU, because "
        "blocks of 128 tokens (vLLM's default) share nothing of short prompts; vLLM's on a GPU.",
    )
    sleep: bool = Field(
        True,
        description="Release the engine's GPU memory during updates, so that the learner can use "
        "it. No effect on a CPU.",
    )
    deterministic: bool = Field(
        False,
        description="Make runs on GPUs reproducible bit for bit, at some cost in speed: vLLM uses "
        "kernels whose results do not depend on the other sequences of a batch, and the learner of "
        "`grpo train` uses deterministic operations. Not for mixtures of experts. No effect on a "
        "CPU, where runs without servers are reproducible anyway.",
    )
    servers: ServerSettings | None = Field(
        None,
        description="Use vLLM servers. Default: an engine in a child process of each rank.",
    )
    start_timeout_s: float = Field(
        300, gt=0, description="Maximum time in seconds until the engine has started."
    )
    timeout_s: float = Field(
        3600,
        gt=0,
        description="Maximum time in seconds for a rollout, a weight sync or scoring.",
    )


class ProbeSettings(Section):
    """The checks that engine and learner have the same weights."""

    canary: bool = Field(
        True,
        description="At the start, send a perturbed copy of the weights through the real weight "
        "sync and check that it arrives.",
    )
    prompts: int = Field(
        4,
        ge=1,
        description="Number of prompts whose completions' log-probabilities in engine and learner "
        "are compared after each weight sync. On a GPU, the first one is also sampled alone, "
        "because vLLM has a CUDA graph per size of a batch.",
    )
    tokens: int = Field(
        16, ge=1, description="Number of tokens that the engine samples for each sequence."
    )
    max_gap: float | None = Field(
        None,
        gt=0,
        description="Mean absolute difference of the log-probabilities above which the run stops; "
        "for the completions of one size of batch, twice as much. The canary allows up to twice as "
        "much again. Default: 1e-3 in float32, 0.2 in bfloat16.",
    )
    max_gap_ratio: float | None = Field(
        5.0,
        gt=1,
        description="The run also stops if the difference is above a quarter of `max_gap` and more "
        "than this many times both that of the first probe and the rounding noise of the current "
        "weights, which the learner measures only then. null: only `max_gap` stops it.",
    )
    full_batch_every: int = Field(
        10,
        ge=0,
        description="Number of rollouts between probes that also sample a full batch, as large as "
        "those of a rollout. The canary, the first and the last probe do so, too. 0: no full "
        "batches. No effect on a CPU or with `engine.eager`, where there are no CUDA graphs.",
    )


class EvalSettings(Section):
    """Evaluation on held-out problems: interval, number of problems, sampling."""

    every: int = Field(
        10,
        ge=0,
        description="Number of rollouts between evaluations. The model is also evaluated before "
        "the first and after the last rollout. 0: no evaluation.",
    )
    problems: int = Field(200, ge=1, description="Maximum number of held-out problems.")
    data: DataSettings | None = Field(
        None, description="Problem sets whose test split is used. Default: those of `data`."
    )
    temperature: float = Field(
        0.0,
        ge=0,
        description="Sampling temperature. 0: greedy. Above 0, one greedy completion per problem "
        "is evaluated in addition to the samples.",
    )
    samples: int = Field(
        1, ge=1, description="Number of completions per problem, over which metrics are averaged."
    )
    protocol: Literal["own", "greedy", "r1"] = Field(
        "own",
        description="Protocol of `grpo eval`: `own` uses the settings above; `greedy` is one "
        "completion at temperature 0; `r1` is temperature 0.6, top_p 0.95, 32,768 tokens and 64 "
        "completions per problem (16 for sets of more than 100 problems), as in DeepSeek-R1.",
    )

    @model_validator(mode="after")
    def _check_samples(self) -> EvalSettings:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} with temperature=0: greedy completions are all the same. "
                "Set temperature above 0"
            )
        return self


class CheckpointSettings(Section):
    """How often checkpoints are written, and which of them are kept."""

    every: int = Field(
        10,
        ge=0,
        description="Number of rollouts between checkpoints; of updates in `grpo sft` and in "
        "`grpo distill` with way soft. 0: at the end only.",
    )
    keep_last: int = Field(2, ge=1, description="Number of the latest checkpoints to keep.")
    keep_best: str | None = Field(
        None,
        description="Metric, e.g. eval/accuracy, whose best (highest) checkpoint is also kept.",
    )


# The names of the rules in grpo/metrics/diagnosis.py. A test compares the two lists.
DIAGNOSIS_RULES = (
    "too_hard",
    "too_easy",
    "no_signal",
    "undecided",
    "truncated",
    "stale_weights",
    "mismatch",
    "zero_loss",
    "entropy",
    "clipped",
    "gradient",
    "format_only",
    "hacking",
    "flat",
    "slow_rewards",
    "waiting",
    "far",
    "language",
    "merge",
    "pass_rate",
)


def _check_rule(name: str) -> str:
    if name not in DIAGNOSIS_RULES:
        raise ValueError(f"unknown rule. Available: {', '.join(DIAGNOSIS_RULES)}")
    return name


class LoggingSettings(Section):
    """Trackers, progress output, data for `grpo replay`, and alarms."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [],
        description="Experiment trackers that receive the metrics, with histograms and some "
        "completions.",
    )
    tracked_samples: int = Field(
        8,
        ge=0,
        description="Number of completions per step in the trackers' table `samples`, with their "
        "questions. 0: none.",
    )
    project: str = Field("grpo", description="Project name in W&B and trackio.")
    replay: int = Field(
        20,
        ge=0,
        description="Number of the latest steps whose tokens and advantages are kept for "
        "`grpo replay`.",
    )
    progress: Literal["auto", "live", "line", "off"] = Field(
        "auto",
        description="Progress output: `live` is a status line, `line` prints one line per rollout "
        "or update; `auto` is `live` on a terminal and `line` elsewhere; `off` prints warnings "
        "only, and no tables.",
    )
    alarms: dict[Annotated[str, AfterValidator(_check_rule)], Literal["snapshot", "stop"]] = Field(
        {},
        description="What to do when a rule of the diagnosis (`grpo/metrics/diagnosis.py`) reports "
        "a finding: `snapshot` keeps a checkpoint, `stop` keeps one and stops the run.",
    )
