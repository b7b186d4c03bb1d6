"""A model that answers questions: `grpo eval --ask` and `grpo.load` use it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo.config import EvalConfig
from grpo.config.reading import read_yaml, replace_values
from grpo.engines import EngineError
from grpo.experience.prompts import Prompts
from grpo.experience.sampling import GroupRequest, make_group_requests, sample, sampling_options
from grpo.learning import models
from grpo.run.directory import read_manifest
from grpo.stages.final_model import final_model_path
from grpo.stages.run_context import require_one_rank, scratch_context
from grpo.stages.sampling import Sampler
from grpo.types import Completion, Problem, RunError, UserError

SECTIONS = ("prompt", "sampling", "engine")  # of a run's config, used to sample from its model


class Model:
    """A model on an engine, which later calls use again. A context manager, which closes it.

    The engine also ends when the object is no longer referenced, and with the process. The methods
    can be called from any thread, one call at a time.
    """

    def __init__(
        self, model: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
    ) -> None:
        """Starts an engine with the model and waits until it is ready.

        Args:
            model: A run directory, a model directory or a hub id. For a run, its dtype and its
                prompt, sampling and engine settings are used too.
            overrides: Values of `sampling_config` by dotted key: `{"sampling.max_tokens": 2048}`.

        Raises:
            UserError: The model does not exist, or an override is wrong.
            RunError: The engine does not start.
        """
        require_one_rank("eval --ask (grpo.load)")
        if not isinstance(model, str | os.PathLike):
            raise UserError(f"expected the path of a run or model, or a hub id, got {model!r}")
        self._path = os.fspath(model)
        self._lock = threading.Lock()
        scratch = Path(tempfile.mkdtemp(prefix="grpo-model-"))
        stack = contextlib.ExitStack()
        try:
            self._config = sampling_config(self._path, scratch, overrides or {})
            context = scratch_context(scratch / "run", stack)
            self._sampler = Sampler(self._config, context, None)
            self._sampler.start()
        except BaseException as error:
            stack.close()
            if not isinstance(error, EngineError):  # its message names the log in the directory
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        assert isinstance(self._sampler.prompts, Prompts)  # ChatPrompts are for an endpoint
        self._prompts = self._sampler.prompts
        self._finalizer = weakref.finalize(self, _close, stack, scratch)

    def generate(
        self,
        questions: Sequence[str | Problem],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of each question, in order.

        The prompt template, the stop strings, top-p and top-k are those of the run.

        Args:
            questions: Questions, or problems, of which only the question is used.
            max_tokens: Maximum length of a completion in tokens. Default: `sampling.max_tokens`, or
                fewer after a prompt of more than `prompt.max_tokens`.
            temperature: Sampling temperature; 0 is greedy.
            samples: Completions per question.
            seed: Seed of the sampling. Equal calls return equal completions.

        Raises:
            UserError: An argument is wrong, or a question is too long.
            RunError: The model is closed, or its engine has failed.
        """
        problems = _as_problems(questions)
        _check_sampling(max_tokens, temperature, samples)
        requests = make_group_requests(
            self._prompts, problems, group_size=samples, run_seed=seed, rollout=0
        )
        for request in requests:
            self._check_length(request, max_tokens)
        options = sampling_options(self._config, self._prompts, temperature)
        if max_tokens is not None:
            options = replace(options, max_tokens=max_tokens)
        with self._engine() as engine:
            groups = sample(engine, self._prompts, requests, options)
        return [group.completions for group in groups]

    def ask(self, question: str | Problem) -> Completion:
        """Returns the greedy completion of one question, as `grpo eval --ask` prints it."""
        ((completion,),) = self.generate([question])
        return completion

    @contextlib.contextmanager
    def _engine(self) -> Iterator[Any]:
        """Yields the engine to one caller at a time."""
        with self._lock:
            if not self._finalizer.alive:
                raise RunError(f"{self._path}: the model is closed: load it again")
            try:
                yield self._sampler.engine
            except (KeyboardInterrupt, SystemExit):
                # A late reply of the engine would be taken for the reply to the next call.
                self.close()
                raise

    def _check_length(self, request: GroupRequest, max_tokens: int | None) -> None:
        """Raises UserError if a prompt and its completion exceed the engine's longest sequence."""
        limit = self._config.max_sequence_tokens
        num_prompt_tokens = len(request.request.prompt_ids)
        num_tokens = num_prompt_tokens + (max_tokens or 1)
        if num_tokens <= limit:
            return
        raise UserError(
            f"{request.problem.question[:60]!r}: the prompt has {num_prompt_tokens} tokens, and "
            f"with its completion {num_tokens} or more, but the engine's longest sequence is "
            f"prompt.max_tokens + sampling.max_tokens = {limit}: shorten the question or "
            "max_tokens, or raise one of these two keys when you load the model"
        )

    def close(self) -> None:
        """Ends the engine. Later calls do nothing."""
        self._finalizer()

    def __enter__(self) -> Model:
        """Returns the model; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the model."""
        self.close()

    def __repr__(self) -> str:
        """Returns the model's path and state: `Model('runs/x')`, `Model('runs/x', closed)`."""
        state = "" if self._finalizer.alive else ", closed"
        return f"Model({self._path!r}{state})"


