"""`grpo distill`: distills a teacher's reasoning into a smaller student.

The config key `way` selects the method:

- `sequence`: The teacher samples, correct completions are kept as traces, and the student is
  fine-tuned on them, as in DeepSeek-R1. The vocabularies may differ.
- `soft`: The student learns the teacher's distribution at every token of given texts. Tokens of
  another vocabulary are aligned (grpo/learning/alignment.py).
- `on_policy`: The student samples and the teacher scores its tokens. GRPO's training loop uses the
  reverse KL as the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.config import DistillConfig
from grpo.experience import plugins
from grpo.experience.prompts import Prompts
from grpo.learning import lora, models
from grpo.learning.alignment import TokenPair
from grpo.run import ranks
from grpo.run.directory import RunDirectory
from grpo.run.display import redirect_output
from grpo.stages import collect, sft, train
from grpo.stages.engine import EngineModel, start_engine
from grpo.stages.final_model import write_final
from grpo.stages.problems import load_problems, make_mixture
from grpo.stages.resume import require_same_config
from grpo.stages.run_context import RunContext, open_stage
from grpo.stages.sampling import check_rewards
from grpo.stages.solutions import (
    SolutionTexts,
    TrainingLimits,
    check_solutions,
    take_trainable,
)
from grpo.stages.stage import (
    Check,
    DiskNeeds,
    MemoryNeeds,
    Part,
    ProblemNeeds,
    Stage,
    StageNeeds,
    max_checkpoints_on_disk,
)
from grpo.stages.start_model import (
    StartModel,
    find_other_vocabularies,
    find_start_model,
    find_teachers,
    require_for_other_vocabulary,
    require_same_start,
)
from grpo.stages.teacher_texts import TeacherTexts, Texts
from grpo.stages.text_loop import TextLoop
from grpo.types import Batch, Problem, Sample, UserError

if TYPE_CHECKING:
    from grpo.data.common.mixture import Mixture

TEXTS_PER_FILE = 256


def distill(config: DistillConfig, *, resume: bool) -> None:
    """Trains the student and writes it to `final/` (`way=sequence`: `sft/final/`).

    Raises:
        UserError: The config, the data or a model is wrong.
        RunError: The run cannot continue.
        RunInterruptedError: A signal stopped the run. Its progress is saved.
    """
    if config.way == "sequence":
        _run_sequence(config, resume)
    elif config.way == "soft":
        _run_soft(config, resume)
    else:
        (part,) = STAGE.parts(config)
        part.stage.run(part.config, resume=resume)


def _run_sequence(config: DistillConfig, resume: bool) -> None:
    """Collects traces from the teacher, then fine-tunes the student on them.

    A stage that is finished is skipped.
    """
    if ranks.world_size() > 1:
        raise UserError(
            "way=sequence starts with `grpo collect`, which runs in a single process: start `grpo "
            "distill` without torchrun"
        )
    stages: dict[str, Stage[Any]] = {"collect": collect.STAGE, "sft": sft.STAGE}
    with open_stage(config, "distill", total=2, unit="stage", resume=resume) as context:
        for name, part_config in config.stage_configs().items():
            folder = Path(config.run_dir) / name
            context.signals.raise_if_received()
            if RunDirectory.status(folder) == "finished":
                require_same_config(folder, part_config)
                continue
            context.display.say(f"{name}: {folder}")
            is_started = (folder / "manifest.json").exists()
            with context.inner_run():
                stages[name].run(part_config, resume=is_started)
        context.signals.raise_if_received()
        context.run.update_manifest(final="sft/final")


def _limits(config: DistillConfig) -> TrainingLimits:
    return TrainingLimits("soft", config.max_sequence_tokens, config.data)


def _run_soft(config: DistillConfig, resume: bool) -> None:
    soft = config.soft
    assert soft is not None
    loss = plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    with open_stage(config, "distill", total=soft.updates, unit="update", resume=resume) as context:
        with context.loading_problems():
            problems = load_problems(config.data, "train", config.seed, say=context.display.say)
        context.display.phase(0, "loading the models")
        start = find_start_model(config, context)
        models.check_context(start.model_dir, soft.max_tokens, config.length_keys)
        mixture = make_mixture(config.data, problems, start.prompts, config.seed)
        require_same_start(start.tokenizer, mixture)
        teacher = _prepare_teacher(config, context, start, mixture)
        with redirect_output(context.run.log_file("learner")):
            learner = _load_learner(config, start.model_dir, teacher, loss)
            context.stack.callback(learner.close)
        context.display.say(f"attention: {learner.attention}")
        loop = TextLoop(
            config=config, context=context, settings=soft, learner=learner, texts=teacher.texts
        )
        if teacher.top is not None:
            loop.prepare_batch = teacher.top.add_to_batch
        if resume:
            loop.resume()
        loop.train()
        write_final(context, config, start.model_dir, start.tokenizer, learner)


class _Teacher(NamedTuple):
    """A teacher, and the texts that it reads."""

    model_dir: Path
    texts: Texts
    top: TopLogprobs | None  # its stored logprobs, instead of the model in memory
    common_tokens: list[TokenPair] | None  # if its vocabulary is not the student's


def _prepare_teacher(
    config: DistillConfig, context: RunContext, start: StartModel, mixture: Mixture
) -> _Teacher:
    """Finds the teacher and tokenizes the texts, also with another tokenizer of the teacher."""
    soft = config.soft
    assert soft is not None
    with redirect_output(context.run.log_file("learner")):
        model_dir = find_teachers(config, context, soft.max_tokens)[""]
        vocabularies = find_other_vocabularies(
            config.prompt, start.tokenizer, start.prompts, {"": model_dir}
        )
    if vocabularies:
        _check_other_vocabulary(config)
    num_texts = soft.updates * soft.batch_size
    problems = take_trainable(
        mixture, num_texts, start.prompts, _limits(config), context.display.say
    )
    texts = SolutionTexts(
        problems,
        start.prompts,
        max_tokens=soft.max_tokens,
        section="soft",
        weight=soft.hard_weight,
    )
    if not vocabularies:
        top = _fill_teacher_top(config, context, model_dir, texts)
        return _Teacher(model_dir, texts, top, common_tokens=None)
    teacher_texts = TeacherTexts(texts, problems, vocabularies[""])
    context.display.say(teacher_texts.summary())
    common_tokens = vocabularies[""].alignment.common_tokens()
    return _Teacher(model_dir, teacher_texts, top=None, common_tokens=common_tokens)


def _check_other_vocabulary(config: DistillConfig) -> None:
    """Raises UserError if a setting needs student and teacher to have the same vocabulary."""
    soft = config.soft
    assert soft is not None
    require_for_other_vocabulary(
        {
            "soft.temperature=1": soft.temperature == 1,
            "soft.teacher_topk=": soft.teacher_topk is None,
            "soft.hidden_weight=0": soft.hidden_weight == 0,
            "learner.sequence_parallel=1": config.learner.sequence_parallel == 1,
        }
    )


def _load_learner(config: DistillConfig, model_dir: Path, teacher: _Teacher, loss: Any) -> Any:
    """Returns the student's learner. It holds the teacher unless its logprobs are stored."""
    from grpo.learning.learner import Learner
    from grpo.learning.policy import Reference

    attention = config.model.attention
    references = {}
    if teacher.top is None:
        teacher_model = models.load_model(teacher.model_dir, attention)
        references[""] = Reference(teacher_model, teacher.common_tokens)
    student = lora.load_policy(config, model_dir, attention)
    return Learner(student, config, loss, references, soft=config.soft)


