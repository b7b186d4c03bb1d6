"""`grpo distill`: a teacher's reasoning into a smaller student, in one of three ways.

sequence   the teacher samples, what is right is kept, the student is fine-tuned on it: R1's own way, whatever the vocabularies
soft       the student matches the teacher's distribution at every token of given texts
on_policy  the student samples, the teacher scores its tokens: reverse KL as the advantage in GRPO's loop
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo import lora, models, plugins
from grpo.batch import micro_batches, token_weights
from grpo.checkpoint import RunDirectory
from grpo.config import Config
from grpo.config_stages import DistillConfig
from grpo.metrics import Timer, quiet
from grpo.prompts import Prompts
from grpo.signals import Interrupted
from grpo.stages._run import Stage, check_same, load_problems, load_teacher, mixture, open_stage, prepare, worked, write_final
from grpo.types import Problem, Sample


def distill(config: DistillConfig, *, resume: bool) -> None:
    """Writes the student into `final/` (way sequence: `sft/final/`). Raises UserError, RunError, Interrupted (saved)."""
    {"sequence": _sequence, "soft": _soft, "on_policy": _on_policy}[config.way](config, resume)


def _sequence(config: DistillConfig, resume: bool) -> None:
    from grpo.stages.collect import collect
    from grpo.stages.sft import sft

    with open_stage(config, "distill", total=2, unit="stage", resume=resume) as stage:
        for name, part in config.parts().items():
            folder = Path(config.run_dir) / name
            stage.signals.check()
            if RunDirectory.status(folder) == "finished":
                check_same(folder, part)
                continue
            stage.display.say(f"{name}: {folder}")
            run: Any = {"collect": collect, "sft": sft}[name]
            run(part, resume=(folder / "manifest.json").exists())
        stage.signals.check()
        stage.run.update_manifest(final="sft/final")


def _on_policy(config: DistillConfig, resume: bool) -> None:
    from grpo.stages.train import train

    (part,) = config.parts().values()
    assert isinstance(part, Config)
    train(part, resume=resume)


def _soft(config: DistillConfig, resume: bool) -> None:
    assert config.soft is not None
    problems = load_problems(config.data, "train", config.seed)
    loss = plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    with open_stage(config, "distill", total=config.soft.updates, unit="update", resume=resume) as stage:
        _match(config, stage, problems, loss, resume=resume)


def _match(config: DistillConfig, stage: Stage, problems: Any, loss: Any, *, resume: bool) -> None:
    """The loop of the way soft: texts, updates, checkpoints, `final/`."""
    from grpo.learners.deepspeed import Learner

    soft, run, display = config.soft, stage.run, stage.display
    assert soft is not None
    display.phase(0, "loading the models")
    model_dir, tokenizer, prompts = prepare(config, run)
    models.check_context(model_dir, soft.max_tokens)
    stream = mixture(config.data, problems, prompts, config.seed)
    texts = samples(stream.take(0, soft.updates * soft.batch_size), prompts, soft.max_tokens, soft.hard_weight)
    with quiet(run.path / "learner.log"):
        teacher = load_teacher(config, run, tokenizer, soft.max_tokens)
        learner = Learner(lora.load_policy(config, model_dir, config.model.attention), config, loss, teacher, soft)
    checkpoint = run.latest() if resume else None
    if checkpoint:
        run.read_state(checkpoint)
        with quiet(run.path / "learner.log"):
            learner.load(checkpoint)
    if resume:
        run.cut(learner.updates if checkpoint else -1)
        display.say(f"resumed after update {learner.updates}" if checkpoint else "no checkpoint yet: starting again")
    display.begin(learner.updates)
    row: dict[str, Any] = {}

    def save() -> None:
        if run.latest() != run.checkpoints / f"step-{learner.updates:06d}":
            run.save(learner.updates, {"updates": learner.updates, "seed": config.seed, "metrics": row}, learner.save)
            run.prune(config.checkpoint.keep_last, config.checkpoint.keep_best)

    while learner.updates < soft.updates:
        timer = Timer()
        part = texts[learner.updates * soft.batch_size : (learner.updates + 1) * soft.batch_size]
        weights = token_weights(part, "token", soft.max_tokens)
        batches = micro_batches(part, weights, max_tokens=config.learner.micro_batch_tokens, packed=config.model.packed)
        try:
            with timer("update"):
                row = learner.update(batches, lambda *_: stage.signals.check())
        except Interrupted:
            save()
            display.say(f"stopped after update {learner.updates}, saved; go on with --resume")
            raise
        row = {key: value for key, value in row.items() if not key.startswith("mismatch/")}  # nothing was sampled
        row |= {"step": learner.updates, "update": learner.updates} | timer.metrics()
        stage.record(row)
        display.row(row)
        display.phase(learner.updates, "update")
        if config.checkpoint.every and learner.updates % config.checkpoint.every == 0:
            save()
    save()
    write_final(stage, config, model_dir, tokenizer, learner)


def samples(problems: list[Problem], prompts: Prompts, max_tokens: int, weight: float) -> list[Sample]:
    """Returns texts to learn from: prompt and worked solution. Raises UserError naming a problem without one, or too long."""
    return [
        Sample(token_ids=prompt + target, prompt_length=len(prompt), advantages=(weight,) * len(target))
        for prompt, target in worked(problems, prompts, max_tokens, "soft")
    ]
