"""A short supervised start on worked solutions, for a tiny model made on the spot: cross-entropy on the solution, plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from grpo import models
from grpo.checkpoint import replace_directory
from grpo.config import WarmStart
from grpo.prompts import Prompts
from grpo.types import Problem, UserError


def warm_start(
    model_dir: Path, target: Path, settings: WarmStart, prompts: Prompts, take: Callable[[int, int], list[Problem]],
    on_update: Callable[[int, float], None],
) -> None:  # fmt: skip
    """Trains the model in `model_dir` on `settings.updates` batches of `take(position, n)`, writes it to `target`.

    AdamW, a cosine that ends at a quarter of the rate: annealed to 0 the greedy answer is better than the samples that GRPO learns from.
    """
    tokenizer = models.load_tokenizer(model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: torch.nn.Module = models.load_model(model_dir, "sdpa")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    for update in range(settings.updates):
        decay = 0.5 * (1 + math.cos(math.pi * update / (1.5 * settings.updates)))  # 1 to 0.25
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (update + 1) / 10) * decay
        ids, labels = _batch(take(update * settings.batch_size, settings.batch_size), prompts, tokenizer)
        logits = model(input_ids=ids.to(device)).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten().to(device), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_update(update + 1, float(loss.detach()))
    with replace_directory(target) as scratch:
        model.save_pretrained(scratch)  # type: ignore[operator]
        tokenizer.save_pretrained(scratch)


def _batch(problems: list[Problem], prompts: Prompts, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded ids and labels [B, T]; labels are -100 on prompt and padding, by length. Right padding needs no mask here."""
    rows = []
    for problem in problems:
        if problem.solution is None:
            raise UserError(f"model.warm_start needs worked solutions; problem {problem.id} has none")
        prompt = list(prompts.ids(problem))
        solution = tokenizer(problem.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt, solution))
    length = max(len(prompt) + len(solution) for prompt, solution in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for row, (prompt, solution) in enumerate(rows):
        end = len(prompt) + len(solution)
        ids[row, :end] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return ids, labels
