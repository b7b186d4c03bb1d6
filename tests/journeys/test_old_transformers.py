"""Releases of transformers 4 read a final model and compute the same logits (`--all`).

They are installed into a temporary directory. The test is skipped without a package index.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from grpo.learning import models

pytestmark = pytest.mark.slow
# The oldest release that reads the chat template, the oldest that reads an extended context, and
# the last one. Their other dependencies are those of this environment.
RELEASES = {
    "4.48.3": ["tokenizers>=0.21,<0.22", "huggingface_hub>=0.34,<1.0"],
    "4.51.3": ["tokenizers>=0.21,<0.22", "huggingface_hub>=0.34,<1.0"],
    "4.57.6": ["tokenizers>=0.22,<=0.23.0", "huggingface_hub>=0.34,<1.0"],
}
LLAMA3_ROPE = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
QWEN_ROPE = {"rope_theta": 1e6, "rope_type": "default"}
YARN_ROPE = {
    "rope_theta": 1e6,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
# Prints the logits and the ids of a text, and the prompt that the chat template renders.
PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
ids = tokenizer("What is 12 + 345?<think> " * 10, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(ids).logits
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1"}], tokenize=False)
stop_strings = model.generation_config.stop_strings
print(json.dumps([logits[0, -1].tolist(), ids.tolist(), prompt, stop_strings]))
"""


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
    """Returns the directory of an installed release."""
    folder = tmp_path_factory.mktemp("transformers")
    packages = [f"transformers=={request.param}", *RELEASES[request.param]]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    if subprocess.run([*command, *packages], capture_output=True).returncode != 0:
        pytest.skip("no package index with this release of transformers")
    return folder


def outputs(model_dir, release=None):
    path = str(release) if release else ""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model_dir)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])  # a release may print before that


@pytest.mark.parametrize(
    ("kind", "rope"),
    [("tiny-qwen2", QWEN_ROPE), ("tiny-llama", LLAMA3_ROPE), ("tiny-qwen2", YARN_ROPE)],
    ids=["qwen2", "llama3", "yarn"],
)
def test_an_older_release_computes_the_same_logits(release, tmp_path, kind, rope):
    if rope is YARN_ROPE and (release / "transformers-4.48.3.dist-info").exists():
        pytest.skip("transformers before 4.51 extends an extended context a second time")
    models.make_tiny(kind, tmp_path / "start", 0, rope_parameters=rope)
    model = models.load_model(tmp_path / "start", "eager")
    tokenizer = models.load_tokenizer(tmp_path / "start")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.chat_template = "{{ messages[-1]['content'] }} ="
    models.save_final(
        tmp_path / "final",
        tmp_path / "start",
        dict(model.named_parameters()),
        tokenizer,
        dtype="float32",
        ends=models.CompletionEnds([1], ["</answer>"]),
        card="",
    )
    logits, ids, prompt, stop_strings = outputs(tmp_path / "final", release)
    expected_logits, *expected = outputs(tmp_path / "final")
    assert [ids, prompt, stop_strings] == expected == [ids, "1 + 1 =", ["</answer>"]]
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected_logits))
