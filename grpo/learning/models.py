"""Models and tokenizers: where they come from, and how they are created, loaded and saved.

A model comes from a local directory or from the Hugging Face hub (grpo/learning/hub.py). Tiny
models are created with random weights.

Importing this file does not import torch or transformers; its functions import them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.learning import hub
from grpo.run.directory import replace_directory
from grpo.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from grpo.config.model import ModelSettings, RopeSettings


TINY_MODELS = (
    "tiny-llama",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-qwen3-moe",
    "tiny-deepseek-v3",
    "micro-qwen2",
)
TINY_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# The config of a tiny model. The model is wide and shallow: on two cores it learns worked sums in a
# quarter of the time that a 6-layer model of the same size takes.
TINY_CONFIG = {
    "hidden_size": 384,
    "intermediate_size": 832,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Changes and additions to TINY_CONFIG, by the name of the tiny model.
TINY_CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "tiny-qwen3-moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 416,
    },
    "tiny-deepseek-v3": {
        "num_key_value_heads": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 416,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "q_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        # vLLM's CPU kernel supports no sizes other than 512 + 64.
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "head_dim": 64,
    },
    "micro-qwen2": {
        "hidden_size": 192,
        "intermediate_size": 416,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}


def locate(
    settings: ModelSettings,
    folder: Path,
    seed: int,
    *,
    weights: bool = True,
    on_progress: hub.ProgressCallback | None = None,
) -> Path:
    """Returns the directory of the config's model, with a longer context if configured.

    Args:
        settings: The config section `model`.
        folder: Where a tiny model, or a model with a longer context, is created.
        seed: The seed of a tiny model's weights.
        weights: Whether to download the weights from the hub, or only configs and tokenizer.
        on_progress: As `hub.download`.

    Raises:
        UserError: As `resolve` and `extend_context`.
        DownloadError: As `resolve`.
    """
    model_dir = resolve(
        settings.path,
        settings.revision,
        folder / "model",
        seed,
        weights=weights,
        on_progress=on_progress,
    )
    return extend_context(model_dir, settings.rope, folder / "model_extended")


def resolve(  # noqa: PLR0913 - the model, where a tiny one is made, and how it is downloaded
    path: str,
    revision: str | None,
    tiny_dir: Path,
    seed: int,
    *,
    weights: bool = True,
    on_progress: hub.ProgressCallback | None = None,
) -> Path:
    """Returns a local Hugging Face directory for a value of `model.path`.

    Args:
        path: The name of a tiny model (TINY_MODELS), a local directory, or a hub id (owner/name).
        revision: The hub revision. None: the default branch.
        tiny_dir: Where a tiny model is created, if it does not exist yet.
        seed: The seed of a tiny model's weights.
        weights: Whether to download the weights from the hub, or only configs and tokenizer.
        on_progress: As `hub.download`.

    Raises:
        UserError: The path names no model, the hub rejects the request, or transformers cannot
            import a model in this environment.
        DownloadError: The hub cannot be reached, and there is no cached copy.
    """
    _check_torchvision()
    if path in TINY_MODELS:
        if not (tiny_dir / "config.json").exists():
            make_tiny(path, tiny_dir, seed)
        return tiny_dir
    if Path(path).is_dir():
        _check_model_directory(path)
        return Path(path)
    if (Path(path).parent / "manifest.json").is_file():
        raise UserError(f"model.path={path}: no such directory: the run has not finished")
    if not is_hub_id(path):
        raise UserError(
            f"model.path={path}: no such directory. Expected a local directory, a hub id "
            f"(owner/name), or one of {', '.join(TINY_MODELS)}."
        )
    return hub.download(path, revision, weights=weights, on_progress=on_progress)


def resolve_teachers(
    settings: ModelSettings,
    folder: Path,
    seed: int,
    *,
    on_progress: hub.ProgressCallback | None = None,
) -> dict[str, Path]:
    """Returns the directories of all teachers by name; that of `model.teacher` has the name "".

    Args:
        settings: The config section `model`.
        folder: Where tiny models are created.
        seed: The seed of a tiny model's weights.
        on_progress: As `hub.download`.

    Raises:
        UserError: As `resolve`.
        DownloadError: As `resolve`.
    """
    teacher_dirs = {}
    for name, path in settings.all_teachers.items():
        key = f"model.teachers.{name}" if name else "model.teacher"
        tiny_dir = folder / (f"teacher_{name}" if name else "teacher")
        try:
            teacher_dirs[name] = resolve(path, None, tiny_dir, seed, on_progress=on_progress)
        except UserError as error:
            raise type(error)(str(error).replace("model.path=", f"{key}=", 1)) from error
    return teacher_dirs


def _check_torchvision() -> None:
    """Raises UserError if torchvision is installed for another torch.

    transformers then fails to import every model. The extra `cpu` installs such a torchvision where
    the package index has only the builds for CUDA.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise UserError(
            f"torchvision cannot be imported ({first_line(error)}), and with it no model of "
            "transformers: it was built for another torch. grpo does not need it: pip uninstall "
            "torchvision torchaudio torchcodec"
        ) from error


