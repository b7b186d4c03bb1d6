"""Helpers of the GPU tests: the device, models on it, and the output of measured values."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30


def report(quantity, value, unit):
    """Prints a measured value, for example `figure: gap of the probe: 0.018 nats`.

    Args:
        quantity: What was measured, and under which conditions.
        value: The number.
        unit: Its unit, for example "s".
    """
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    print(f"figure: {quantity}: {number} {unit}", flush=True)


def to_device_and_dtype(model, dtype):
    """Moves a model to DEVICE and converts its parameters.

    Buffers (rotary frequencies) stay in float32, as they do in the learner.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(DEVICE)


def gpu_bytes_in_use():
    """Returns the GPU memory that all processes use, in bytes."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes
