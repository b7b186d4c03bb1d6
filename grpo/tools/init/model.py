"""The model of a new config: its size, whether it is a chat model, and the prompt for it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import ModelSettings, PromptSettings
from grpo.config.reading import read_yaml
from grpo.experience.prompts import EXAMPLE, SYSTEM, Prompts
from grpo.learning import models
from grpo.metrics.roofline import ModelShape, model_shape
from grpo.run.directory import read_manifest
from grpo.run.display import Display, redirect_output
from grpo.stages.final_model import final_model_path
from grpo.tools.init.settings import Overrides, Setting
from grpo.types import DownloadError, Problem, UserError, first_line

# Smaller models do not follow an instruction about the format of their answer. The smallest model
# in configs/ that is asked for tags, Qwen2.5-0.5B-Instruct, has 494M weights.
MIN_INSTRUCTED_WEIGHTS = 400_000_000
PROMPT_KEYS = ("template", "chat_template", "system", "think_prefill", "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model as far as its config and its tokenizer describe it. No weights are loaded.

    Attributes:
        path: The value of `model.path`: a run is replaced by its final model.
        tokenizer: The tokenizer.
        eos_token_ids: The tokens that end a completion.
        shape: Sizes of the model.
        num_heads: Number of query heads and of key-value heads.
        context_tokens: Longest sequence in tokens; None if the model states no limit.
        run_prompt: The prompt section of the run that trained the model; empty for other models.
    """

    path: str
    tokenizer: Any
    eos_token_ids: list[int]
    shape: ModelShape
    num_heads: tuple[int, int]
    context_tokens: int | None
    run_prompt: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether the model was trained on its chat template.

        The tokenizer of a base model may have one, too, but then the token at the end of its turns
        is no EOS token of the model.
        """
        if self.tokenizer.chat_template is None:
            return False
        stop = ["any"]  # for a model without EOS tokens
        chat = self.prompts(PromptSettings(template="chat", stop=stop))
        plain = self.prompts(PromptSettings(template="plain", stop=stop))
        return chat.stop_token_ids == plain.stop_token_ids

    @property
    def num_weights(self) -> str:
        """The number of weights in words, e.g. "135M" or "1.54B"."""
        if self.shape.num_weights >= 1e9:
            return f"{self.shape.num_weights / 1e9:.2f}B"
        return f"{self.shape.num_weights / 1e6:,.0f}M"

    @property
    def follows_instructions(self) -> bool:
        """Whether the model is large enough to be asked for a format."""
        return self.shape.num_weights >= MIN_INSTRUCTED_WEIGHTS

    def prompts(self, settings: PromptSettings) -> Prompts:
        """Returns the prompts of a config section for this model."""
        return Prompts(settings, self.tokenizer, self.eos_token_ids)

    def __str__(self) -> str:
        """Returns the model in words, e.g. "1.54B weights, a chat model, context 32,768 tokens"."""
        kind = "a chat model" if self.is_chat else "a base model"
        if self.run_prompt:
            kind = "trained by grpo"
        context = f", context {self.context_tokens:,} tokens" if self.context_tokens else ""
        return f"{self.num_weights} weights, {kind}{context}"


def read_model(model: str, overrides: Overrides) -> ModelFacts:
    """Reads the config and the tokenizer of a model.

    Args:
        model: Hub id, local directory or run directory.
        overrides: The assignments of the command line.

    Raises:
        UserError: There is no such model, or it has no tokenizer.
        DownloadError: The hub cannot be reached, and there is no cached copy.
    """
    path = final_model_path(overrides.get("model.path", model))
    values = {**overrides.get("model", {}), "path": path}
    settings = ModelSettings.model_validate(values)
    with tempfile.TemporaryDirectory(prefix="grpo-init-") as scratch:
        folder = Path(scratch)
        model_dir = _locate(settings, folder, overrides.get("seed", 0))
        with redirect_output(folder / "log"):
            tokenizer = models.load_tokenizer(model_dir)
        try:
            shape = model_shape(model_dir, models.num_weights(model_dir), settings.dtype)
            config = json.loads((model_dir / "config.json").read_text())
            num_query_heads = config["num_attention_heads"]
        except KeyError as error:
            raise UserError(
                f"--model {model}: its config.json has no {error}: expected a language model of "
                "text, such as Llama or Qwen"
            ) from None
        # transformers raises many types of errors for values that are wrong.
        except Exception as error:
            raise UserError(
                f"--model {model}: its config.json cannot be read: {first_line(error)}"
            ) from None
        return ModelFacts(
            path=path,
            tokenizer=tokenizer,
            eos_token_ids=models.eos_token_ids(model_dir),
            shape=shape,
            num_heads=(num_query_heads, config.get("num_key_value_heads") or num_query_heads),
            context_tokens=models.context_tokens(model_dir),
            run_prompt=_run_prompt(path),
        )


def _locate(settings: ModelSettings, folder: Path, seed: int) -> Path:
    """Returns the directory with the model's config and tokenizer."""
    with Display("auto", 1, "check") as display, redirect_output(folder / "log"):
        try:
            return models.locate(
                settings, folder, seed, weights=False, on_progress=display.download
            )
        except DownloadError as error:
            raise DownloadError(
                f"{error}. Check the name; or run grpo init where the hub can be reached; or copy "
                "the model's directory to this machine, and name it as --model"
            ) from None


