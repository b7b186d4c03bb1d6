"""What each rank of a test's learner does.

`python ranks_worker.py MODEL FOLDER`, alone or under torchrun. Rank 0 writes what came out.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import tiny_config
from training_samples import COMBINATIONS, samples

from grpo.learning import learner_weights, models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.learner import Learner
from grpo.losses.grpo import loss
from grpo.losses.gspo import loss as gspo
from grpo.run import ranks
from grpo.types import Sample

UPDATES = 4
learner_weights.BUCKET_BYTES = 2**14  # ZeRO-3 gathers the model in many buckets


def batches(seed):
    rows = samples(seed, count=7)
    return micro_batches(
        rows,
        token_weights(rows, "sequence", 20),
        max_tokens=60,
        share=(ranks.rank(), ranks.world_size()),
    )


def learner(model, folder, stage, dtype):
    # ranks have unequal numbers of such chunks
    more = {"weight_decay": 0.1, "max_grad_norm": 0.5, "logits_chunk_tokens": 8}
    config = tiny_config(
        folder, model, model={"dtype": dtype}, learner={"zero_stage": stage, **more}
    )
    return Learner(models.load_model(model, "eager"), config, loss)


def shared(model, folder, stage):
    """Returns what updates say, and their weights, where all ranks share each micro-batch.

    Of the packed model, with all that a loss can have.
    """
    algorithm = {"preset": "gspo", "entropy_coef": 0.01, "kl_coef": 0.1}
    config = tiny_config(
        folder,
        model,
        model={"gradient_checkpointing": True},
        algorithm=algorithm,
        learner={"zero_stage": stage, "sequence_parallel": ranks.world_size()},
    )
    one = Learner(
        models.load_model(model, "packed"), config, gspo, models.load_model(model, "packed")
    )
    long = Sample(
        token_ids=tuple(range(7, 60)), prompt_length=52, advantages=(1.0,), sampler_logprobs=(-5.0,)
    )
    rows = []
    for seed in range(UPDATES):
        # the first half of the last one's stream predicts nothing
        given = [*samples(seed, count=7), long]
        made = micro_batches(
            given, token_weights(given, "sequence", 20), max_tokens=60, packed=True, share=one.share
        )
        made = [
            replace(b, ref_logprobs=ref)
            for b, (ref, _) in zip(made, one.score(made, reference=True), strict=True)
        ]
        rows.append(one.update(made))
    kept = (
        "loss",
        "policy/grad_norm",
        "policy/entropy",
        "kl/ref",
        "update/tokens",
        "mismatch/effective",
        "mismatch/max_weight",
    )
    return [{key: row[key] for key in kept} for row in rows], weights(one)


def weights(learner):
    return {name: weight.float().clone() for name, weight in learner.weights()}


def goes_on(learner, first, last):
    rows = [learner.update(batches(seed)) for seed in range(first, last)]
    return [
        {key: row[key] for key in ("loss", "policy/grad_norm", "policy/entropy", "update/tokens")}
        for row in rows
    ]


def main(model, folder):
    """Trains by every ZeRO stage, half way from a fresh start and from there on.

    Then from the other world's checkpoints, if they are there; perturbs and restores.
    """
    ranks.join_process_group(60)
    found = {}
    for stage, dtype in COMBINATIONS:
        name = f"{stage}-{dtype}"
        one = learner(model, folder, stage, dtype)
        rows = goes_on(one, 0, UPDATES // 2)
        ranks.rank0_first(
            "the folder", lambda name=name: (folder / name).mkdir(parents=True, exist_ok=True)
        )
        one.save(folder / name)
        rows += goes_on(one, UPDATES // 2, UPDATES)
        before = weights(one)
        with one.perturbed(5):
            one.score(batches(0))
            moved = weights(one)
        after = weights(one)
        found[name] = {
            "rows": rows,
            "perturbed": all((moved[n] != before[n]).any().item() for n in before),
            "restored": all(torch.equal(after[n], before[n]) for n in before),
        }
        if ranks.rank() == 0:
            torch.save(before, folder / f"{name}.pt")
        other = folder.parent / ("two" if ranks.world_size() == 1 else "one") / name
        if other.exists():
            two = learner(model, folder, stage, dtype)
            two.load(other)
            found[name]["resumed"] = goes_on(two, UPDATES // 2, UPDATES)
            left = [path.name for path in other.parent.iterdir() if "universal" in path.name]
            assert not left, left
    for stage in (1, 3):
        rows, after = shared(model, folder, stage)
        found[f"shared-{stage}"] = {"rows": rows}
        if ranks.rank() == 0:
            torch.save(after, folder / f"shared-{stage}.pt")
    if ranks.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