def _fill_teacher_top(
    config: DistillConfig, context: RunContext, teacher_dir: Path, texts: SolutionTexts
) -> TopLogprobs | None:
    """Returns the teacher's top logprobs for the texts, None without `soft.teacher_topk`.

    Rank 0 computes those that are not on disk yet.
    """
    assert config.soft is not None
    if not config.soft.teacher_topk:
        return None
    teacher_top = TopLogprobs(context.run.path / "teacher_top", texts[:])

    def fill_on_rank0() -> None:
        if ranks.rank() == 0:
            teacher_top.fill(config, context, teacher_dir)

    ranks.all_gather_or_raise("the teacher's logprobs", fill_on_rank0)
    return teacher_top


class TopLogprobs:
    """The teacher's k most likely tokens, with logprobs, at every completion token of the texts.

    vLLM computes them once. They are kept in files and read when a batch needs them.
    """

    def __init__(self, folder: Path, texts: Sequence[Sample]) -> None:
        """`folder` holds the files. Equal texts are stored once."""
        self._folder = folder
        text_by_ids = {text.token_ids: text for text in texts}
        self._texts = list(text_by_ids.values())
        # (number of the file, index in the file) by token ids
        self._positions = {
            text.token_ids: divmod(index, TEXTS_PER_FILE) for index, text in enumerate(self._texts)
        }
        self._open_files: dict[int, Any] = {}

    def _path(self, file_number: int) -> Path:
        return self._folder / f"{file_number:06d}.safetensors"

    def fill(self, config: DistillConfig, context: RunContext, teacher_dir: Path) -> None:
        """Computes the missing files with a temporary engine.

        Raises:
            RunInterruptedError: A signal stopped the run. Finished files are kept.
            EngineError: The engine failed.
        """
        assert config.soft is not None and config.soft.teacher_topk is not None
        num_files = math.ceil(len(self._texts) / TEXTS_PER_FILE)
        missing = [number for number in range(num_files) if not self._path(number).exists()]
        if not missing:
            return
        self._folder.mkdir(exist_ok=True)
        k = config.soft.teacher_topk
        teacher = EngineModel(
            model_dir=teacher_dir,
            num_weights=models.num_weights(teacher_dir),
            load_weights=True,
            max_model_len=config.soft.max_tokens + 1,  # vLLM also samples one token
            max_logprobs=k,
        )
        engine = start_engine(config, context, teacher)
        for number in missing:
            num_done = number * TEXTS_PER_FILE
            context.display.phase(0, "the teacher's logprobs", f"{num_done}/{len(self._texts)}")
            self._compute_file(number, engine, k)
        engine.close()

    def _compute_file(self, file_number: int, engine: Any, k: int) -> None:
        from safetensors.numpy import save_file

        start = file_number * TEXTS_PER_FILE
        texts = self._texts[start : start + TEXTS_PER_FILE]
        sequences = [(text.token_ids, text.prompt_length) for text in texts]
        arrays = {}
        for index, (ids, logprobs) in enumerate(engine.top_logprobs(sequences, k)):
            arrays[f"ids.{index}"] = ids  # [completion tokens, k]
            arrays[f"logprobs.{index}"] = logprobs
        scratch = self._folder / ".partial"
        save_file(arrays, scratch)
        scratch.rename(self._path(file_number))

    def add_to_batch(self, batch: Batch) -> Batch:
        """Returns a batch with the token ids and logprobs [N, k] of its N completion tokens."""
        import torch

        ids, logprobs = [], []
        for sequence in batch.sequences:
            file_number, index = self._positions[sequence]
            file = self._open_file(file_number)
            ids.append(file.get_tensor(f"ids.{index}").long())
            logprobs.append(file.get_tensor(f"logprobs.{index}"))
        return replace(batch, teacher_top=(torch.cat(ids), torch.cat(logprobs)))

    def _open_file(self, file_number: int) -> Any:
        from safetensors import safe_open

        if file_number not in self._open_files:
            self._open_files[file_number] = safe_open(str(self._path(file_number)), "pt")
        return self._open_files[file_number]


