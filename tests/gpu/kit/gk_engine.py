"""Finds a configuration of vLLM that works on this machine, with a tiny model.

gk_engine.py        tries CONFIGURATIONS in order, each in a separate process, until one works,
                    and writes the environment variables that it needs to /tmp/gk/env
gk_engine.py one    tries the configuration in the environment variables: starts the
                    ChildEngine in this process, samples, compares the logprobs with
                    transformers in float32, sleeps and wakes
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from grpo.config import EngineSettings
from grpo.engines import Request, SamplingOptions
from grpo.engines.local.child import ChildEngine
from grpo.engines.vllm_options import ServedModel, llm_arguments
from grpo.learning import models
from grpo.types import Completion

KIT = Path("/tmp/gk")
# Without this library vLLM uses its Triton attention.
FLASH_ATTENTION = KIT / "site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
# Environment variables. The preferred configuration comes first.
CONFIGURATIONS: tuple[dict[str, str], ...] = (
    {},
    {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    {"GK_FLASH_ATTENTION": "0"},
    {"GK_FLASH_ATTENTION": "0", "GK_EAGER": "1"},
)
TIMEOUT_S = 100
MAX_GAP = 0.2  # bfloat16 against float32; 0.06 was measured on an H200
PROMPT_TOKENS = 100


class IgnoredPipe:
    """Replaces the pipe to the trainer. Discards the messages about progress."""

    def send(self, message: Any) -> None:
        pass


def try_configurations() -> int:
    """Returns 0 if a configuration works, otherwise 1."""
    for variables in CONFIGURATIONS:
        if "GK_FLASH_ATTENTION" in variables and FLASH_ATTENTION.exists():
            FLASH_ATTENTION.rename(FLASH_ATTENTION.with_suffix(".off"))
        start = time.monotonic()
        try:
            code = subprocess.run(
                [sys.executable, __file__, "one"], env=os.environ | variables, timeout=TIMEOUT_S
            ).returncode
            result = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code = 1
            result = f"not finished after {TIMEOUT_S} s"
        print(f"{variables}: {result}, {time.monotonic() - start:.0f} s", flush=True)
        if code == 0:
            write_environment(variables)
            return 0
    return 1


def write_environment(variables: dict[str, str]) -> None:
    """Writes the variables of vLLM as a shell script, for the later steps of gpu.sh."""
    lines = [
        f"export {name}={value}\n" for name, value in variables.items() if name.startswith("VLLM")
    ]
    (KIT / "env").write_text("".join(lines))


def run_one() -> int:
    """Returns 0 if the engine's logprobs agree with those of transformers, otherwise 3."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model_dir = KIT / "tiny"
    if not model_dir.exists():
        models.make_tiny("tiny-qwen2", model_dir, 0, initializer_range=0.1)
    engine = start_engine(model_dir)
    prompts = [tuple(10 + (7 * i + j) % 90 for j in range(PROMPT_TOKENS)) for i in range(8)]
    groups = sample(engine, prompts)
    completion = groups[0][0]
    reference_logprobs = logprobs_of_transformers(model_dir, prompts[0], completion.token_ids)
    gap = float((reference_logprobs - torch.tensor(completion.logprobs)).abs().mean())
    print(f"mean gap to transformers in float32: {gap:.4f}")
    engine.sleep()
    print("asleep: GPU memory free and total", torch.cuda.mem_get_info())
    engine.wake()
    print("awake", flush=True)
    return 0 if gap < MAX_GAP else 3


def start_engine(model_dir: Path) -> ChildEngine:
    eager = True if os.environ.get("GK_EAGER") else None
    settings = EngineSettings(memory_fraction=0.2, max_sequences=64, eager=eager)
    model = ServedModel(
        model_dir=str(model_dir), dtype="bfloat16", max_model_len=512, load_weights=True
    )
    arguments = llm_arguments(model, settings, cuda=True) | {"max_logprobs": 20}
    start = time.monotonic()
    pipe: Any = IgnoredPipe()
    engine = ChildEngine(pipe, arguments, "grpo_ipc")
    print(f"engine ready in {time.monotonic() - start:.1f} s {engine.describe()}", flush=True)
    return engine


def sample(engine: ChildEngine, prompts: list[tuple[int, ...]]) -> list[tuple[Completion, ...]]:
    """Samples 8 completions per prompt three times and returns the last ones."""
    requests = [Request(prompt_ids=prompt, seed=100 * i, n=8) for i, prompt in enumerate(prompts)]
    options = SamplingOptions(max_tokens=256, ignore_eos=True)
    for _ in range(3):
        start = time.monotonic()
        groups = engine.generate(requests, options)
        seconds = time.monotonic() - start
        num_tokens = 0
        for group in groups:
            num_tokens += sum(len(completion.token_ids) for completion in group)
        print(f"{num_tokens} tokens in {seconds:.2f} s", flush=True)
    return groups


def logprobs_of_transformers(
    model_dir: Path, prompt: tuple[int, ...], token_ids: tuple[int, ...]
) -> torch.Tensor:
    """Returns the logprobs of a completion's tokens [T] in float32."""
    ids = torch.tensor([prompt + token_ids])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, PROMPT_TOKENS - 1 : -1]  # [T, V]
    return logits.log_softmax(-1).gather(1, ids[0, PROMPT_TOKENS:, None])[:, 0]


def main(arguments: list[str]) -> int:
    return run_one() if arguments else try_configurations()


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_code)  # vLLM's threads would keep the process alive