def is_hub_id(path: str) -> bool:
    """Returns whether a path has the form of a model on the hub: owner/name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _check_model_directory(path: str) -> None:
    if (Path(path) / "config.json").is_file():
        return
    message = (
        f"model.path={path}: the directory has no config.json, so it is not a Hugging Face model"
    )
    final = Path(path) / "final"
    if (final / "config.json").is_file():
        message += f". It is the directory of a run: use {final}"
    raise UserError(message)


def extend_context(model_dir: Path, rope: RopeSettings | None, target: Path) -> Path:
    """Returns a directory of the model with a longer context. Without `rope`, that is `model_dir`.

    The directory at `target` has links to the files of `model_dir`, and a config with other rotary
    frequencies.

    Raises:
        UserError: The model's context is extended already.
    """
    from transformers import AutoConfig

    if rope is None:
        return model_dir
    config = AutoConfig.from_pretrained(model_dir)
    rope_parameters = dict(config.rope_parameters or {})
    if rope_parameters.get("rope_type", "default") != "default":
        raise UserError(
            f"model.rope: the context of {model_dir} is extended already ({rope_parameters}): "
            "remove model.rope from the config"
        )
    original_tokens = rope.original_tokens or config.max_position_embeddings
    rope_parameters["rope_type"] = rope.type
    rope_parameters["factor"] = rope.factor
    rope_parameters["original_max_position_embeddings"] = original_tokens
    config.rope_parameters = rope_parameters
    config.max_position_embeddings = int(original_tokens * rope.factor)
    with replace_directory(target) as scratch:
        for file in model_dir.iterdir():
            if file.is_file() and file.name != "config.json":
                (scratch / file.name).symlink_to(file.resolve())
        config.save_pretrained(scratch)
    return target


def has_rope(path: str, rope: RopeSettings | None) -> bool:
    """Returns whether the model in a local directory has the extension `rope` of its context."""
    from transformers import AutoConfig

    if rope is None or not (Path(path) / "config.json").is_file():
        return False
    parameters = AutoConfig.from_pretrained(path).rope_parameters or {}
    original_tokens = parameters.get("original_max_position_embeddings")
    return (
        parameters.get("rope_type") == rope.type
        and parameters.get("factor") == rope.factor
        and rope.original_tokens in (None, original_tokens)
    )


def make_tiny(kind: str, target: Path, seed: int, **overrides: Any) -> None:
    """Writes a model with random weights and a tokenizer of single bytes.

    The model has 1.1M (micro), 4.3M, 7.2M (qwen3-moe) or 8.2M (deepseek-v3) parameters.

    Args:
        kind: One of TINY_MODELS.
        target: The directory to write.
        seed: The seed of the weights.
        **overrides: Values of the model's config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = character_tokenizer()
    config = _tiny_config(kind, tokenizer, overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def _tiny_config(
    kind: str, tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]
) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values |= TINY_CONFIG
    values |= TINY_CONFIG_CHANGES.get(kind, {})
    values |= overrides
    _, _, family = kind.partition("-")  # "tiny-qwen3-moe" -> "qwen3-moe"
    config_class = CONFIG_MAPPING[family.replace("-", "_")]
    return config_class(**values)


