"""The sections that several commands share: what each key means, its unit and its default.

The other sections are in model.py (`model`), algorithm.py (`algorithm`) and stages.py (`sft`,
`collect`, `soft`, `quantize` and the like). A comment above or beside a field says what it means.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from grpo.config.reading import Section


class Source(Section):
    """One problem set: `name` is a file in data/ or `module:function`."""

    weight: float = Field(1.0, gt=0)  # share of the mixture
    path: str | None = None  # local file or directory; default: data.path, then the hub
    options: dict[str, Any] = {}  # of the set's own `load`


class Data(Section):
    """The problems: one problem set, or a weighted mixture of several."""

    name: str | None = None  # one set ...
    options: dict[str, Any] = {}
    mixture: dict[str, Source] = {}  # ... or several, by name
    path: str | None = None  # local file or directory with the sets' files; default: the hub
    # field of the problems' meta; the first epoch is sorted by it, smallest first
    curriculum: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Data:
        if bool(self.name) == bool(self.mixture):
            raise ValueError("give either name (one set) or mixture (several)")
        if self.mixture and self.options:
            raise ValueError("with a mixture, options belong to each set: mixture.NAME.options")
        return self

    @property
    def sources(self) -> dict[str, Source]:
        """Every set by name, with the common path filled in."""
        sources = self.mixture or {self.name or "": Source(options=self.options)}
        return {
            name: source.model_copy(update={"path": source.path or self.path})
            for name, source in sources.items()
        }


class Prompt(Section):
    """How a problem becomes a prompt: template, system prompt, prefill, stop strings, length."""

    # chat (the tokenizer's), r1_zero (the paper's, for base models), plain (question and a newline)
    template: str = "chat"
    system: str | None = None  # chat only; `r1` is the system prompt that asks for the tags
    think_prefill: bool = False  # end the prompt in `<think>`
    stop: list[str] = []  # stop strings beside EOS; r1_zero adds </answer>
    max_tokens: int = Field(512, ge=1)  # longest prompt
    overlong: Literal["error", "drop"] = "error"  # a finite set's problems with a longer prompt


class Sampling(Section):
    """How completions are sampled: their longest length in tokens, temperature, top-p, top-k."""

    max_tokens: int = Field(1024, ge=1)  # longest completion
    temperature: float = Field(1.0, gt=0)  # R1-Zero: 1
    # below 1 the sampler's distribution is not the policy's: ratios lose their meaning
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    ignore_eos: bool = False  # sample to max_tokens whatever comes: benchmarks


class Reward(Section):
    """The weight of one reward, and the options of the reward's own function.

    A config gives the weight alone, `accuracy: 1.0`, or both, `length: {weight: 0.5, options:
    {max_tokens: 4096, buffer: 1024}}`.
    """

    weight: float = 1.0
    options: dict[str, Any] = {}


def _as_reward(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"weight": value}
    return value


RewardEntry = Annotated[Reward, BeforeValidator(_as_reward)]  # a weight alone, or both


class RewardPool(Section):  # processes for the rewards whose file has a TIMEOUT_S
    """Worker processes for rewards with a time limit: how many, and GB of memory per process."""

    workers: int | None = Field(None, ge=1)  # default: the cores, up to 8
    memory_gb: float = Field(4.0, gt=0)  # address space of each


class Train(Section):
    """How many rollouts there are, how large each one is, and how it is split into updates."""

    rollouts: int = Field(ge=1)  # times the policy is sampled
    problems: int = Field(32, ge=1)  # P: problems per rollout
    group_size: int = Field(8, ge=2)  # G: completions per problem
    updates_per_rollout: int = Field(1, ge=1)  # mini-batches a rollout's completions are split into
    epochs: int = Field(1, ge=1)  # times a rollout's completions are gone through
    # versions that weights may be older than the learner's; above 0 rollouts go on during updates
    max_staleness: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _arithmetic(self) -> Train:
        total = self.completions
        num_updates = self.updates_per_rollout
        if total % num_updates:
            divisors = [n for n in range(1, total + 1) if total % n == 0]
            near = [
                max(n for n in divisors if n < num_updates),
                *[n for n in divisors if n > num_updates][:1],
            ]
            raise ValueError(
                f"{self.problems} problems x {self.group_size} completions = {total} completions "
                "cannot be split evenly into "
                f"updates_per_rollout={num_updates} mini-batches; near values that work: "
                f"{', '.join(map(str, near))}"
            )
        return self

    @property
    def completions(self) -> int:
        """Completions per rollout: P x G."""
        return self.problems * self.group_size

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the run if none is skipped."""
        return self.rollouts * self.epochs * self.updates_per_rollout


