"""`grpo quantize`: writes a finished model in int8 and int4, and tells what that costs in accuracy.

The format is compressed-tensors, which vLLM serves.

This is post-training and needs no data: weights are rounded to the nearest step, each range clipped
where the squared error is least; int8 schemes round activations too, token by token, when the model
runs. Embeddings and the output head stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo.config import EvalConfig, QuantizeConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.quantization import arguments, best_scale, check_groups, linear_layers
from grpo.run.directory import RunDirectory, read_metrics, replace_directory, write_file
from grpo.run.display import quiet
from grpo.stages.eval import eval
from grpo.stages.resume import check_same
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import check_rewards
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import Problem, UserError


def quantize(config: QuantizeConfig, *, resume: bool) -> None:
    """Writes a Hugging Face directory per scheme, and a table of sizes (with `eval`: accuracies).

    Raises UserError, RunError, Interrupted.
    """
    require_one_rank("quantize")
    schemes = config.quantize.schemes
    group_size = config.quantize.group_size
    evaluations = config.judged()
    total = len(schemes)
    with open_stage(config, "quantize", total=total, unit="scheme", resume=resume) as context:
        log = context.run.path / "learner.log"
        with quiet(log):
            model_dir = models.locate(config.model, context.run.path, config.seed)
            tokenizer = models.load_tokenizer(model_dir)
            check(model_dir, group_size if "int4" in schemes else 1)
        for done, scheme in enumerate(schemes):
            context.signals.check()
            context.display.phase(done, "rounding", scheme)
            target = context.run.path / scheme
            if not target.exists():
                with quiet(log):
                    write_quantized(model_dir, target, scheme, group_size, tokenizer)
        _evaluate(context, evaluations)
        rows = [_row("parent", model_dir, evaluations)]
        rows += [_row(scheme, context.run.path / scheme, evaluations) for scheme in schemes]
        table = _markdown(rows, with_accuracy=bool(evaluations))
        write_file(context.run.path / "table.md", table + "\n")
        write_file(context.run.path / "table.json", json.dumps(rows, indent=2) + "\n")
        context.run.update_manifest(final=schemes[0])
        context.display.say(table)


def _evaluate(context: RunContext, evaluations: dict[str, EvalConfig]) -> None:
    """Evaluates the model and every scheme, unless that was finished by an earlier start."""
    for name, config in evaluations.items():
        folder = Path(config.run_dir)
        if RunDirectory.status(folder) == "finished":
            check_same(folder, config)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        context.display.say(f"judging {name}: {folder}")
        eval(config, resume=False)


def _row(name: str, folder: Path, evaluations: dict[str, EvalConfig]) -> dict[str, Any]:
    """Returns a model's size, and its accuracy with the 95 % interval where it was evaluated."""
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    row = {"model": name, "megabytes": round(num_bytes / 1e6, 3), "accuracy": "", "interval": ""}
    if not evaluations:
        return row
    metrics = read_metrics(Path(evaluations[name].run_dir) / "metrics.jsonl")[-1]
    if "eval/accuracy" in metrics:
        low, high = metrics["eval/accuracy/low"], metrics["eval/accuracy/high"]
        row["accuracy"] = f"{metrics['eval/accuracy']:.1%}"
        row["interval"] = f"{low:.1%} to {high:.1%}"
    return row


def _markdown(rows: list[dict[str, Any]], *, with_accuracy: bool) -> str:
    columns = ["model", "megabytes"]
    if with_accuracy:
        columns += ["accuracy", "interval"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def check(model_dir: Path, group_size: int) -> None:
    """Raises UserError for a model that cannot be quantised, before any weight is loaded.

    Such a model is quantised already, or the groups do not divide its layers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir)
    if getattr(config, "quantization_config", None):
        raise UserError(f"model.path={model_dir}: is quantised already")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_groups(model, "quantize.group_size", group_size)


def write_quantized(
    model_dir: Path, target: Path, scheme: str, group_size: int, tokenizer: Any
) -> None:
    """Writes the model of `model_dir` in a scheme (int8, int8_tensor, int4) to `target`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM

    weights, activations = arguments(scheme, group_size)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    groups = {
        "group_0": QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=activations
        )
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    scales = {layer: best_scale(layer.weight.data, weights) for _, layer in linear_layers(model)}
    # weight / scale in float32: in bfloat16 it would round to other steps
    for layer, scale in scales.items():
        layer.weight.data, layer.weight_scale.data = layer.weight.data.float(), scale
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for layer in scales:
        layer.weight_scale.data = layer.weight_scale.data.to(model.dtype)
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch)
        compressor.update_config(str(scratch))
        tokenizer.save_pretrained(scratch)


class _QuantizeStage:
    command = "quantize"
    config_class = QuantizeConfig
    sections = ("quantize",)

    def run(self, config: QuantizeConfig, *, resume: bool) -> None:
        quantize(config, resume=resume)

    def arithmetic(self, config: QuantizeConfig) -> str:
        settings = config.quantize
        return f"schemes     {', '.join(settings.schemes)}; int4 in groups of {settings.group_size}"

    def needs(self, config: QuantizeConfig) -> StageNeeds:
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(training=config.data),
            memory=MemoryNeeds(engine=config.eval is not None),
            disk=DiskNeeds(models=len(config.quantize.schemes)),
            rewards=tuple(config.rewards),
        )

    def parts(self, config: QuantizeConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def preview(self, config: QuantizeConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: QuantizeConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[QuantizeConfig] = _QuantizeStage()