def _close(stack: contextlib.ExitStack, scratch: Path) -> None:
    stack.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _as_problems(questions: Sequence[str | Problem]) -> list[Problem]:
    if isinstance(questions, str):
        raise UserError(f"expected a list of questions, got a string: [{questions[:60]!r}]")
    problems = []
    for question in questions:
        if isinstance(question, Problem):
            problems.append(question)
        elif isinstance(question, str):
            # The seeds depend on the id, so they depend on the question, not on its position.
            problems.append(Problem(id=question, question=question, answer="", source="asked"))
        else:
            raise UserError(f"a question must be a str or a Problem, got {question!r}")
    return problems


def _check_sampling(max_tokens: int | None, temperature: float, samples: int) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: expected 1 or more")
    if samples < 1:
        raise UserError(f"samples={samples}: expected 1 or more")
    if temperature < 0:
        raise UserError(f"temperature={temperature}: expected 0 (greedy) or more")
    if samples > 1 and temperature == 0:
        raise UserError(
            f"samples={samples} with temperature=0 would be equal completions: set a temperature, "
            "for example 1.0"
        )


def sampling_config(model: str, scratch: Path, overrides: Mapping[str, Any]) -> EvalConfig:
    """Returns a config to sample from `model`, with the settings of its run if it is one.

    Args:
        model: A run directory, a model directory or a hub id.
        scratch: An empty directory.
        overrides: Values by dotted key.

    Raises:
        UserError: The run has no final model, or the config is wrong.
    """
    for key in overrides:
        if key != "model.dtype" and key.partition(".")[0] not in SECTIONS:
            raise UserError(
                f"overrides: {key} has no effect on sampling. Expected keys of the sections "
                f"{', '.join(SECTIONS)}, or model.dtype"
            )
    _require_final_model(Path(model))
    config_file = Path(model) / "config.yaml"
    run_tree = read_yaml(str(config_file)) if config_file.exists() else {}
    dtype = run_tree.get("model", {}).get("dtype", "bfloat16")
    if "quantize" in run_tree:
        dtype = "bfloat16"  # vLLM's int4 kernels do not support float32
    tree: dict[str, Any] = {}
    for key in SECTIONS:
        if key in run_tree:
            tree[key] = run_tree[key]
    tree.get("prompt", {}).pop("chat_template", None)  # the model was saved with it
    if not tree:
        model_dir = models.resolve(final_model_path(model), None, scratch / "model", 0)
        has_template = models.load_tokenizer(model_dir).chat_template
        tree["prompt"] = {"template": "chat" if has_template else "plain"}
    tree["run_dir"] = f"{scratch}/run"
    tree["model"] = {"path": final_model_path(model), "dtype": dtype}
    tree["data"] = {"name": "arithmetic"}  # required, not used
    tree["logging"] = {"progress": "off"}
    tree = replace_values(tree, overrides)
    return configs.parse(tree, "overrides" if overrides else model, kind=EvalConfig)


def _require_final_model(folder: Path) -> None:
    """Raises UserError if a directory is a run without a final model."""
    manifest = read_manifest(folder)
    if not manifest or Path(final_model_path(str(folder))).exists():
        return
    if manifest.get("status") != "finished":
        raise UserError(
            f"{folder}: the run has no final model, because it has not finished (status: "
            f"{manifest.get('status')}): resume it first"
        )
    raise UserError(
        f"{folder}: the run has no final model, because `grpo {manifest.get('stage')}` writes none "
        "to this directory. Name the run of a training, or a directory of a model"
    )
