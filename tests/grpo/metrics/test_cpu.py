"""Which dtypes are slow or impossible on which CPU."""

import pytest
import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from grpo import config as configs
from grpo.config import EvalConfig
from grpo.metrics.cpu import bfloat16_warning, int4_obstacle, int8_warning, require_kernels
from grpo.stages.run_context import open_stage
from grpo.tools import checks
from grpo.types import UserError

NOTHING = {"architecture": "x86_64", "avx512_f": False, "avx512_vnni": False, "avx_vnni": False}
CASCADE_LAKE = {**NOTHING, "avx512_f": True, "avx512_vnni": True}
SKYLAKE_SERVER = {**NOTHING, "avx512_f": True}
ALDER_LAKE = {**NOTHING, "avx_vnni": True}
ARM = {"architecture": "aarch64"}


@pytest.fixture
def set_cpu(monkeypatch):
    """Replaces what PyTorch reports about the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def replace(capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    return replace


@pytest.mark.parametrize(
    ("capabilities", "has_avx512", "has_vnni"),
    [
        (CASCADE_LAKE, True, True),
        (SKYLAKE_SERVER, True, False),
        (ALDER_LAKE, False, True),
        (NOTHING, False, False),
        (ARM, True, True),
    ],
)
def test_int4_and_bfloat16_need_avx512_and_int8_needs_vnni(
    set_cpu, capabilities, has_avx512, has_vnni
):
    set_cpu(capabilities)
    assert (int4_obstacle() is None) == has_avx512
    assert (bfloat16_warning() is None) == has_avx512
    assert (int8_warning() is None) == has_vnni


def test_a_gpu_has_all_kernels(set_cpu, monkeypatch):
    set_cpu(NOTHING)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert int4_obstacle() is None
    assert int8_warning() is None
    assert bfloat16_warning() is None


def test_a_run_in_bfloat16_says_that_it_is_slow(set_cpu, tmp_path, capfd):
    set_cpu(NOTHING)
    tree = {"run_dir": "x", "model": {"path": "m"}, "data": {"name": "math"}}
    config = configs.parse(tree, kind=EvalConfig)
    for dtype, is_slow in (("bfloat16", True), ("float32", False)):
        settings = config.model.model_copy(update={"dtype": dtype})
        run_dir = str(tmp_path / dtype)
        run_config = config.model_copy(update={"model": settings, "run_dir": run_dir})
        with open_stage(run_config, "eval", total=1, unit="step", resume=False):
            pass
        assert ("Set model.dtype=float32" in capfd.readouterr().err) == is_slow
        assert any(checks.dtype(run_config)) == is_slow


def test_an_int4_model_is_refused_and_an_int8_model_is_warned_about(set_cpu):
    set_cpu(NOTHING)
    lines = []
    require_kernels(None, lines.append)
    assert lines == []
    require_kernels(8, lines.append)
    assert "saturate" in lines[0]
    with pytest.raises(UserError, match=r"int4 weights, but this CPU has no AVX-512"):
        require_kernels(4, lines.append)


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU kernels are not installed")
def test_vllm_has_the_kernels_that_this_machine_is_said_to_have():
    current_platform.import_kernels()
    assert hasattr(torch.ops._C, "cpu_gemm_wna16") == (int4_obstacle() is None)
    is_exact = torch.equal(int8_product_of_vllm(), exact_int8_product())
    assert is_exact == (int8_warning() is None)


ACTIVATIONS = torch.full((1, 64), 127.0)  # becomes 127 in int8, with scale 1
WEIGHTS = torch.full((8, 64), 127, dtype=torch.int8)


def int8_product_of_vllm():
    """Returns the product of `ACTIVATIONS` and `WEIGHTS` by vLLM's int8 kernel: [1, 8]."""
    weight_scale = torch.ones(1, 8)
    handler = vllm_ops.create_onednn_scaled_mm(
        WEIGHTS.t(), weight_scale, torch.float32, True, False, 32
    )
    levels, scales, _ = vllm_ops.onednn_scaled_int8_quant(ACTIVATIONS)
    product = torch.empty(1, 8)
    vllm_ops.onednn_scaled_mm(handler, levels, product, scales, None, None, None)
    return product


def exact_int8_product():
    return ACTIVATIONS @ WEIGHTS.float().t()
