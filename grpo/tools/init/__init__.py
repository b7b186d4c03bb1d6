"""`grpo init CONFIG --model MODEL --data DATA`: writes a config for a model, data and a machine.

data.py      what DATA names, and which reward can verify its answers
model.py     the size of the model, and the prompt for it
sizes.py     lengths, numbers and learning rates
hardware.py  the machine: this one, or a described one
plan.py      the plans that save memory, and the first one that fits
cost.py      the time of a step on a CPU
text.py      the file with its comments

Every decision is a `Setting`: a key, its value, and the reason, which becomes a comment.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.metrics.cpu import bfloat16_warning
from grpo.metrics.memory import GB
from grpo.run.directory import write_file
from grpo.tools.init.cost import in_words, step_seconds
from grpo.tools.init.data import read_data
from grpo.tools.init.hardware import Hardware, choose_hardware
from grpo.tools.init.model import choose_prompt, read_model
from grpo.tools.init.plan import Fit, Run, choose_plan, memory_comments
from grpo.tools.init.settings import (
    Overrides,
    Setting,
    make_comments,
    make_tree,
    read_overrides,
)
from grpo.tools.init.sizes import (
    Facts,
    fit_context,
    measure_lengths,
    prompt_settings,
    sft_settings,
    train_settings,
)
from grpo.tools.init.text import WIDTH, flow, render, wrap_command
from grpo.types import UserError

SUFFIXES = (".yaml", ".yml")
TORCHRUN = "launch/torchrun.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """The arguments of `grpo init`.

    Attributes:
        path: The file to write.
        model: Hub id, local directory or run directory.
        data: Name of a data set, file, folder, `module:function` or hub id.
        stage: `train` or `sft`.
        gpus: Number of GPUs of the machine. None: those of this machine.
        gpu_gb: Memory of a GPU in GiB. None: that of this machine's GPUs.
        overrides: Assignments, e.g. `("train.rollouts=5",)`.
    """

    path: str
    model: str
    data: str
    stage: str = "train"
    gpus: int | None = None
    gpu_gb: float | None = None
    overrides: Sequence[str] = ()

    def command_parts(self) -> list[str]:
        """Returns the command line in parts that belong together, such as "--stage sft"."""
        parts = ["grpo init", shlex.quote(self.path)]
        parts += [f"--model {shlex.quote(self.model)}", f"--data {shlex.quote(self.data)}"]
        if self.stage != "train":
            parts.append(f"--stage {self.stage}")
        if self.gpus is not None:
            parts.append(f"--gpus {self.gpus}")
        if self.gpu_gb is not None:
            parts.append(f"--gpu-gb {self.gpu_gb:g}")
        return [*parts, *(shlex.quote(word) for word in self.overrides)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewConfig:
    """Everything that was decided for a new config."""

    options: InitOptions
    facts: Facts
    fit: Fit
    settings: list[Setting]

    @property
    def tree(self) -> dict[str, Any]:
        """The config as nested dicts."""
        return make_tree(self.settings, self.facts.overrides)

    @property
    def needs_cold_start(self) -> bool:
        """Whether the model has to learn the tags from worked solutions first."""
        model = self.facts.model
        return (
            self.options.stage == "train"
            and not model.follows_instructions
            and not model.run_prompt
            and not self.facts.overrides.has("model.warm_start")
        )


def init(options: InitOptions) -> None:
    """Writes a commented config, and prints the decisions and the next commands.

    Args:
        options: The arguments of the command.

    Raises:
        UserError: The file exists; an argument, the model or the data is wrong; or the model does
            not fit on the machine.
        DownloadError: The model or the data cannot be reached.
    """
    path = Path(options.path)
    _check_target(path)
    overrides = read_overrides(options.stage, options.overrides)
    hardware = choose_hardware(options.gpus, options.gpu_gb)
    new = _decide(options, overrides, hardware)
    try:
        write_file(path, text_of(new))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    print(_summary(new))


def _check_target(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected the name of a new config, which ends in .yaml")
    if path.exists():
        raise UserError(f"{path}: exists already: choose another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable")


def _decide(options: InitOptions, overrides: Overrides, hardware: Hardware) -> NewConfig:
    data = read_data(options.data, options.stage, overrides)
    model = read_model(options.model, overrides)
    prompt = choose_prompt(model, data.problems, options.stage, overrides)
    facts = Facts(
        data=data,
        model=model,
        prompt=prompt,
        lengths=measure_lengths(data, model, prompt, overrides),
        hardware=hardware,
        overrides=overrides,
    )
    settings = [
        Setting("run_dir", f"runs/{Path(options.path).stem}"),
        Setting("seed", 0),
        Setting("model.path", model.path, str(model)),
        _dtype_setting(hardware),
        *data.settings,
        *prompt_settings(facts),
    ]
    if options.stage == "train":
        settings = fit_context([*settings, *train_settings(facts)], facts)
    else:
        settings += sft_settings(facts)
    run = Run(
        stage=options.stage,
        settings=tuple(settings),
        overrides=overrides,
        shape=model.shape,
        num_heads=model.num_heads,
    )
    fit = choose_plan(run, hardware)
    settings += memory_comments(run, fit, hardware)
    if not facts.on_gpu:
        settings.append(_cost_setting(run, fit, facts))
    return NewConfig(options=options, facts=facts, fit=fit, settings=settings)


def _dtype_setting(hardware: Hardware) -> Setting:
    if hardware.num_gpus == 0 and bfloat16_warning() is not None:
        return Setting(
            "model.dtype", "float32", "on a CPU without AVX-512, bfloat16 is much slower"
        )
    return Setting("model.dtype", "bfloat16")


def _cost_setting(run: Run, fit: Fit, facts: Facts) -> Setting:
    """Returns the number of rollouts or updates, with their estimated time on this CPU."""
    config = run.config(fit.plan.settings)
    seconds = step_seconds(config, run.shape, facts.lengths, run.stage)
    num_cores = facts.hardware.num_cores
    if run.stage == "train":
        key, count = "train.rollouts", config.train.rollouts
        comment = f"up to {in_words(seconds)} each on {num_cores} cores, if completions are cut off"
    else:
        key, count = "sft.updates", config.sft.updates
        comment = f"about {in_words(seconds)} each on {num_cores} cores"
    comment += f"; {in_words(count * seconds)} in all"
    return Setting(key, count, comment)


def text_of(new: NewConfig) -> str:
    """Returns the text of the config file."""
    tree = new.tree
    comments = {"data.name": f"{new.facts.data.num_training:,} training problems"}
    comments |= make_comments(new.settings, new.facts.overrides)
    return render(_header(new), tree, comments, _suggestions(new, tree))


def _header(new: NewConfig) -> list[str]:
    return [
        *wrap_command(new.options.command_parts()),
        f"For {new.facts.hardware}: {new.fit.plan.name}. Check it, then run it:",
        *(f"  {command}" for command in _next_commands(new)),
    ]


def _next_commands(new: NewConfig) -> list[str]:
    path = shlex.quote(new.options.path)
    doctor = f"grpo doctor {path}"
    if new.facts.hardware.is_described:
        doctor += f" --gpus --gpu-gb {new.facts.hardware.memory_gb:g}"
    if new.fit.num_ranks == 1:
        return [doctor, f"grpo {new.options.stage} {path}"]
    run = f"GPUS={new.fit.num_ranks} ./{TORCHRUN} {new.options.stage} {path}"
    if Path(TORCHRUN).is_file():
        return [doctor, run]
    return [doctor, "grpo files --copy .", run]  # grpo is installed from a wheel


def _cold_start(new: NewConfig) -> InitOptions:
    """Returns the options for the config that teaches a small model the tags."""
    path = Path(new.options.path)
    return replace(
        new.options,
        path=str(path.with_name(f"{path.stem}_sft{path.suffix}")),
        stage="sft",
        overrides=[word for word in new.options.overrides if word.startswith("data.")],
    )


def _suggestions(new: NewConfig, tree: dict[str, Any]) -> dict[str, list[str]]:
    """Returns keys that are often changed next, by section, as lines that are commented out."""
    suggestions: dict[str, list[str]] = {}
    if new.needs_cold_start and new.facts.data.has_solutions:
        cold_start = _cold_start(new)
        command = wrap_command(cold_start.command_parts(), WIDTH - 6)
        suggestions["model"] = [
            "So small a model does not use <think> and <answer> by itself. Teach it first:",
            *(f"  {line}" for line in command),
            f"warm_start: {flow(cold_start.path)}",
        ]
    if new.options.stage == "train":
        lines = {
            "no_signal": "no_signal: resample # replace groups that are all right or all wrong",
            "truncated": "truncated: mask # no loss on completions that are cut off",
        }
        algorithm = tree["algorithm"]
        suggestions["algorithm"] = [line for key, line in lines.items() if key not in algorithm]
    elif "stop_at" not in tree["sft"]:
        suggestions["sft"] = ["stop_at: 0.95 # stop early at this token accuracy"]
    if "logging" not in tree:
        suggestions[""] = ["logging: {trackers: [tensorboard]} # curves of the metrics; or wandb"]
    return suggestions


def _summary(new: NewConfig) -> str:
    """Returns the decisions and the next commands."""
    tree, data = new.tree, new.facts.data
    is_training = new.options.stage == "train"
    num_problems = f"{data.num_training:,} training problems"
    if is_training:
        num_problems += f", {data.num_held_out:,} held out"
    lines = [
        f"wrote {new.options.path} for {new.facts.hardware}",
        f"  model    {new.facts.model.path}: {new.facts.model}",
        f"  data     {new.options.data}: {num_problems}",
        f"  prompt   {flow(tree['prompt'])}",
    ]
    if is_training:
        lines.append(f"  rewards  {flow(tree['rewards'])}")
    memory = f"{new.fit.plan.name}; learner {new.fit.learner.total_bytes / GB:.1f} GB"
    if new.fit.engine_bytes:
        memory += f", engine {new.fit.engine_bytes / GB:.1f} GB"
    lines += [f"  memory   {memory} (estimates)", "next:"]
    commands = _next_commands(new)
    if new.needs_cold_start and data.has_solutions:
        cold_start = _cold_start(new)
        lines.append("  # a cold start, because so small a model does not use the tags by itself")
        *checks, run = commands
        run = f"{run} model.warm_start={shlex.quote(cold_start.path)}"
        commands = [*checks, " ".join(cold_start.command_parts()), run]
    return "\n".join([*lines, *(f"  {command}" for command in commands)])
