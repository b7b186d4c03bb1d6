"""An engine process with a fault: what the canary, the probe and the transfer's checks must see.

The file that GRPO_TEST_FAULT names holds the fault's name. It is read at every sync, so that one
process shows all faults in turn.
"""

import os
import sys
from pathlib import Path

import torch

from grpo.engines.local import child

FAULT_FILE = Path(os.environ["GRPO_TEST_FAULT"])
first_update = {}  # the tensors of a stale layer, by name


def without_a_layer(rows):
    return [(name, tensor) for name, tensor in rows if ".layers.1." not in name]


def with_a_matrix_of_zeros(rows):
    for name, tensor in rows:
        if name.endswith("layers.0.self_attn.v_proj.weight"):
            tensor.zero_()
    return rows


def with_two_matrices_swapped(rows):
    one, two = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    tensors = dict(rows)
    tensors[one], tensors[two] = tensors[two], tensors[one]
    return list(tensors.items())


def with_a_layer_of_the_first_update(rows):
    for name, tensor in rows:
        if ".layers.1." in name:
            first_update.setdefault(name, tensor.clone())
    return [(name, first_update.get(name, tensor)) for name, tensor in rows]


FAULTS = {
    "missing layer": without_a_layer,
    "zeroed": with_a_matrix_of_zeros,
    "swapped": with_two_matrices_swapped,
    "stale layer": with_a_layer_of_the_first_update,
}


def install():
    import vllm

    from grpo.engines.transfer import receivers

    record_sums, retie_head = receivers.ArrivalCheck._record_sums, receivers.retie_head
    reset_prefix_cache = vllm.LLM.reset_prefix_cache

    def faulty(self, weights):
        fault = FAULT_FILE.read_text()
        rows = [(name, tensor.clone()) for name, tensor in weights]
        if fault == "flipped bit":
            rows[3][1].view(torch.uint8).view(-1)[21] ^= 4
        rows = list(record_sums(self, rows))  # no checksum sees what is done after it
        if fault in FAULTS:
            rows = FAULTS[fault](rows)
        return iter(rows)

    def retie(model):
        if FAULT_FILE.read_text() != "stale head":  # vLLM 0.32's own fault on a CPU
            retie_head(model)

    def reset(self, *args, **kwargs):
        if FAULT_FILE.read_text() == "stale cache":
            return True
        return reset_prefix_cache(self, *args, **kwargs)

    receivers.ArrivalCheck._record_sums = faulty
    receivers.retie_head = retie
    vllm.LLM.reset_prefix_cache = reset


if __name__ == "__main__":
    if FAULT_FILE.read_text() == "dies at start":
        os._exit(7)
    install()
    child.main(int(sys.argv[1]), int(sys.argv[2]))
