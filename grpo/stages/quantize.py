"""`grpo quantize`: writes a finished model in int8 and int4 and measures its size and accuracy.

The result is in the compressed-tensors format, which vLLM serves. The quantization is post-training
and needs no data: weights are rounded to the nearest step. In int4, the range of each scale is
clipped to minimize the squared error. The int8 schemes also round activations, per token, when the
model runs. Only linear layers are quantized, except the output head.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import EvalConfig, QuantizeConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.quantization import (
    best_scales,
    check_group_size,
    linear_layers,
    quantization_args,
)
from grpo.run.directory import RunDirectory, read_metrics, replace_directory, write_file
from grpo.run.display import redirect_output
from grpo.stages.eval import evaluate
from grpo.stages.resume import require_same_config
from grpo.stages.run_context import RunContext, open_stage, require_one_rank
from grpo.stages.sampling import check_rewards
from grpo.stages.stage import Check, DiskNeeds, MemoryNeeds, Part, ProblemNeeds, Stage, StageNeeds
from grpo.types import Problem, UserError


def quantize(config: QuantizeConfig, *, resume: bool) -> None:
    """Writes one Hugging Face directory per scheme, and a table of sizes and accuracies.

    The table has accuracies if the config has the section `eval`.

    Raises:
        UserError: The config or the model is wrong.
        RunError: An evaluation cannot continue.
        RunInterruptedError: A signal stopped the run. Finished schemes and evaluations are kept.
    """
    require_one_rank("quantize")
    schemes = config.quantize.schemes
    total = len(schemes)
    with open_stage(config, "quantize", total=total, unit="scheme", resume=resume) as context:
        model_dir = _write_schemes(config, context)
        evaluations = _supported_evaluations(context, config.evaluation_configs())
        _evaluate_all(context, evaluations)
        rows = [_table_row("parent", model_dir, evaluations)]
        for scheme in schemes:
            rows.append(_table_row(scheme, context.run.path / scheme, evaluations))
        table = _markdown_table(rows, with_accuracy=bool(evaluations))
        write_file(context.run.path / "table.md", table + "\n")
        write_file(context.run.path / "table.json", json.dumps(rows, indent=2) + "\n")
        context.run.update_manifest(final=schemes[0])
        context.display.say(table)


def _write_schemes(config: QuantizeConfig, context: RunContext) -> Path:
    """Writes the model in each scheme that is not on disk yet. Returns the original model."""
    group_size = config.quantize.group_size
    log_file = context.run.path / "learner.log"
    with redirect_output(log_file):
        model_dir = models.locate(
            config.model, context.run.path, config.seed, on_progress=context.display.download
        )
        tokenizer = models.load_tokenizer(model_dir)
        # Only int4 has groups. A group size of 1 divides every layer.
        checked_group_size = group_size if "int4" in config.quantize.schemes else 1
        check_quantizable(model_dir, checked_group_size)
    for num_done, scheme in enumerate(config.quantize.schemes):
        context.signals.raise_if_received()
        context.display.phase(num_done, "rounding", scheme)
        target = context.run.path / scheme
        if not target.exists():
            with redirect_output(log_file):
                write_quantized(model_dir, target, scheme, group_size, tokenizer)
    return model_dir


def _supported_evaluations(
    context: RunContext, evaluations: Mapping[str, EvalConfig]
) -> dict[str, EvalConfig]:
    """Returns the evaluations without that of int4, if this machine cannot run it."""
    from grpo.metrics.cpu import int4_obstacle

    obstacle = int4_obstacle()
    supported = dict(evaluations)
    if obstacle is not None and supported.pop("int4", None) is not None:
        context.display.say(f"int4 is not evaluated: {obstacle}")
    return supported


def _evaluate_all(context: RunContext, evaluations: Mapping[str, EvalConfig]) -> None:
    """Evaluates the original model and every scheme, except where a finished evaluation exists."""
    for name, config in evaluations.items():
        folder = Path(config.run_dir)
        if RunDirectory.status(folder) == "finished":
            require_same_config(folder, config)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        context.display.say(f"evaluating {name}: {folder}")
        with context.inner_run():
            evaluate(config, resume=False)


def _table_row(name: str, folder: Path, evaluations: Mapping[str, EvalConfig]) -> dict[str, Any]:
    """Returns the size of a model and, if it was evaluated, its accuracy with the 95 % interval.

    `{"model": "int8", "megabytes": 512.3, "accuracy": "71.5%", "interval": "68.0% to 75.1%"}`.
    """
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    row = {"model": name, "megabytes": round(num_bytes / 1e6, 3), "accuracy": "", "interval": ""}
    if name not in evaluations:
        return row
    metrics = read_metrics(Path(evaluations[name].run_dir) / "metrics.jsonl")[-1]
    if "eval/accuracy" in metrics:
        low, high = metrics["eval/accuracy/low"], metrics["eval/accuracy/high"]
        row["accuracy"] = f"{metrics['eval/accuracy']:.1%}"
        row["interval"] = f"{low:.1%} to {high:.1%}"
    return row


def _markdown_table(rows: Sequence[Mapping[str, Any]], *, with_accuracy: bool) -> str:
    columns = ["model", "megabytes"]
    if with_accuracy:
        columns += ["accuracy", "interval"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_quantizable(model_dir: Path, group_size: int) -> None:
    """Raises UserError if a model cannot be quantized. Loads no weights.

    It cannot if it is quantized already, or if the number of inputs of a linear layer is not
    divisible by `group_size`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.path={model_dir}: the model is already quantized: set the original model"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_group_size(model, "quantize.group_size", group_size)


def write_quantized(
    model_dir: Path, target: Path, scheme: str, group_size: int, tokenizer: Any
) -> None:
    """Writes a quantized copy of a model.

    Args:
        model_dir: Directory of the original model.
        target: Directory to write.
        scheme: "int8", "int8_tensor" or "int4".
        group_size: Number of weights per scale in int4.
        tokenizer: Saved with the model.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM

    weights, activations = quantization_args(scheme, group_size)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    groups = {
        "group_0": QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=activations
        )
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    scales = {layer: best_scales(layer.weight.data, weights) for _, layer in linear_layers(model)}
    # The compressor divides weights by scales. In bfloat16, the quotients would round differently.
    for layer, scale in scales.items():
        layer.weight.data = layer.weight.data.float()
        layer.weight_scale.data = scale
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for layer in scales:
        layer.weight_scale.data = layer.weight_scale.data.to(model.dtype)
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch)
        compressor.update_config(str(scratch))
        tokenizer.save_pretrained(scratch)
        models.support_transformers_4(scratch)


class _QuantizeStage:
    command = "quantize"
    config_class = QuantizeConfig
    sections = ("quantize",)

    def run(self, config: QuantizeConfig, *, resume: bool) -> None:
        quantize(config, resume=resume)

    def batch_arithmetic(self, config: QuantizeConfig) -> str:
        settings = config.quantize
        return (
            f"schemes     {', '.join(settings.schemes)}; int4 has one scale per "
            f"{settings.group_size} weights"
        )

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

    def dry_run_lines(self, config: QuantizeConfig) -> list[str]:
        check_rewards(config)
        return []

    def checks(
        self, config: QuantizeConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[QuantizeConfig] = _QuantizeStage()