def character_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer with `<pad>`, `<eos>`, one token per tag of TINY_TAGS and one per byte.

    It is a byte-level BPE without merges. transformers chooses the tokenizer class by the type of
    the model, and the classes of Qwen and Llama read this format in the same way.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<eos>", *TINY_TAGS, *byte_tokens]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(TINY_TAGS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in a model's directory.

    Raises:
        UserError: The tokenizer cannot be loaded, or its files are missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model_dir}: the tokenizer cannot be loaded: {first_line(error)}"
        ) from None
    # For some types of models, transformers returns an empty tokenizer if there are no files.
    if not tokenizer("0", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"model.path={model_dir}: the tokenizer cannot be loaded: the directory has no "
            "tokenizer.json. Copy the tokenizer's files there, from the model that this one was "
            "trained from"
        )
    return tokenizer


def has_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Returns whether all tokens of two tokenizers have the same ids.

    Rows that only pad the embedding matrix (Qwen2.5 has different numbers of them) do not count.
    """
    equal: bool = student.get_vocab() == teacher.get_vocab()
    return equal


def load_model(model_dir: Path, attention: str) -> PreTrainedModel:
    """Returns a model with float32 weights, for the learner.

    Args:
        model_dir: The model's directory.
        attention: The attention implementation: a value of `model.attention`, or a name that
            grpo/learning/packing.py registers.

    Raises:
        UserError: The model cannot be loaded, or it scales or caps its logits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from grpo.learning import packing  # noqa: F401 - registers its attention implementations

    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model.path={model_dir}: the model cannot be loaded: {first_line(error)}"
        ) from None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # The learner's log-probabilities must be those of the sampler.
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, option, None):
            raise UserError(
                f"model.path={model_dir}: models of type {model.config.model_type} scale or cap "
                f"their logits ({option}), which the learner does not support"
            )
    return model


def use_fused_norms(model: Any) -> int:
    """Replaces the RMS norms of a Llama or Qwen model by PyTorch's fused kernel, for a GPU.

    The norms of transformers run eight kernels each and keep float32 copies of the hidden states
    for the backward pass. The fused kernel also computes in float32, but rounds once, after the
    multiplication by the weight. transformers rounds before the multiplication.

    Returns:
        The number of replaced norms.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    def forward(self: Any, hidden_states: Any) -> Any:
        return torch.nn.functional.rms_norm(
            hidden_states, self.weight.shape, self.weight, self.variance_epsilon
        )

    norm_classes = (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Qwen3MoeRMSNorm)
    norms = [module for module in model.modules() if type(module) in norm_classes]
    for norm in norms:
        norm.forward = forward.__get__(norm)
    return len(norms)


def eos_token_ids(model_dir: Path) -> list[int]:
    """Returns the tokens that end a completion: those of the generation config and the config."""
    token_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = model_dir / name
        if not file.exists():
            continue
        try:
            eos = json.loads(file.read_text()).get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{file}: expected a JSON object") from None
        if isinstance(eos, list):
            token_ids.update(eos)
        elif eos is not None:
            token_ids.add(eos)
    return sorted(token_ids)


def context_tokens(model_dir: Path) -> int | None:
    """Returns the longest sequence that a model can read, in tokens; None if it states no limit."""
    config = json.loads((model_dir / "config.json").read_text())
    context: int | None = config.get("max_position_embeddings")
    return context


def weight_bits(model_dir: Path) -> int | None:
    """Returns the bits per weight of a quantized model, None for other models.

    For example 4 for `{"quantization_config": {"config_groups": {"0": {"weights": {"num_bits":
    4}}}}}` (compressed-tensors) and for `{"quantization_config": {"bits": 4}}` (GPTQ, AWQ).
    """
    config = json.loads((model_dir / "config.json").read_text())
    quantization = config.get("quantization_config") or {}
    bits: int | None = quantization.get("bits")
    groups = list(quantization.get("config_groups", {}).values())
    if groups:
        bits = (groups[0].get("weights") or {}).get("num_bits")
    return bits


def check_context(model_dir: Path, num_tokens: int, length_keys: str) -> None:
    """Raises UserError if the model's context is shorter than `num_tokens`.

    Args:
        model_dir: The directory of the model.
        num_tokens: Length of the longest sequence.
        length_keys: The keys of the config that determine it, for the message.
    """
    context = context_tokens(model_dir)
    if context and num_tokens > context:
        raise UserError(
            f"{length_keys} = {num_tokens} tokens, but the model's context is {context} tokens: "
            "lower the limit, or extend the context with model.rope"
        )


def num_weights(model_dir: Path) -> int:
    """Returns the number of weights of a model, without loading it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    return int(model.num_parameters())


