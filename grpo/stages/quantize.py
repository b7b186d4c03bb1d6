"""`grpo quantize`: a finished model in int8 and int4, in the format (compressed-tensors) that vLLM serves, and what that costs in accuracy.

Post-training and without data: weights are rounded to the nearest step, each range clipped where the squared error is least; int8 schemes
round activations too, token by token, when the model runs. Embeddings and the output head stay as they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo import models
from grpo.checkpoint import RunDirectory, read_metrics, replace_directory, write_file
from grpo.config_stages import QuantizeConfig
from grpo.metrics import quiet
from grpo.stages._run import check_same, open_stage
from grpo.types import UserError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a 4-bit range that are tried


def quantize(config: QuantizeConfig, *, resume: bool) -> None:
    """Writes a Hugging Face directory a scheme, and with `eval` table.md. Raises UserError, RunError, Interrupted."""
    from grpo.stages.eval import eval

    schemes, judged = config.quantize.schemes, config.judged()
    with open_stage(config, "quantize", total=len(schemes), unit="scheme", resume=resume) as stage:
        with quiet(stage.run.path / "learner.log"):
            model_dir = models.locate(config.model, stage.run.path, config.seed)
            tokenizer = models.load_tokenizer(model_dir)
            check(model_dir, config.quantize.group_size if "int4" in schemes else 1)
        for done, scheme in enumerate(schemes):
            stage.signals.check()
            stage.display.phase(done, "rounding", scheme)
            if not (target := stage.run.path / scheme).exists():
                with quiet(stage.run.path / "learner.log"):
                    write_quantized(model_dir, target, scheme, config.quantize.group_size, tokenizer)
        for name, part in judged.items():
            folder = Path(part.run_dir)
            if RunDirectory.status(folder) == "finished":
                check_same(folder, part)
                continue
            shutil.rmtree(folder, ignore_errors=True)
            stage.display.say(f"judging {name}: {folder}")
            eval(part, resume=False)
        rows = [_row(name, model_dir if name == "parent" else stage.run.path / name, judged) for name in ("parent", *schemes)]
        columns = ("model", "megabytes", *(("accuracy", "interval") if judged else ()))
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
        write_file(stage.run.path / "table.md", "\n".join(lines) + "\n")
        write_file(stage.run.path / "table.json", json.dumps(rows, indent=2) + "\n")
        stage.run.update_manifest(final=schemes[0])
        stage.display.say("\n".join(lines))


def _row(name: str, folder: Path, judged: dict[str, Any]) -> dict[str, Any]:
    size = round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6, 3)
    found = read_metrics(Path(judged[name].run_dir) / "metrics.jsonl")[-1] if judged else {}
    low, high = found.get("eval/accuracy/low"), found.get("eval/accuracy/high")
    return {
        "model": name, "megabytes": size, "accuracy": f"{found['eval/accuracy']:.1%}" if "eval/accuracy" in found else "",
        "interval": f"{low:.1%} to {high:.1%}" if low is not None else "",
    }  # fmt: skip


def check(model_dir: Path, group_size: int) -> None:
    """Raises UserError, before any weight is loaded, for a model that is quantised already or whose layers the groups do not divide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir)
    if getattr(config, "quantization_config", None):
        raise UserError(f"model.path={model_dir}: is quantised already")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, layer in linear_layers(model):
        if layer.in_features % group_size:
            raise UserError(f"quantize.group_size={group_size} does not divide the {layer.in_features} inputs of {name}: try 32 or 64")


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    """Returns what is rounded: every linear layer but the output head. A mixture's experts are no linear layers and stay."""
    import torch

    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def write_quantized(model_dir: Path, target: Path, scheme: str, group_size: int, tokenizer: Any) -> None:
    """Writes the model of `model_dir` in a scheme (int8, int8_tensor, int4) to `target`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from transformers import AutoModelForCausalLM

    weights, activations = arguments(scheme, group_size)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for _, layer in linear_layers(model):
        layer.weight_scale.data.copy_(best_scale(layer.weight.data, weights))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch)
        compressor.update_config(str(scratch))
        tokenizer.save_pretrained(scratch)


def arguments(scheme: str, group_size: int) -> tuple[QuantizationArgs, QuantizationArgs | None]:
    """Returns how weights are rounded, and activations where they are."""
    from compressed_tensors.quantization import QuantizationArgs

    by_token = QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True)
    return {
        "int8": (QuantizationArgs(num_bits=8, strategy="channel", symmetric=True), by_token),
        "int8_tensor": (QuantizationArgs(num_bits=8, strategy="tensor", symmetric=True), by_token),
        "int4": (QuantizationArgs(num_bits=4, strategy="group", group_size=group_size, symmetric=True), None),
    }[scheme]


def best_scale(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns the scales of a weight [out, in]: [1], [out, 1] or [out, groups], each clipped where its own squared error is least."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weight.float()
    parts = {
        "tensor": lambda w: w.reshape(1, 1, -1), "channel": lambda w: w.unsqueeze(1),
        "group": lambda w: w.unflatten(1, (-1, args.group_size or 1)),
    }[args.strategy]  # [.., .., values of one scale]  # fmt: skip
    low, high = parts(weight).amin(-1), parts(weight).amax(-1)
    best: Tensor | None = None
    least = torch.empty(())
    for clip in CLIPS if args.num_bits == 4 else (1.0,):
        scale, zero = calculate_qparams(low * clip, high * clip, args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        error = (parts(fake_quantize(weight, scale, zero, args)) - parts(weight)).square().sum(-1).reshape(scale.shape)
        if best is None:
            best, least = scale, error
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    assert best is not None
    return best
