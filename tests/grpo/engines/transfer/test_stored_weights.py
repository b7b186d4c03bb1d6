"""The transports that store the weights where engines read them: memory and file."""

import resource

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Weights
from weight_loader import Loader

from grpo.engines import EngineError
from grpo.engines.transfer import checksums
from grpo.engines.transfer.file import FileSender
from grpo.engines.transfer.interface import SenderOptions
from grpo.engines.transfer.layout import read_tensors
from grpo.engines.transfer.memory import MemorySender


class StoredReceiver:
    """Keeps what a sender says about the place of the weights."""

    def load_stored_weights(self, update_info):
        self.update_info = update_info


@pytest.mark.parametrize("file", [False, True])
def test_weights_arrive_bit_for_bit_through_memory_or_a_file_of_safetensors(tmp_path, file):
    """Read in place; a file is a new one each time."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "weights-7.safetensors").touch()  # left by a trainer that was killed
    sender_class = FileSender if file else MemorySender
    sender = sender_class(SenderOptions(folder=tmp_path / "weights"))
    kept = f"gate_{checksums.KEEP_DTYPE_SUFFIX}"
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 3).T,
        "count": torch.tensor([3]),
        kept: torch.randn(4),
        "scalar": torch.tensor(2.5),
    }
    for scale in (1, 2):  # the second write reuses the memory
        receiver = StoredReceiver()
        scaled = Weights({name: tensor * scale for name, tensor in weights.items()})
        sender.send(checksums.WeightStream(scaled, torch.bfloat16), receiver)
        assert receiver.update_info["names"] == [*weights, checksums.CHECKSUMS_NAME]
        model = Loader(weights)
        checksums.ArrivalCheck(model).load_weights(read_tensors(**receiver.update_info))
        for name, tensor in weights.items():
            expected = (
                torch.bfloat16 if tensor.is_floating_point() and name != kept else tensor.dtype
            )
            assert (
                torch.equal(model.loaded[name], (tensor * scale).to(expected))
                and model.loaded[name].dtype == expected
            )
    assert load_file(receiver.update_info["path"]).keys() == {*weights, checksums.CHECKSUMS_NAME}
    assert not file or len(list((tmp_path / "weights").iterdir())) == 1
    sender.close()
    assert not file or not list((tmp_path / "weights").iterdir())


def test_a_full_disk_is_an_error_before_weights_are_written(tmp_path):
    sender = FileSender(SenderOptions(folder=tmp_path / "weights"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            EngineError,
            match=r"no space for 0.00 GB of weights at .*weights-2.safetensors: File too large",
        ):
            weights = Weights(a=torch.randn(1000))
            sender.send(checksums.WeightStream(weights, torch.float32), StoredReceiver())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sender.close()
