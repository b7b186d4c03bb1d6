"""Where models come from: the environment must be able to import them."""

import sys

import pytest

from grpo.learning import models
from grpo.types import UserError


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """Returns `install(text)`, which puts a package torchvision in front of an installed one."""

    def install(text):
        folder = tmp_path / "site" / "torchvision"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.syspath_prepend(str(folder.parent))

    yield install
    sys.modules.pop("torchvision", None)


def test_a_torchvision_for_another_torch_is_an_error_that_says_what_to_remove(
    torchvision, tmp_path
):
    torchvision("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(UserError) as raised:
        models.resolve("tiny-qwen2", None, tmp_path / "model", 0)
    message = str(raised.value)
    assert "torchvision cannot be imported (operator torchvision::nms does not exist)" in message
    assert message.endswith("pip uninstall torchvision torchaudio torchcodec")
    assert not (tmp_path / "model").exists()


def test_a_torchvision_that_can_be_imported_is_accepted(torchvision, tiny):
    torchvision("")
    assert models.resolve(str(tiny()), None, tiny(), 0) == tiny()
