"""`grpo distill`: a teacher's reasoning into a smaller student, in one of three ways.

sequence   the teacher samples, what is right is kept, the student is fine-tuned on it: R1's own
           way, whatever the vocabularies
soft       the student matches the teacher's distribution at every token of given texts
on_policy  the student samples, the teacher scores its tokens: reverse KL as the advantage in GRPO's
           loop
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import DistillConfig, Soft
from grpo.experience import plugins
from grpo.experience.prompts import Prompts
from grpo.learning import lora, models
from grpo.run import ranks
from grpo.run.directory import RunDirectory
from grpo.run.display import Timer, quiet
from grpo.run.signals import Interrupted
from grpo.stages import collect, sft, train
from grpo.stages.engine import EngineModel, start_engine
from grpo.stages.final_model import write_final
from grpo.stages.problems import load_problems, mixture
from grpo.stages.resume import check_same
from grpo.stages.run_context import RunContext, open_stage
from grpo.stages.sampling import check_rewards
from grpo.stages.solutions import check_solutions, tokenize_solutions
from grpo.stages.stage import (
    Check,
    DiskNeeds,
    MemoryNeeds,
    Part,
    ProblemNeeds,
    Stage,
    StageNeeds,
    num_checkpoints,
)
from grpo.stages.start_model import find_model, find_teacher, require_same_start
from grpo.types import Batch, Problem, Sample, UserError

if TYPE_CHECKING:
    from torch import Tensor

CACHED = 256  # texts per file


def distill(config: DistillConfig, *, resume: bool) -> None:
    """Writes the student into `final/` (way sequence: `sft/final/`).

    Raises UserError, RunError, Interrupted (saved).
    """
    if config.way == "sequence":
        _sequence(config, resume)
    elif config.way == "soft":
        _soft(config, resume)
    else:
        (part,) = STAGE.parts(config)
        part.stage.run(part.config, resume=resume)


def _sequence(config: DistillConfig, resume: bool) -> None:
    if ranks.world_size() > 1:
        raise UserError(
            "grpo distill, way=sequence, begins with `grpo collect`, which is one process: start "
            "it without torchrun"
        )
    with open_stage(config, "distill", total=2, unit="stage", resume=resume) as context:
        for name, part in config.parts().items():
            folder = Path(config.run_dir) / name
            context.signals.check()
            if RunDirectory.status(folder) == "finished":
                check_same(folder, part)
                continue
            context.display.say(f"{name}: {folder}")
            run: Any = {"collect": collect.collect, "sft": sft.sft}[name]
            run(part, resume=(folder / "manifest.json").exists())
        context.signals.check()
        context.run.update_manifest(final="sft/final")


def _soft(config: DistillConfig, resume: bool) -> None:
    """Matches the teacher's distribution: texts, updates, checkpoints, `final/`."""
    soft = config.soft
    assert soft is not None
    problems = load_problems(config.data, "train", config.seed)
    loss = plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    with open_stage(config, "distill", total=soft.updates, unit="update", resume=resume) as context:
        context.display.phase(0, "loading the models")
        model_dir, tokenizer, prompts = find_model(config, context.run)
        models.check_context(model_dir, soft.max_tokens)
        stream = mixture(config.data, problems, prompts, config.seed)
        require_same_start(tokenizer, stream)
        drawn = stream.take(0, soft.updates * soft.batch_size)
        texts = samples(drawn, prompts, soft.max_tokens, soft.hard_weight)
        with quiet(context.run.log_file("learner")):
            teacher_dir = find_teacher(config, context.run, tokenizer, soft.max_tokens)
        teacher_top = _fill_teacher_top(config, context, teacher_dir, texts)
        with quiet(context.run.log_file("learner")):
            learner = _load_learner(config, model_dir, None if teacher_top else teacher_dir, loss)
        loop = SoftLoop(
            config=config,
            context=context,
            soft=soft,
            learner=learner,
            texts=texts,
            teacher_top=teacher_top,
        )
        if resume:
            loop.resume()
        loop.train()
        write_final(context, config, model_dir, tokenizer, learner)


