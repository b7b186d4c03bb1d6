"""A final model elsewhere: the code in its model card, with transformers and with a vLLM server."""

import json
import re

import deepspeed  # noqa: F401 - prints a line at its first import, which is not the model's
import pytest
from http_servers import serve_vllm
from stage_configs import eval_config, sft_config
from whole_runs import run_grpo, write_config

from grpo.experience.prompts import EXAMPLE

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def run_card(code, capsys, **replacements):
    """Runs a code block of a model card and returns what it prints."""
    for old, new in replacements.items():
        code = code.replace(old, new)
    exec(code, {})
    return capsys.readouterr().out


@pytest.mark.parametrize("think_prefill", [False, True])
def test_the_code_in_the_model_card_gives_the_completions_of_grpo_eval(
    tiny, tmp_path, capsys, think_prefill
):
    """vLLM runs in float32, so that equal prompts give equal greedy completions."""
    prompt = {"stop": ["</think>"], "think_prefill": think_prefill}
    training = sft_config(
        tmp_path / "sft", tiny(), prompt=prompt, sft={"updates": 60}, checkpoint={"every": 0}
    )
    run_grpo(write_config(tmp_path / "sft.yaml", training), command="sft")
    final = tmp_path / "sft" / "final"
    assert json.loads((final / "generation_config.json").read_text())["stop_strings"] == [
        "</think>"
    ]

    example = {"problem": EXAMPLE.question, "answer": EXAMPLE.answer}
    (tmp_path / "test.jsonl").write_text(json.dumps(example) + "\n")
    evaluation = eval_config(
        tmp_path,
        final,
        data={"name": "jsonl", "path": str(tmp_path), "options": {"test_path": str(tmp_path)}},
        prompt={"template": "plain", "max_tokens": 48, **prompt},
        sampling={"max_tokens": 48},
        eval={"problems": 1, "protocol": "greedy"},
    )
    run_grpo(evaluation, command="eval")
    (row,) = (tmp_path / "run" / "samples" / "eval-000000.jsonl").read_text().splitlines()
    completion = json.loads(row)["completion"]
    assert completion.endswith("</think>")
    generated = completion.removeprefix("<think>\n" if think_prefill else "")

    with_transformers, with_vllm = re.findall(
        r"```python\n(.*?)```", (final / "README.md").read_text(), re.DOTALL
    )
    printed = run_card(with_transformers, capsys, PATH=str(final))
    assert printed.strip() == generated.strip()

    (tmp_path / "server").mkdir()
    with serve_vllm(final, tmp_path / "server", name="sft", template=None) as url:
        code = with_vllm.replace("max_tokens=1024", "max_tokens=48")
        printed = run_card(code, capsys, **{"http://localhost:8000/v1": url})
    assert printed.strip() == generated.strip()
