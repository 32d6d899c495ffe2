"""`QuantizedTensor` where a model uses it: what autograd saves, what modules do with it, and files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile.tensor import QuantizedTensor

SHAPE = (29, 45)  # 1305 values: 20 blocks of 64 and 25 values, an odd number of codes


def make(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, **options: Any) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(7)
    return qc.quantize_4bit(torch.randn(shape, generator=generator).to(dtype), **options)


def same_parts(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = list(zip(a.data_4bit, b.data_4bit, strict=True))
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)


def saved_for_backward(run: Callable[[], Tensor]) -> list[Tensor]:
    """Everything that autograd saves in `run`, inner tensors of subclasses included."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        parts = tensor.data_4bit if isinstance(tensor, QuantizedTensor) else (tensor,)
        saved.extend(part for part in parts if part is not None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


# --- autograd ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 45), (2, 3, 45), (45,)])
def test_linear_saves_nothing_dense_and_gives_the_right_gradient(bias: bool, shape: tuple[int, ...]):
    weight = nn.Parameter(make(), requires_grad=False)
    b = torch.randn(29) if bias else None
    x = torch.randn(shape, requires_grad=True)
    saved = saved_for_backward(lambda: F.linear(x, weight, b))
    assert saved, "the codes at least are saved"
    floating = [t.numel() for t in saved if t.is_floating_point()]
    assert all(numel < weight.numel() for numel in floating)
    y = F.linear(x, weight, b)
    cotangent = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    # fp32 products of 45 and 29 terms
    torch.testing.assert_close(y.detach(), F.linear(x.detach(), weight.dequantize(), b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, cotangent @ weight.dequantize(), rtol=1e-5, atol=1e-5)


def test_a_transposed_weight_saves_nothing_dense_either():
    """Conv1D: addmm(bias, x, W) with W [in, out] stored transposed."""
    weight = nn.Parameter(make(transposed=True), requires_grad=False)
    x, bias = torch.randn(6, 29, requires_grad=True), torch.randn(45)
    saved = saved_for_backward(lambda: torch.addmm(bias, x, weight))
    assert all(t.numel() < weight.numel() for t in saved if t.is_floating_point())
    y = torch.addmm(bias, x, weight)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), torch.addmm(bias, x.detach(), weight.dequantize()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, weight.dequantize().sum(1).expand(6, 29), rtol=1e-5, atol=1e-5)  # 45 fp32 terms


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reading_without_gradients_works(mode: Callable[[], Any]):
    q, x = make(torch.bfloat16), torch.randn(3, 45, dtype=torch.bfloat16)
    with mode():
        y = F.linear(x, q)
        inside = make(torch.bfloat16)
    # bf16: both round an fp32 sum of 45 terms once, in different orders: half a unit in the last place each
    torch.testing.assert_close(y, F.linear(x, q.dequantize()), rtol=2**-7, atol=2**-6)
    assert not inside.codes.is_inference()  # a weight that was quantized in there can be used in training
    x = x.float().requires_grad_()
    F.linear(x, inside.float()).sum().backward()
    assert x.grad is not None


def test_linear_with_another_dtype_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(torch.randn(3, 45), make(torch.bfloat16))


# --- modules and files ---


def module_with(weight: QuantizedTensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def test_modules_move_it_between_dtypes():
    module = module_with(make())
    codes = module.weight.codes.clone()
    for change, dtype in (
        (module.half, torch.float16),
        (module.bfloat16, torch.bfloat16),
        (module.float, torch.float32),
    ):
        change()
        assert isinstance(module.weight, QuantizedTensor) and isinstance(module.weight, nn.Parameter)
        assert module.weight.dtype == dtype == module.bias.dtype and not module.weight.requires_grad
        assert torch.equal(module.weight.codes, codes)
    module.to(torch.device("meta"))
    assert isinstance(module.weight, QuantizedTensor) and module.weight.device.type == "meta"


def test_state_dict_round_trip():
    source, target = module_with(make()), module_with(qc.quantize_4bit(torch.randn(SHAPE)))
    state = source.state_dict()
    assert isinstance(state["weight"], QuantizedTensor)
    assert state["weight"].codes.data_ptr() == source.weight.codes.data_ptr()  # no copy, as for a dense weight
    target.load_state_dict(state)
    assert same_parts(source.weight, target.weight)


def test_loading_a_dense_checkpoint_quantizes_it():
    dense = nn.Linear(45, 29)
    target = module_with(make(block_size=32))
    target.load_state_dict(dense.state_dict())
    assert same_parts(target.weight, qc.quantize_4bit(dense.weight, block_size=32))


def test_assign_keeps_it_quantized():
    source, target = module_with(make()), nn.Linear(45, 29, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(target.weight, QuantizedTensor) and same_parts(source.weight, target.weight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensor") / "state.pt"
    module = module_with(make(torch.bfloat16))
    torch.save({"tensor": make(transposed=True), "state": module.state_dict(), "parameter": module.weight}, path)
    return path


def test_load_weights_only(saved: Path):
    loaded = torch.load(saved, weights_only=True)
    assert same_parts(loaded["tensor"], make(transposed=True)) and loaded["tensor"].transposed
    assert same_parts(loaded["state"]["weight"], make(torch.bfloat16))
    parameter = loaded["parameter"]
    assert isinstance(parameter, nn.Parameter) and isinstance(parameter, QuantizedTensor)
    assert not parameter.requires_grad and parameter.dtype == torch.bfloat16


def test_a_file_holds_4_bits(tmp_path: Path):
    q = make(torch.bfloat16, (512, 768))
    torch.save(q, tmp_path / "q.pt")
    assert (tmp_path / "q.pt").stat().st_size < q.numel() * 0.53 + 4000  # 4.13 bits and the archive's headers


_LOAD = """
import sys, torch
{imports}
loaded = torch.load(sys.argv[1], weights_only=True)
print(type(loaded["tensor"]).__name__, tuple(loaded["tensor"].dequantize().shape))
"""


@pytest.mark.parametrize(
    "imports", ["import qlora_compile.tensor", "import qlora_compile; qlora_compile.QuantizedTensor"]
)
def test_load_weights_only_in_a_fresh_process(saved: Path, imports: str):
    code = _LOAD.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuantizedTensor (29, 45)"


def test_without_our_import_torch_names_what_to_allow(saved: Path):
    done = subprocess.run([sys.executable, "-c", _LOAD.format(imports=""), str(saved)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "qlora_compile.tensor._rebuild" in done.stderr