class Learner(Section):
    """The learner's optimizer, learning-rate schedule, memory and parallelism."""

    lr: float = Field(1e-6, gt=0)  # DeepSeekMath 1e-6, R1-Zero 3e-6; small models need 1e-5 or more
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)  # where linear and cosine end
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)  # 0: no clipping
    # an update with a larger one is skipped, as one that is not finite; the third in a row stops
    skip_grad_norm: float = Field(1e4, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 1  # DeepSpeed ZeRO; 0 needs model.dtype float32
    offload_optimizer: bool = False  # optimizer states in CPU memory (GPU runs, ZeRO 1-3)
    # tokens in one forward and backward pass, padding included
    micro_batch_tokens: int = Field(8192, ge=1)
    # ranks that share one pass: long sequences (DeepSpeed's Ulysses); GRPO, soft targets
    sequence_parallel: int = Field(1, ge=1)
    # completion positions whose [chunk, vocabulary] logits exist at once
    logits_chunk_tokens: int = Field(512, ge=1)
    # CPU threads; default: all cores, shared among a machine's ranks
    threads: int | None = Field(None, ge=1)
    timeout_s: float = Field(1800, gt=0)  # longest wait of one rank for another


class Servers(Section):
    """vLLM servers in place of the one child process.

    There can be as many as there are GPUs, on this machine or elsewhere (launch/server.sh).
    """

    count: int = Field(0, ge=0)  # local ones, started and watched by rank 0
    urls: list[str] = []  # others: http://HOST:PORT
    tensor_parallel: int = Field(1, ge=1)  # GPUs of a server
    cores: list[int] | None = None  # on a CPU: cores that the local servers share; default: all
    # how weights go there; auto: nccl on GPUs, else memory, with urls file
    transfer: Literal["auto", "memory", "file", "nccl"] = "auto"
    # transfer file: a directory that all machines see; default: in the run's
    folder: str | None = None
    # environment variable with the token of `urls`; local servers get one of their own
    token_env: str = "GRPO_ENGINE_TOKEN"
    retries: int = Field(3, ge=0)  # of a request, with the same seed, on whatever server is there
    restarts: int = Field(20, ge=0)  # of local servers, in a run
    # a server that is asked something and makes no token for so long is lost
    stall_s: float = Field(120, gt=0)
    # a server that has not taken new weights by then is lost
    sync_timeout_s: float = Field(600, gt=0)

    @model_validator(mode="after")
    def _some(self) -> Servers:
        if not self.count and not self.urls:
            raise ValueError(
                "servers: give count (local ones), urls, or both; leave the section out for one "
                "child process"
            )
        if self.transfer == "memory" and self.urls:
            raise ValueError(
                "servers.transfer=memory reaches this machine only: use file or nccl for urls"
            )
        return self


class Engine(Section):
    """The vLLM engine: precision, memory, sequences decoded at once, timeouts, servers if any."""

    dtype: Literal["float32", "bfloat16"] | None = None  # default: model.dtype
    kv_cache_gb: float = Field(2.0, gt=0)  # KV cache on a CPU; on a GPU set memory_fraction
    memory_fraction: float = Field(0.4, gt=0, lt=1)  # share of a GPU's memory
    max_sequences: int = Field(256, ge=1)  # decoded at once
    # no torch.compile and CUDA graphs; default: on a CPU (starts in 9 s instead of 58, no slower)
    eager: bool | None = None
    # KV block; default 32 on a CPU (vLLM's own 128 shares nothing of short prompts)
    block_size: int | None = None
    # give the engine's GPU memory to the learner during updates (nothing to do on a CPU)
    sleep: bool = True
    servers: Servers | None = None
    start_timeout_s: float = Field(300, gt=0)
    timeout_s: float = Field(3600, gt=0)  # longest wait for a rollout, a sync or a score


class Probe(Section):
    """How engine and learner are checked for the same weights, and the largest gap allowed."""

    canary: bool = True  # a perturbed copy of the weights goes through the real sync at the start
    prompts: int = Field(4, ge=1)  # sequences scored by engine and learner after each sync
    tokens: int = Field(16, ge=1)  # sampled for each
    # mean |difference of logprobs| that stops a run (canary: up to 2x); 1e-3, bfloat16: 0.2
    max_gap: float | None = Field(None, gt=0)


class Eval(Section):
    """Evaluation on held-out problems: how often, on how many, and how completions are sampled."""

    # rollouts; 0: never. Also before the first and after the last rollout
    every: int = Field(10, ge=0)
    problems: int = Field(200, ge=1)
    data: Data | None = None  # default: the test split of `data`
    # 0: greedy; above 0 a greedy completion is judged beside the samples
    temperature: float = Field(0.0, ge=0)
    samples: int = Field(1, ge=1)  # completions per problem, whose mean is reported
    # grpo eval: r1 is temperature 0.6, top_p 0.95, 32,768 tokens, 64 or 16 samples
    protocol: Literal["own", "greedy", "r1"] = "own"

    @model_validator(mode="after")
    def _greedy_once(self) -> Eval:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} greedy completions would all be the same: set "
                "temperature above 0"
            )
        return self


class Checkpoint(Section):
    """How often checkpoints are written, and which of them are kept."""

    every: int = Field(10, ge=0)  # rollouts (sft: updates); 0: only at the end
    keep_last: int = Field(2, ge=1)
    keep_best: str | None = None  # metric whose highest checkpoint is kept too, e.g. eval/accuracy


# The rules of grpo/metrics/diagnosis.py by name; a test holds the two lists equal.
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
)


def _rule(name: str) -> str:
    if name not in DIAGNOSIS_RULES:
        raise ValueError(f"no such rule; have {', '.join(DIAGNOSIS_RULES)}")
    return name


class Logging(Section):
    """Trackers, progress output, steps kept for `grpo replay`, and what alarms do."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    project: str = "grpo"
    # last steps whose tokens and advantages are kept for `grpo replay`
    replay: int = Field(20, ge=0)
    # auto: live on a terminal, one line per rollout elsewhere
    progress: Literal["auto", "live", "line", "off"] = "auto"
    # what a finding of grpo/metrics/diagnosis.py does
    alarms: dict[Annotated[str, AfterValidator(_rule)], Literal["snapshot", "stop"]] = {}
