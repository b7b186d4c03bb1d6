"""The README.md of a final model: its prompts, what ends a completion, how to load it.

transformers reads the stop strings of the generation config; vLLM does not, and has no place for a
system prompt. The card has the parameters of a request that give the completions of `grpo eval`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo import __version__
from grpo.config import RunConfig
from grpo.experience.prompts import EXAMPLE, Prompts
from grpo.learning import models

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def model_card(config: RunConfig, prompts: Prompts, tokenizer: Any) -> str:
    """Returns the text of README.md.

    Args:
        config: The config of the run that trained the model.
        prompts: Its prompts.
        tokenizer: Its tokenizer.
    """
    name = config.run_dir.rstrip("/").rpartition("/")[2]
    messages = json.dumps(prompts.messages(EXAMPLE), indent=4, ensure_ascii=False)
    stop_argument = ""
    if prompts.stop:
        stop_argument = ", tokenizer=tokenizer"
    return CARD.format(
        front_matter=_front_matter(config.model.path),
        name=name,
        version=__version__,
        path=config.model.path,
        stop=_stop_sentence(prompts),
        prompt=prompts.text(EXAMPLE).rstrip("\n"),
        messages=messages,
        stop_argument=stop_argument,
        extra_body=_extra_body(prompts, tokenizer),
    )


def _front_matter(path: str) -> str:
    lines = ["---", "library_name: transformers", "tags: [grpo]"]
    if models.is_hub_id(path) and not Path(path).exists():
        lines.append(f"base_model: {path}")
    return "\n".join([*lines, "---"])


def _stop_sentence(prompts: Prompts) -> str:
    if not prompts.stop:
        return "A completion ends with the EOS token of the generation config."
    stop = " or ".join(f"`{text}`" for text in prompts.stop)
    return (
        f"A completion ends after {stop}, or with the EOS token of the generation config. The "
        "generation config also has the stop strings: `generate` of transformers needs the "
        "tokenizer for them, and raises an error without it. vLLM does not read them, so they are "
        "parameters of the request."
    )


def _extra_body(prompts: Prompts, tokenizer: Any) -> str:
    """Returns the parameters of vLLM's server that the OpenAI API does not have."""
    parameters: dict[str, Any] = {}
    if prompts.stop:
        parameters = {"stop": list(prompts.stop), "include_stop_str_in_output": True}
    if any(tag in tokenizer.all_special_tokens for tag in TAGS):
        parameters["skip_special_tokens"] = False
    if not parameters:
        return ""
    words = []
    for key, value in parameters.items():
        text = repr(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)
        words.append(f'"{key}": {text}')
    return f"    extra_body={{{', '.join(words)}}},\n"


CARD = """\
{front_matter}

# {name}

Trained with grpo {version} from `{path}`.

{stop} The saved chat template renders the prompts of the training. An example, with the question
"What is 2 + 3?":

```text
{prompt}
```

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
messages = {messages}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=1024, do_sample=False{stop_argument})
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
```

With vLLM (`vllm serve PATH --served-model-name {name}`):

```python
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
response = client.chat.completions.create(
    model="{name}",
    messages={messages},
    max_tokens=1024,
    temperature=0,
{extra_body})
print(response.choices[0].message.content)
```
"""
