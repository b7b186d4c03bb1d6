"""An engine process with an injected fault that the checks of the weight sync must detect.

The environment variable GRPO_TEST_FAULT contains the path of a file, and the file contains the name
of the fault:

    none            no fault
    dies at start   the process exits with code 7
    flipped bit     one bit changes before the checksums are computed
    missing layer   the weights of layer 1 do not arrive
    zeroed          one matrix arrives as zeros
    swapped         two matrices of the same shape are exchanged
    stale layer     layer 1 keeps the weights of the first update
    stale head      a tied head keeps its packed copy of the old weights
    stale cache     the prefix cache is not emptied
    stale graph N   batches of exactly N sequences are decoded with other weights, as by a CUDA
                    graph that keeps old ones

The file is read during every sync and every batch, so tests can change the fault of a running
process.
"""

import os
import sys
from pathlib import Path

import torch

from grpo.engines.local import child

FAULT_FILE = Path(os.environ["GRPO_TEST_FAULT"])
# Under the fault "stale layer": the weights of layer 1 in their first update, by name.
first_update = {}


def without_a_layer(named_tensors):
    return [(name, tensor) for name, tensor in named_tensors if ".layers.1." not in name]


def with_a_matrix_of_zeros(named_tensors):
    for name, tensor in named_tensors:
        if name.endswith("layers.0.self_attn.v_proj.weight"):
            tensor.zero_()
    return named_tensors


def with_two_matrices_swapped(named_tensors):
    gate = "model.layers.0.mlp.gate_proj.weight"
    up = "model.layers.0.mlp.up_proj.weight"
    tensors = dict(named_tensors)
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    return list(tensors.items())


def with_a_layer_of_the_first_update(named_tensors):
    for name, tensor in named_tensors:
        if ".layers.1." in name:
            first_update.setdefault(name, tensor.clone())
    return [(name, first_update.get(name, tensor)) for name, tensor in named_tensors]


FAULTS = {
    "missing layer": without_a_layer,
    "zeroed": with_a_matrix_of_zeros,
    "swapped": with_two_matrices_swapped,
    "stale layer": with_a_layer_of_the_first_update,
}


def halve_logits_of_stale_graph(model):
    """Makes `model` return half of its logits for the batch size of the fault "stale graph N"."""
    compute_logits = model.compute_logits

    def compute_logits_with_fault(hidden_states, *args, **kwargs):
        logits = compute_logits(hidden_states, *args, **kwargs)
        if FAULT_FILE.read_text() == f"stale graph {len(hidden_states)}":
            logits = logits / 2
        return logits

    model.compute_logits = compute_logits_with_fault


def install():
    """Patches vLLM and grpo's receivers so that they have the fault that FAULT_FILE names."""
    import vllm

    from grpo.engines.transfer import receivers

    record_sums = receivers.ArrivalCheck._record_sums
    retie_head = receivers.retie_head
    reset_prefix_cache = vllm.LLM.reset_prefix_cache

    def record_sums_with_fault(self, weights):
        fault = FAULT_FILE.read_text()
        named_tensors = [(name, tensor.clone()) for name, tensor in weights]
        if fault == "flipped bit":
            tensor = named_tensors[3][1]
            tensor.view(torch.uint8).view(-1)[21] ^= 4
        named_tensors = list(record_sums(self, named_tensors))
        # Checksums do not detect the following faults: they are computed above.
        if fault in FAULTS:
            named_tensors = FAULTS[fault](named_tensors)
        return iter(named_tensors)

    def retie_head_unless_stale(model):
        # "stale head" is what vLLM 0.32 does on a CPU without grpo's retie_head.
        if FAULT_FILE.read_text() != "stale head":
            retie_head(model)

    def reset_prefix_cache_unless_stale(self, *args, **kwargs):
        if FAULT_FILE.read_text() == "stale cache":
            return True
        return reset_prefix_cache(self, *args, **kwargs)

    class ChildEngineWithStaleGraph(child.ChildEngine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._llm.apply_model(halve_logits_of_stale_graph)

    receivers.ArrivalCheck._record_sums = record_sums_with_fault
    child.ChildEngine = ChildEngineWithStaleGraph
    receivers.retie_head = retie_head_unless_stale
    vllm.LLM.reset_prefix_cache = reset_prefix_cache_unless_stale


if __name__ == "__main__":
    if FAULT_FILE.read_text() == "dies at start":
        os._exit(7)
    install()
    child.main(int(sys.argv[1]), int(sys.argv[2]))
