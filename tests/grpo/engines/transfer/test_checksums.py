"""Checksums of a weight sync: corrupted, missing and unexpected tensors are detected on arrival."""

import pytest
import torch
from tiny_models import Weights
from weight_loader import Loader

from grpo.engines.transfer import checksums


def pack(named_tensors):
    """Returns the tensors as views of one packed buffer.

    Transfers by CUDA IPC and NCCL use such buffers. A tensor may begin at any byte.
    """
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in named_tensors])
    parts = packed.split([tensor.nbytes for _, tensor in named_tensors])
    views = []
    for (name, tensor), part in zip(named_tensors, parts, strict=True):
        views.append((name, part.view(tensor.dtype).view(tensor.shape)))
    return views


def inject_fault(named_tensors, fault):
    """Modifies the list of the tensors `a`, `b`, ... in place so that it has the fault."""
    _, b = named_tensors[1]
    if fault == "flipped":
        b.view(torch.uint8)[1, 1] ^= 1
    elif fault == "swapped":
        _, a = named_tensors[0]
        named_tensors[0] = ("a", b)
        named_tensors[1] = ("b", a)
    elif fault == "lost":
        del named_tensors[1]


def load_in_buckets(arrivals, named_tensors, bucket_size):
    for start in range(0, len(named_tensors), bucket_size):
        arrivals.load_weights(named_tensors[start : start + bucket_size])


@pytest.mark.parametrize("bucket_size", [1, 2, 100])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (None, None),
        ("flipped", "the bytes of b differ from those that were sent"),
        ("swapped", "the bytes of a, b differ from those that were sent"),
        ("lost", "3 tensors arrived, 4 were sent"),
        ("unknown", "1 weights of the engine's model did not arrive: extra"),
    ],
)
def test_weights_that_arrive_in_buckets_are_verified_with_their_checksums(
    bucket_size, fault, error
):
    weights = Weights(a=torch.randn(3, 3), b=torch.randn(3, 3), c=torch.randn(9), d=torch.randn(1))
    named_tensors = pack(list(checksums.WeightStream(weights, torch.bfloat16)))
    inject_fault(named_tensors, fault)
    parameter_names = list(weights.keys())
    if fault == "unknown":
        parameter_names.append("extra")
    arrivals = checksums.ArrivalCheck(Loader(parameter_names))
    if error is None:
        load_in_buckets(arrivals, named_tensors, bucket_size)
        return
    with pytest.raises(RuntimeError, match=error):
        load_in_buckets(arrivals, named_tensors, bucket_size)