def _run_prompt(path: str) -> dict[str, Any]:
    """Returns the prompt of the run that trained the model at `path`, without its defaults."""
    run_dir = Path(path).parent
    file = run_dir / "config.yaml"
    if not read_manifest(run_dir) or not file.is_file():
        return {}
    section = read_yaml(str(file)).get("prompt") or {}
    try:
        settings = PromptSettings.model_validate(section)
    except ValueError as error:
        raise UserError(f"{file}: the section prompt is not valid: {error}") from None
    values = settings.model_dump(include=set(PROMPT_KEYS), exclude_defaults=True)
    return {"template": settings.template, **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChoice:
    """The prompt of a config: `settings` of section `prompt`, without the maximum length.

    `has_tags` states whether completions are expected to have the tags that `format` looks for.
    """

    settings: list[Setting]
    has_tags: bool


def choose_prompt(
    model: ModelFacts, problems: Sequence[Problem], stage: str, overrides: Overrides
) -> PromptChoice:
    """Returns the prompt for a model.

    Args:
        model: The model.
        problems: Training problems. Supervised training needs a prompt that fits their solutions.
        stage: `train` or `sft`.
        overrides: The assignments of the command line.
    """
    template = overrides.get("prompt.template")
    if template is None and model.run_prompt:
        return _prompt_of_run(model)
    has_tags = stage == "train" or _solutions_have_tags(problems)
    reason = ""
    if template is None:
        template, reason = _choose_template(model, has_tags=has_tags)
    settings = [Setting("prompt.template", template, reason)]
    if template == "chat" and not overrides.has("prompt.system"):
        has_tags = has_tags and _can_ask_for_tags(model)
        if has_tags:
            comment = "asks for <think> and <answer>, where the rewards look for the answer"
            settings.append(Setting("prompt.system", "r1", comment))
    return PromptChoice(settings=settings, has_tags=has_tags)


def _prompt_of_run(model: ModelFacts) -> PromptChoice:
    settings = [Setting(f"prompt.{key}", value) for key, value in model.run_prompt.items()]
    settings[0] = settings[0]._replace(comment="as in the run that trained this model")
    has_tags = model.run_prompt["template"] != "chat" or "system" in model.run_prompt
    return PromptChoice(settings=settings, has_tags=has_tags)


def _choose_template(model: ModelFacts, *, has_tags: bool) -> tuple[str, str]:
    """Returns the template and the reason for it."""
    if not model.follows_instructions:
        return "plain", "the question alone: so small a model does not follow instructions"
    if model.is_chat:
        return "chat", "the tokenizer's: its end of a turn is an EOS token of the model"
    if not has_tags:
        return "plain", "a base model; the solutions have no <answer>, so none is asked for"
    return "r1_zero", "DeepSeek-R1-Zero's, for base models: it asks for <think> and <answer>"


def _can_ask_for_tags(model: ModelFacts) -> bool:
    """Returns whether the chat template takes a system prompt and leaves the thoughts to it."""
    try:
        prompts = model.prompts(PromptSettings(template="chat", system="r1"))
    except UserError:  # the template cannot be rendered with a system prompt
        return False
    return SYSTEM["r1"] in prompts.text(EXAMPLE) and not prompts.prefill(EXAMPLE)


def _solutions_have_tags(problems: Sequence[Problem]) -> bool:
    """Returns whether all solutions end in `<answer>`. Those without thoughts get both tags."""
    solutions = [problem.solution for problem in problems if problem.solution]
    return all("<think>" not in solution or "<answer>" in solution for solution in solutions)