class CompletionEnds(NamedTuple):
    """What ended a completion in training: tokens and strings, for the generation config."""

    token_ids: Sequence[int]
    strings: Sequence[str]


def save_final(  # noqa: PLR0913 - the parts of a Hugging Face directory
    target: Path,
    model_dir: Path,
    weights: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    ends: CompletionEnds,
    card: str,
) -> None:
    """Writes a trained model as a Hugging Face directory, which appears at `target` when complete.

    The directory has weights, tokenizer, chat template, generation config and model card.

    Args:
        target: The directory to write.
        model_dir: The model that the training started from.
        weights: Every weight, by its Hugging Face name.
        tokenizer: The tokenizer, with the chat template to save.
        dtype: The dtype of the saved weights. Buffers keep their own dtype.
        ends: What ends a completion.
        card: The text of README.md.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(model_dir)
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (model_dir / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(model_dir)
    if ends.token_ids:
        model.generation_config.eos_token_id = list(ends.token_ids)
    model.generation_config.stop_strings = list(ends.strings) or None
    buffer_names = {name for name, _ in model.named_buffers()}
    state = {
        name: tensor if name in buffer_names else tensor.to(config.dtype)
        for name, tensor in weights.items()
    }
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)
        support_transformers_4(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")


def support_transformers_4(directory: Path) -> None:
    """Makes a model that transformers 5 has saved readable for transformers 4.48 and later.

    Qwen3 and models with an extended context need 4.51.

    Without the additional keys of config.json, transformers 4 would use the default frequencies of
    the rotary embedding, and compute wrong logits without a message.
    """
    _add_keys_of_transformers_4(directory / "config.json")
    _use_names_of_transformers_4(directory / "tokenizer_config.json")


def _add_keys_of_transformers_4(config_file: Path) -> None:
    tree = json.loads(config_file.read_text())
    if "dtype" in tree:
        tree["torch_dtype"] = tree["dtype"]
    rope = tree.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        tree["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            tree["rope_scaling"] = {
                key: value for key, value in rope.items() if key != "rope_theta"
            }
    config_file.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")


def _use_names_of_transformers_4(tokenizer_config_file: Path) -> None:
    """Replaces names that transformers 4 does not know. transformers 5 reads both."""
    tree = json.loads(tokenizer_config_file.read_text())
    if tree.get("tokenizer_class") == "TokenizersBackend":
        tree["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tree.get("extra_special_tokens"), list):
        tree["additional_special_tokens"] = tree.pop("extra_special_tokens")
    tokenizer_config_file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
