"""Trains a tiny model with every combination of ZeRO stage and dtype, on one rank or on several.

    python ranks_worker.py MODEL EXPERTS FOLDER
    torchrun --standalone --nproc-per-node=2 ranks_worker.py MODEL EXPERTS FOLDER

EXPERTS is a mixture of experts. FOLDER is named `one` or `two`, after the number of ranks. Rank 0
writes the final weights of each combination to FOLDER (`1-float32.pt`, `shared-1.pt`), and the
results to `results.json`:

    {
        "1-float32": {
            "rows": [{"loss": 0.1, "policy/grad_norm": 2.0, ...}, ...],  // one per update
            "perturbed": true,  // the canary's perturbation changed every weight
            "restored": true,   // and all of them were restored
            "resumed": [...]    // the second half, resumed from the other folder's checkpoint
        },
        "shared-1": {"rows": [...]}  // all ranks share each sequence
        "experts-1": {"rows": [...]}  // a mixture of experts with a load-balancing loss
    }

"resumed" is missing if the folder of the other number of ranks does not exist.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import tiny_config
from training_samples import STAGES_AND_DTYPES, random_samples

from grpo.learning import learner_weights, models
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.learner import Learner
from grpo.learning.policy import Reference
from grpo.losses.grpo import loss
from grpo.losses.gspo import loss as gspo_loss
from grpo.run import ranks
from grpo.types import Sample

NUM_UPDATES = 4
HALF = NUM_UPDATES // 2  # a checkpoint is saved after this number of updates
learner_weights.BUCKET_BYTES = 2**14  # small, so that ZeRO-3 gathers the model in many buckets

METRICS = ("loss", "policy/grad_norm", "policy/entropy", "update/tokens")
SHARED_METRICS = (
    *METRICS,
    "kl/ref",
    "kl/drift",
    "mismatch/effective",
    "mismatch/max_weight",
    "mismatch/off_policy",
)


def local_batches(seed):
    """Returns this rank's padded micro-batches of the update number `seed`."""
    samples = random_samples(seed, count=7)
    return micro_batches(
        samples,
        token_weights(samples, "sequence", 20),
        max_tokens=60,
        share=(ranks.rank(), ranks.world_size()),
    )


def make_learner(model_dir, folder, stage, dtype):
    settings = {
        "zero_stage": stage,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logits_chunk_tokens": 8,  # small, so that ranks have different numbers of chunks
    }
    config = tiny_config(folder, model_dir, model={"dtype": dtype}, learner=settings)
    return Learner(models.load_model(model_dir, "eager"), config, loss)


def train(learner, first, end):
    """Makes the updates `first` to `end - 1` and returns METRICS of each."""
    rows = []
    for seed in range(first, end):
        metrics = learner.update(local_batches(seed))
        rows.append({key: metrics[key] for key in METRICS})
    return rows


def copy_weights(learner):
    return {name: weight.float().clone() for name, weight in learner.weights()}


def train_with_shared_sequences(model_dir, folder, stage):
    """Makes all updates with sequence parallelism over all ranks.

    The model is packed, and the loss uses every term: GSPO's ratio per sequence, entropy, KL
    to a reference, drift, and the off-policy mask.

    Returns:
        SHARED_METRICS of each update, and the final weights by name.
    """
    config = tiny_config(
        folder,
        model_dir,
        model={"gradient_checkpointing": True},
        algorithm={
            "preset": "gspo",
            "entropy_coef": 0.01,
            "kl_coef": 0.1,
            "drift_coef": 0.1,
            "off_policy_max": 0.5,
        },
        learner={"zero_stage": stage, "sequence_parallel": ranks.world_size()},
    )
    policy = models.load_model(model_dir, "packed")
    reference = models.load_model(model_dir, "packed")
    learner = Learner(policy, config, gspo_loss, {"": Reference(reference)})
    # The first half of this sequence, which is rank 0's share of two, contains only prompt tokens.
    long_prompt = Sample(
        token_ids=tuple(range(7, 60)), prompt_length=52, advantages=(1.0,), sampler_logprobs=(-5.0,)
    )
    rows = []
    for seed in range(NUM_UPDATES):
        update_samples = [*random_samples(seed, count=7), long_prompt]
        batches = micro_batches(
            update_samples,
            token_weights(update_samples, "sequence", 20),
            max_tokens=60,
            packed=True,
            share=learner.micro_batch_share,
        )
        scores = learner.score(batches, reference=True)
        batches = [
            replace(batch, ref_logprobs=score.logprobs)
            for batch, score in zip(batches, scores, strict=True)
        ]
        metrics = learner.update(batches)
        rows.append({key: metrics[key] for key in SHARED_METRICS})
    return rows, copy_weights(learner)


