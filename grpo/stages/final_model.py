"""The final model of a run: `write_final` writes it, `final_model_path` finds it for other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo.config import RunConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.run import ranks
from grpo.run.directory import read_manifest
from grpo.run.display import redirect_output
from grpo.stages.model_card import model_card
from grpo.stages.run_context import RunContext


def write_final(
    context: RunContext, config: RunConfig, model_dir: Path, tokenizer: Any, learner: Any
) -> None:
    """Writes the trained model to `final/`, and with LoRA the adapter to `adapter/`.

    All ranks must call it.

    Args:
        context: The run.
        config: The config of the run.
        model_dir: The model that the run started from.
        tokenizer: The tokenizer of that model. It gets the chat template of the run's prompts.
        learner: An object with `weights()`, which all ranks call, and `save_adapter(folder)`.
    """
    folder = context.run.path
    is_rank0 = ranks.rank() == 0
    with redirect_output(context.run.log_file("learner")):
        # The tokenizer has the template of `prompt.chat_template`. The file may have changed since
        # the start, so it is not read again.
        settings = config.prompt.model_copy(update={"chat_template": None})
        prompts = Prompts(settings, tokenizer, models.eos_token_ids(model_dir))
        tokenizer.chat_template = prompts.chat_template_to_save()
        weights = {}
        for name, tensor in learner.weights():
            if is_rank0:
                weights[name] = tensor.detach().cpu().clone()
        if is_rank0:
            models.save_final(
                folder / "final",
                model_dir,
                weights,
                tokenizer,
                dtype=config.model.dtype,
                ends=models.CompletionEnds(prompts.stop_token_ids, prompts.stop),
                card=model_card(config, prompts, tokenizer),
            )
            if config.model.lora:
                learner.save_adapter(folder / "adapter")
        ranks.all_gather("the finished model", None)
    context.display.say(f"finished: {folder / 'final'}")


def final_model_path(path: str) -> str:
    """Returns the final model of a run directory. Any other path is returned unchanged."""
    manifest = read_manifest(Path(path))
    if not manifest:
        return path
    return str(Path(path) / manifest.get("final", "final"))
