"""Eager calls of a QLoRALinear in one kernel: the plain forward's numbers, and the plain forward wherever it has to run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_compile as qc
from qlora_compile import eager
from qlora_compile.adapter_edits import add_adapter_to_site
from qlora_compile.modules import AdapterSite, QLoRALinear

K, N = 192, 70


def linear(dtype: torch.dtype = torch.bfloat16, bias: bool = True, **options: object) -> QLoRALinear:
    torch.manual_seed(0)
    model = qc.prepare(
        nn.Sequential(nn.Linear(K, N, bias=bias).to(dtype)), qc.QLoRAConfig(r=5, compute_dtype=dtype, **options)
    )
    module = model[0]
    with torch.no_grad():
        for b in module.lora_B.values():
            b.normal_()
    return module


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(3)).to(dtype)


def exact(module: QLoRALinear, x: Tensor) -> Tensor:
    """In fp64, from the weight as it is stored."""
    y = x.double() @ module.weight.dequantize().double().t()
    y = y if module.bias is None else y + module.bias.double()
    for name, a in module.lora_A.items():
        scale = module.lora_scaling[name] * module.lora_weight[name].double()
        y = y + scale * (x.double() @ a.double().t()) @ module.lora_B[name].double().t()
    return y


def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a module from now on, whether one kernel ran it."""
    seen, forward = [], eager.forward

    def record(module: nn.Module, x: Tensor) -> Tensor | None:
        y = forward(module, x)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(eager, "forward", record)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3,), (2, 9), (5, 20), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    module, seen = linear(dtype, bias), taken(monkeypatch)
    x = inputs(*shape, dtype=dtype).requires_grad_()
    y = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    assert seen == [True, True] and y.dtype == dtype and y.shape == (*shape, N)
    ulp = torch.finfo(dtype).eps
    close: Callable[[Tensor, Tensor], bool] = lambda got, want: torch.allclose(
        got.double(),
        want.double(),
        rtol=2 * ulp,
        atol=4 * ulp * float(want.detach().abs().max()) if want.numel() else 0.0,
    )
    expected = exact(module, x)
    assert close(y, expected)
    wanted = [x, module.lora_A["default"], module.lora_B["default"]]
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy.double())):
        assert got.dtype == want.dtype and close(got, want)


def test_what_is_edited_counts_at_the_next_call() -> None:
    module, x = linear(), inputs(3)
    with torch.no_grad():
        checks = [module(x)]
        for edit in (
            lambda: module.lora_B["default"].mul_(3),
            lambda: module.lora_weight["default"].fill_(0.25),
            lambda: module.lora_scaling.update(default=7.0),
            lambda: setattr(module.lora_A["default"], "data", module.lora_A["default"].data.bfloat16() * 2),
            lambda: setattr(module.lora_A["default"], "data", torch.randn(K, 5).t()),
            lambda: module.weight.copy_(torch.randn(N, K).bfloat16()),
            lambda: module.lora_A.pop("default"),
        ):
            edit()
            y = module(x)
            want = exact(module, x)
            assert torch.allclose(y.double(), want, rtol=2**-7, atol=2**-6 * float(want.abs().max()))
            assert not torch.equal(y, checks[-1])
            checks.append(y)


def test_several_adapters_by_weight_and_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, seen = linear(), inputs(2, 3), taken(monkeypatch)
    site = AdapterSite("0", module, "weight")
    add_adapter_to_site(site, "other", 19, 8.0, 0.5, qc.QLoRAConfig(init_lora_weights=False))
    with torch.no_grad():
        for weight in (0.0, 0.5, 1.0):
            module.lora_weight["default"].fill_(weight)
            want = exact(module, x)
            assert torch.allclose(module(x).double(), want, rtol=2**-7, atol=2**-6 * float(want.abs().max()))
        module.lora_weight["other"] = torch.tensor([0.0, 1.0])
        module.lora_weight["default"].fill_(0)
        assert not torch.equal(module(x)[1], module(x)[0])
    assert seen == [True] * 3 + [False] * 2


class Names(TorchDispatchMode):
    """The ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_who_watches_the_ops_sees_the_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, seen = linear(), inputs(2), taken(monkeypatch)
    with torch.no_grad():
        plain = module.plain_forward(x)
        with Names() as names:
            assert torch.equal(module(x), plain)
        assert any("mm" in name for name in names.seen)
        assert torch.allclose(torch.func.vmap(module)(x[None])[0], plain, rtol=2**-6)
        assert torch.equal(torch.jit.trace(module, (x,), check_trace=False)(x), plain)
        with torch.autograd.forward_ad.dual_level():
            module(x)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(x)).shape == (2, N)
        assert not any(seen)
        with torch.device("cpu"):
            module(x)
    assert seen[-1]


def test_autocast_of_another_dtype_and_inputs_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = linear(), taken(monkeypatch)
    x = inputs(2, dtype=torch.float32)
    with torch.no_grad():
        y = module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x), y) and y.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            module(x)
    assert seen == [True, True, False]
    for width in (K - 64, K + 1):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.randn(2, width).bfloat16())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_float_is_refused_as_by_torch(dtype: torch.dtype, compute: torch.dtype) -> None:
    module, x = linear(compute), torch.ones(2, K, dtype=dtype)
    with pytest.raises(RuntimeError) as wanted:
        nn.Linear(K, N, dtype=compute)(x)
    for call in (module, module.plain_forward):
        with pytest.raises(RuntimeError, match=str(wanted.value) if compute == torch.float32 else "dtype"):
            call(x)


def test_an_empty_batch_with_strides_of_any_kind() -> None:
    module = linear()
    for x in (torch.randn(0, K), torch.randn(0, 2 * K)[:, ::2], torch.randn(K, 0).t(), torch.randn(2, 0, K)):
        x = x.bfloat16().requires_grad_()
        module.zero_grad()
        module(x).sum().backward()  # a gradient of stride 0
        assert x.grad.shape == x.shape and not module.lora_A["default"].grad.any()


def test_dropout_in_training_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = linear(lora_dropout=0.5), taken(monkeypatch)
    module.train()(inputs(2))
    module.eval()(inputs(2))
    assert seen == [False, True]


def test_second_derivatives_are_the_plain_forwards() -> None:
    module = linear(torch.float32)
    x = inputs(2, dtype=torch.float32).requires_grad_()
    found = []
    for call in (module, module.plain_forward):
        (dx,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), module.lora_B["default"])[0])
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3 * float(found[1].abs().max())) and found[1].abs().max() > 0


def test_outputs_may_be_written_and_modules_copied_and_moved() -> None:
    module, x = linear(), inputs(2, 3)
    with torch.no_grad():
        y = module(x)
    y += torch.ones(N, dtype=y.dtype, requires_grad=True)  # refused for a view that no_grad made
    with torch.inference_mode():
        assert torch.equal(module(x), exact(module, x).bfloat16()) or module(x).is_inference()
    other = copy.deepcopy(module)
    assert other.__dict__[eager.NAME] is None
    with torch.no_grad():
        other.lora_B["default"].zero_()
        assert not torch.equal(other(x), module(x))
    assert eager.NAME not in module.to(torch.float32).__dict__


def test_backward_under_a_mode_and_compiled_autograd_run_the_op() -> None:
    module, x = linear(), inputs(2).requires_grad_()
    wanted = [x, module.lora_A["default"], module.lora_B["default"]]
    y = module(x)
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    with Names() as names:
        found = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert any("lora_linear_backward" in name for name in names.seen)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        compiled = torch.autograd.grad(y.sum(), wanted)
    for a, b, c in zip(expected, found, compiled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