class _DistillStage:
    command = "distill"
    config_class = DistillConfig
    sections = ("way",)

    def run(self, config: DistillConfig, *, resume: bool) -> None:
        distill(config, resume=resume)

    def batch_arithmetic(self, config: DistillConfig) -> str:
        if config.way != "soft":
            return "\n".join(
                part.stage.batch_arithmetic(part.config) for part in self.parts(config)
            )
        soft = config.soft
        assert soft is not None
        return (
            f"update      {soft.batch_size} texts of at most {soft.max_tokens} tokens, "
            f"{soft.divergence} to the teacher\n"
            f"run         {soft.updates} updates, {soft.updates * soft.batch_size:,} texts drawn"
        )

    def needs(self, config: DistillConfig) -> StageNeeds:
        """Returns the needs of `way=soft`. For the other ways, each part states its needs."""
        soft = config.soft
        num_training = soft.updates * soft.batch_size if soft else 0
        # With teacher_topk, the engine with the teacher is closed before the updates.
        holds_teacher = soft is None or not soft.teacher_topk
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(training=config.data, num_training=num_training),
            memory=MemoryNeeds(learner=True, reference=holds_teacher),
            disk=DiskNeeds(checkpoints=max_checkpoints_on_disk(config), models=1),
            rewards=tuple(config.rewards),
            check_other_vocabulary=_check_other_vocabulary,
        )

    def parts(self, config: DistillConfig) -> list[Part]:
        part_configs = config.stage_configs()
        if config.way == "sequence":
            # The traces do not exist yet, so the doctor inspects the problems instead.
            sft_config = part_configs["sft"].model_copy(update={"data": config.data})
            return [
                Part(stage=collect.STAGE, config=part_configs["collect"], name="collect"),
                Part(stage=sft.STAGE, config=sft_config, name="sft", traces_pending=True),
            ]
        if config.way == "on_policy":
            return [Part(stage=train.STAGE, config=part_configs[""])]
        return [Part(stage=self, config=config)]

    def dry_run_lines(self, config: DistillConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: DistillConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return check_solutions(_limits(config), problems, prompts)


STAGE: Stage[DistillConfig] = _DistillStage()
