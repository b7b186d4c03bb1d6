"""Checksums: what arrives in an engine's model is what was sent."""

import contextlib

import pytest
import torch
from tiny_models import Weights
from weight_loader import Loader

from grpo.engines.transfer import checksums


@pytest.mark.parametrize("bucket", [1, 2, 100])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (None, None),
        ("flipped", "the bytes of b differ from those that were sent"),
        ("swapped", "the bytes of a, b differ from those that were sent"),
        ("lost", "3 tensors arrived, 4 were sent"),
        ("unknown", "1 weights of the engine's model did not arrive: more"),
    ],
)
def test_what_arrives_in_buckets_is_held_to_the_checksums_that_come_last(bucket, fault, error):
    """As by CUDA IPC and NCCL: packed in a buffer, where a tensor may begin at any byte."""
    weights = Weights(a=torch.randn(3, 3), b=torch.randn(3, 3), c=torch.randn(9), d=torch.randn(1))
    sent = list(checksums.WeightStream(weights, torch.bfloat16))
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in sent]).split(
        [tensor.nbytes for _, tensor in sent]
    )
    rows = [
        (name, part.view(tensor.dtype).view(tensor.shape))
        for (name, tensor), part in zip(sent, packed, strict=True)
    ]
    if fault == "flipped":
        rows[1][1].view(torch.uint8)[1, 1] ^= 1
    elif fault == "swapped":
        rows[0], rows[1] = ("a", rows[1][1]), ("b", rows[0][1])
    elif fault == "lost":
        del rows[1]
    arrivals = checksums.ArrivalCheck(
        Loader([*weights.keys(), *(["more"] if fault == "unknown" else [])])
    )
    with pytest.raises(RuntimeError, match=error) if fault else contextlib.nullcontext():
        for i in range(0, len(rows), bucket):
            arrivals.load_weights(rows[i : i + bucket])