def train_experts(model_dir, folder, stage):
    """Makes all updates of a mixture of experts with a load-balancing loss.

    Returns METRICS and the load-balancing loss of each update, and the final weights by name.
    """
    config = tiny_config(
        folder, model_dir, model={"router_aux_coef": 1.0}, learner={"zero_stage": stage}
    )
    learner = Learner(models.load_model(model_dir, "eager"), config, loss)
    rows = []
    for seed in range(NUM_UPDATES):
        metrics = learner.update(local_batches(seed))
        rows.append({key: metrics[key] for key in (*METRICS, "router/balance")})
    return rows, copy_weights(learner)


def train_and_perturb(model_dir, folder, stage, dtype):
    """Makes all updates, with a checkpoint at HALF, then perturbs and restores the weights.

    Returns:
        The entry of `results.json` without "resumed", and the trained weights by name.
    """
    checkpoint = folder / f"{stage}-{dtype}"
    learner = make_learner(model_dir, folder, stage, dtype)
    rows = train(learner, 0, HALF)
    ranks.rank0_first("the folder", lambda: checkpoint.mkdir(parents=True, exist_ok=True))
    learner.save(checkpoint)
    rows += train(learner, HALF, NUM_UPDATES)
    trained = copy_weights(learner)
    with learner.perturbed(seed=5):
        learner.score(local_batches(0))
        perturbed = copy_weights(learner)
    restored = copy_weights(learner)
    result = {
        "rows": rows,
        "perturbed": all((perturbed[name] != trained[name]).any().item() for name in trained),
        "restored": all(torch.equal(restored[name], trained[name]) for name in trained),
    }
    return result, trained


def resume(model_dir, folder, stage, dtype, checkpoint):
    """Makes the second half of the updates from a checkpoint of another number of ranks.

    Returns METRICS of each update.
    """
    learner = make_learner(model_dir, folder, stage, dtype)
    learner.load(checkpoint)
    rows = train(learner, HALF, NUM_UPDATES)
    converted = [path.name for path in checkpoint.parent.iterdir() if "universal" in path.name]
    assert not converted, f"converted checkpoints were not deleted: {converted}"
    return rows


def main(model_dir, experts_dir, folder):
    ranks.join_process_group(60)
    other_folder = folder.parent / ("two" if ranks.world_size() == 1 else "one")
    results = {}
    for stage, dtype in STAGES_AND_DTYPES:
        name = f"{stage}-{dtype}"
        results[name], weights = train_and_perturb(model_dir, folder, stage, dtype)
        if ranks.rank() == 0:
            torch.save(weights, folder / f"{name}.pt")
        checkpoint = other_folder / name
        if checkpoint.exists():
            results[name]["resumed"] = resume(model_dir, folder, stage, dtype, checkpoint)
    for stage in (1, 3):
        rows, weights = train_with_shared_sequences(model_dir, folder, stage)
        results[f"shared-{stage}"] = {"rows": rows}
        if ranks.rank() == 0:
            torch.save(weights, folder / f"shared-{stage}.pt")
        rows, weights = train_experts(experts_dir, folder, stage)
        results[f"experts-{stage}"] = {"rows": rows}
        if ranks.rank() == 0:
            torch.save(weights, folder / f"experts-{stage}.pt")
    if ranks.rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