def _fill_teacher_top(
    config: DistillConfig, context: RunContext, teacher_dir: Path, texts: list[Sample]
) -> TopLogprobs | None:
    """Returns the teacher's likeliest tokens, which rank 0 asks for; None without teacher_topk."""
    assert config.soft is not None
    if not config.soft.teacher_topk:
        return None
    top = TopLogprobs(context.run.path / "teacher_top", texts)
    ranks.all_gather_or_raise(
        "the teacher's logprobs",
        lambda: top.fill(config, context, teacher_dir) if ranks.rank() == 0 else None,
    )
    return top


def _load_learner(
    config: DistillConfig, model_dir: Path, teacher_dir: Path | None, loss: Any
) -> Any:
    """Returns the student's learner. `teacher_dir`: None if the teacher is on disk as logprobs."""
    from grpo.learning.learner import Learner

    attention = config.model.attention
    teacher = models.load_model(teacher_dir, attention) if teacher_dir else None
    student = lora.load_policy(config, model_dir, attention)
    return Learner(student, config, loss, teacher, soft=config.soft)


@dataclass(kw_only=True)
class SoftLoop:
    """The updates of the way soft, from text to text."""

    config: DistillConfig
    context: RunContext
    soft: Soft
    learner: Any
    texts: list[Sample]  # in the order of the updates
    teacher_top: TopLogprobs | None
    num_saved: int = -1  # updates in the last checkpoint
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last update

    def resume(self) -> None:
        """Loads the last checkpoint, and drops what was written after it."""
        run = self.context.run
        checkpoint, _ = run.last_state()
        if checkpoint:
            with quiet(run.log_file("learner")):
                self.learner.load(checkpoint)
            self.num_saved = self.learner.updates
        self.context.continue_after(self.learner.updates if checkpoint else None, "update")

    def train(self) -> None:
        """Runs to the last update and saves. On Interrupted it saves and raises."""
        every = self.config.checkpoint.every
        self.context.display.begin(self.learner.updates)
        while self.learner.updates < self.soft.updates:
            self.step()
            if every and self.learner.updates % every == 0:
                self.save()
        self.save()

    def step(self) -> None:
        """Makes one update and records it."""
        context, learner = self.context, self.learner
        timer = Timer()
        batches = self.batches()
        try:
            with timer("update"):
                ranks.all_gather_or_raise("the update", context.signals.check)
                metrics = learner.update(
                    batches, lambda *_: context.signals.check() if ranks.world_size() == 1 else None
                )
        except Interrupted:
            self.save()
            context.display.say(
                f"stopped after update {learner.updates}, saved; go on with --resume"
            )
            raise
        # Nothing was sampled, so no engine can differ from the learner.
        row = {key: value for key, value in metrics.items() if not key.startswith("mismatch/")}
        row |= {"step": learner.updates, "update": learner.updates} | timer.metrics()
        self.metrics = row
        context.record(row)
        context.display.row(row)
        context.display.phase(learner.updates, "update")

    def batches(self) -> list[Batch]:
        """Returns the micro-batches of the next update."""
        from grpo.learning.batch import micro_batches, token_weights

        size = self.soft.batch_size
        start = self.learner.updates * size
        texts = self.texts[start : start + size]
        batches = micro_batches(
            texts,
            token_weights(texts, "token", self.soft.max_tokens),
            max_tokens=self.config.learner.micro_batch_tokens,
            packed=self.config.model.packed,
            share=self.learner.share,
        )
        if self.teacher_top is None:
            return batches
        return [replace(batch, teacher_top=self.teacher_top.of(batch)) for batch in batches]

    def save(self) -> None:
        """Writes a checkpoint, unless this update has one."""
        updates = self.learner.updates
        if self.num_saved == updates:
            return
        self.num_saved = updates
        run, settings = self.context.run, self.config.checkpoint
        state = {"updates": updates, "seed": self.config.seed, "metrics": self.metrics}
        run.save(updates, state, self.learner.save)
        run.prune(settings.keep_last, settings.keep_best)


