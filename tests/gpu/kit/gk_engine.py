"""Starts the child's ChildEngine in this process on a tiny model, in several ways, the wanted
one first; keeps the first that runs.

gk_engine.py            tries the ways, each in a process of its own; what the chosen one needs in
the environment: /tmp/gk/env gk_engine.py one        starts, samples, compares with float32
transformers, sleeps and wakes
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

KIT = Path("/tmp/gk")
# without it vLLM takes its Triton attention
FLASH_ATTENTION = KIT / "site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
WAYS: tuple[dict[str, str], ...] = (
    {},
    {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    {"GK_FLASH_ATTENTION": "0"},
    {"GK_FLASH_ATTENTION": "0", "GK_EAGER": "1"},
)
LIMIT_S = 100
MAX_GAP = 0.2  # 0.06 measured on an H200: bfloat16 against float32


class NoPipe:
    """In place of the pipe to the trainer, which only hears of progress here."""

    def send(self, message: Any) -> None:
        pass


def try_ways() -> int:
    """Returns 0 once a way has run, 1 if none has."""
    for way in WAYS:
        if "GK_FLASH_ATTENTION" in way and FLASH_ATTENTION.exists():
            FLASH_ATTENTION.rename(FLASH_ATTENTION.with_suffix(".off"))
        begun = time.monotonic()
        try:
            code = subprocess.run(
                [sys.executable, __file__, "one"], env=os.environ | way, timeout=LIMIT_S
            ).returncode
            result = f"exit {code}"
        except subprocess.TimeoutExpired:
            code, result = 1, f"not done in {LIMIT_S} s"
        print(f"way {way}: {result}, {time.monotonic() - begun:.0f} s", flush=True)
        if code == 0:
            (KIT / "env").write_text(
                "".join(
                    f"export {name}={value}\n"
                    for name, value in way.items()
                    if name.startswith("VLLM")
                )
            )
            return 0
    return 1


def run_one() -> int:
    """Returns 0 if the engine agrees with transformers."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model_dir = KIT / "tiny"
    if not model_dir.exists():
        models.make_tiny("tiny-qwen2", model_dir, 0, initializer_range=0.1)
    settings = EngineSettings(
        memory_fraction=0.2, max_sequences=64, eager=True if os.environ.get("GK_EAGER") else None
    )
    model = ServedModel(
        model_dir=str(model_dir), dtype="bfloat16", max_model_len=512, load_weights=True
    )
    arguments = llm_arguments(model, settings, cuda=True) | {"max_logprobs": 20}
    begun = time.monotonic()
    pipe: Any = NoPipe()
    server = ChildEngine(pipe, arguments, "grpo_ipc")
    print(f"engine up in {time.monotonic() - begun:.1f} s {server.describe()}", flush=True)

    prompts = [tuple(10 + (7 * i + j) % 90 for j in range(100)) for i in range(8)]
    requests = [Request(prompt_ids=prompt, seed=100 * i, n=8) for i, prompt in enumerate(prompts)]
    options = SamplingOptions(max_tokens=256, ignore_eos=True)
    for _ in range(3):
        begun = time.monotonic()
        groups = server.generate(requests, options)
        tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        print(f"{tokens} tokens in {time.monotonic() - begun:.2f} s", flush=True)

    completion = groups[0][0]
    ids = torch.tensor([prompts[0] + completion.token_ids])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        expected = (
            model(input_ids=ids)
            .logits[0, 99:-1]
            .log_softmax(-1)
            .gather(1, ids[0, 100:, None])[:, 0]
        )
    gap = float((expected - torch.tensor(completion.logprobs)).abs().mean())
    print(f"mean gap to float32 transformers {gap:.4f}")
    server.sleep()
    print("asleep", torch.cuda.mem_get_info())
    server.wake()
    print("awake", flush=True)
    return 0 if gap < MAX_GAP else 3


def main(words: list[str]) -> int:
    return run_one() if words else try_ways()


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_code)  # vLLM's threads do not end by themselves
