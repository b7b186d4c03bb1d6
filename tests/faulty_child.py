"""An engine process with one fault put in, named by GRPO_TEST_FAULT.

What the canary, the probe and the transfer's checks must see.
"""

import os
import sys

import torch

from grpo.engines import _child

FAULT = os.environ["GRPO_TEST_FAULT"]


def install():
    from grpo.engines import _transfer

    if FAULT == "stale head":  # vLLM 0.32's own fault with tied embeddings on a CPU
        _transfer.retie_head = lambda model: None
    elif FAULT == "stale cache":
        import vllm

        vllm.LLM.reset_prefix_cache = lambda self, *args, **kwargs: True
    elif FAULT in ("swapped", "missing layer", "stale layer", "flipped bit", "zeroed"):
        passing = _transfer.Arrivals._passing
        kept = {}

        def faulty(self, weights):
            rows = [(name, tensor.clone()) for name, tensor in weights]
            if FAULT == "flipped bit":
                rows[3][1].view(torch.uint8).view(-1)[21] ^= 4
            rows = list(passing(self, rows))  # what is done after it no checksum sees
            if FAULT == "missing layer":
                rows = [(name, tensor) for name, tensor in rows if ".layers.1." not in name]
            if FAULT == "zeroed":
                rows = [
                    (
                        name,
                        tensor.zero_()
                        if name.endswith("layers.0.self_attn.v_proj.weight")
                        else tensor,
                    )
                    for name, tensor in rows
                ]
            if FAULT == "swapped":
                one, two = (
                    "model.layers.0.mlp.gate_proj.weight",
                    "model.layers.0.mlp.up_proj.weight",
                )
                tensors = dict(rows)
                rows = [(name, tensors[{one: two, two: one}.get(name, name)]) for name, _ in rows]
            if FAULT == "stale layer":  # every update brings the first one's layer
                for name, tensor in rows:
                    kept.setdefault(name, tensor.clone())
                rows = [
                    (name, kept[name] if ".layers.1." in name else tensor) for name, tensor in rows
                ]
            return iter(rows)

        _transfer.Arrivals._passing = faulty


if __name__ == "__main__":
    if FAULT == "dies at start":
        os._exit(7)
    install()
    _child.main(int(sys.argv[1]), int(sys.argv[2]))