class TopLogprobs:
    """The logprobs that the teacher gives its likeliest tokens at each token of texts.

    They are asked from vLLM once, kept in files, and read as needed.
    """

    def __init__(self, folder: Path, texts: list[Sample]) -> None:
        """`folder` holds the files, in which equal `texts` have one place."""
        self._folder = folder
        self._texts = list({text.token_ids: text for text in texts}.values())
        self._places = {text.token_ids: divmod(i, CACHED) for i, text in enumerate(self._texts)}
        self._open: dict[int, Any] = {}

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def fill(self, config: DistillConfig, context: RunContext, teacher_dir: Path) -> None:
        """Asks the teacher for what is not there yet.

        A file that is written is not asked for again. Raises Interrupted, EngineError.
        """
        from safetensors.numpy import save_file

        assert config.soft is not None and config.soft.teacher_topk is not None
        missing = [
            number
            for number in range(-(-len(self._texts) // CACHED))
            if not self._file(number).exists()
        ]
        if not missing:
            return
        self._folder.mkdir(exist_ok=True)
        k = config.soft.teacher_topk
        teacher = EngineModel(
            model_dir=teacher_dir,
            num_weights=models.num_weights(teacher_dir),
            load_weights=True,
            max_model_len=config.soft.max_tokens + 1,
            max_logprobs=k,
        )
        engine = start_engine(config, context, teacher)
        for number in missing:
            context.display.phase(
                0, "the teacher's logprobs", f"{number * CACHED}/{len(self._texts)}"
            )
            part = self._texts[number * CACHED : (number + 1) * CACHED]
            answers = engine.top_logprobs(
                [(text.token_ids, text.prompt_length) for text in part], k
            )
            arrays = {}
            for i, (ids, logprobs) in enumerate(answers):
                arrays[f"ids.{i}"] = ids
                arrays[f"logprobs.{i}"] = logprobs
            save_file(arrays, self._folder / ".partial")
            (self._folder / ".partial").rename(self._file(number))
        engine.close()

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns ids and logprobs [N, k] for the batch's completion tokens, row by row."""
        import torch
        from safetensors import safe_open

        ids, logprobs = [], []
        for sequence in batch.sequences:
            number, i = self._places[sequence]
            if number not in self._open:
                self._open[number] = safe_open(str(self._file(number)), "pt")
            ids.append(self._open[number].get_tensor(f"ids.{i}").long())
            logprobs.append(self._open[number].get_tensor(f"logprobs.{i}"))
        return torch.cat(ids), torch.cat(logprobs)


def samples(
    problems: list[Problem], prompts: Prompts, max_tokens: int, weight: float
) -> list[Sample]:
    """Returns texts to learn from: prompt and worked solution.

    Raises UserError naming a problem without one, or too long.
    """
    return [
        Sample(
            token_ids=prompt + target, prompt_length=len(prompt), advantages=(weight,) * len(target)
        )
        for prompt, target in tokenize_solutions(problems, prompts, max_tokens, "soft")
    ]


class _DistillStage:
    command = "distill"
    config_class = DistillConfig
    sections = ("way",)

    def run(self, config: DistillConfig, *, resume: bool) -> None:
        distill(config, resume=resume)

    def arithmetic(self, config: DistillConfig) -> str:
        if config.way != "soft":
            return "\n".join(part.stage.arithmetic(part.config) for part in self.parts(config))
        soft = config.soft
        assert soft is not None
        return (
            f"an update   {soft.batch_size} texts of at most {soft.max_tokens} tokens, "
            f"{soft.divergence} to the teacher\n"
            f"the run     {soft.updates} updates, {soft.updates * soft.batch_size:,} texts drawn"
        )

    def needs(self, config: DistillConfig) -> StageNeeds:
        """Returns the needs of the way soft; the parts of the other ways have their own."""
        soft = config.soft
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                training=config.data,
                num_training=soft.updates * soft.batch_size if soft else 0,
            ),
            # The teacher's likeliest tokens come from an engine that is closed before the updates.
            memory=MemoryNeeds(learner=True, reference=not (soft and soft.teacher_topk)),
            disk=DiskNeeds(checkpoints=num_checkpoints(config), models=1),
            rewards=tuple(config.rewards),
        )

    def parts(self, config: DistillConfig) -> list[Part]:
        configs = config.parts()
        if config.way == "sequence":
            # The traces are not written yet: the same problems stand for them.
            sft_config = configs["sft"].model_copy(update={"data": config.data})
            return [
                Part(stage=collect.STAGE, config=configs["collect"], name="collect"),
                Part(stage=sft.STAGE, config=sft_config, name="sft", traces_to_come=True),
            ]
        if config.way == "on_policy":
            return [Part(stage=train.STAGE, config=configs[""])]
        return [Part(stage=self, config=config)]

    def preview(self, config: DistillConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: DistillConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return check_solutions(config.max_sequence_tokens, problems, prompts)


STAGE: Stage[DistillConfig] = _DistillStage()
