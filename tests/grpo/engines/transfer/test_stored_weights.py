"""The transports that store the weights where engines can read them: `memory` and `file`."""

import pytest
import torch
from limits import limited_file_size
from safetensors.torch import load_file
from tiny_models import Weights
from weight_loader import Loader

from grpo.engines import EngineError
from grpo.engines.transfer import checksums
from grpo.engines.transfer.file import FileSender
from grpo.engines.transfer.interface import SenderOptions
from grpo.engines.transfer.layout import read_tensors
from grpo.engines.transfer.memory import MemorySender
from grpo.types import UserError

# The name of a weight that keeps its dtype. All other floating-point weights are cast.
KEPT_NAME = f"gate_{checksums.KEEP_DTYPE_SUFFIX}"


class RecordingReceiver:
    """Records the location of the weights that a sender passes."""

    def load_stored_weights(self, update_info):
        self.update_info = update_info


def sent_dtype(name, tensor):
    if tensor.is_floating_point() and name != KEPT_NAME:
        return torch.bfloat16
    return tensor.dtype


@pytest.mark.parametrize("sender_class", [MemorySender, FileSender])
def test_weights_arrive_bit_for_bit_through_memory_or_a_file(tmp_path, sender_class):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "weights-7.safetensors").touch()  # left by a trainer that was killed
    sender = sender_class(SenderOptions(folder=folder))
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 3).T,
        "count": torch.tensor([3]),
        KEPT_NAME: torch.randn(4),
        "scalar": torch.tensor(2.5),
    }
    for scale in (1, 2):  # the second send reuses the memory, or writes a new file
        receiver = RecordingReceiver()
        scaled_weights = {name: tensor * scale for name, tensor in weights.items()}
        sender.send(checksums.WeightStream(Weights(scaled_weights), torch.bfloat16), receiver)
        assert receiver.update_info["names"] == [*weights, checksums.CHECKSUMS_NAME]
        model = Loader(weights)
        checksums.ArrivalCheck(model).load_weights(read_tensors(**receiver.update_info))
        for name, tensor in scaled_weights.items():
            expected = tensor.to(sent_dtype(name, tensor))
            assert torch.equal(model.loaded[name], expected)
            assert model.loaded[name].dtype == expected.dtype
    tensors = load_file(receiver.update_info["path"])
    assert tensors.keys() == {*weights, checksums.CHECKSUMS_NAME}
    if sender_class is FileSender:
        assert len(list(folder.iterdir())) == 1
    sender.close()
    if sender_class is FileSender:
        assert not list(folder.iterdir())


def test_full_disk_is_an_error_before_weights_are_written(tmp_path):
    sender = FileSender(SenderOptions(folder=tmp_path / "weights"))
    message = r"no space for 0.00 GB of weights at .*weights-2.safetensors: File too large"
    weights = Weights(a=torch.randn(1000))
    with limited_file_size(1000), pytest.raises(EngineError, match=message):
        sender.send(checksums.WeightStream(weights, torch.float32), RecordingReceiver())
    sender.close()


def test_the_weights_folder_is_private_and_no_link(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir(mode=0o777)
    sender = FileSender(SenderOptions(folder=folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    sender.close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(UserError, match="link: a link, or the directory of another user"):
        FileSender(SenderOptions(folder=tmp_path / "link"))


def test_the_weights_are_not_written_through_a_link(tmp_path):
    sender = FileSender(SenderOptions(folder=tmp_path))
    target = tmp_path / "target"
    (tmp_path / "weights-2.safetensors").symlink_to(target)
    with pytest.raises(EngineError, match="File exists"):
        sender.send(
            checksums.WeightStream(Weights(a=torch.randn(10)), torch.float32), RecordingReceiver()
        )
    sender.close()
    assert not target.exists()
