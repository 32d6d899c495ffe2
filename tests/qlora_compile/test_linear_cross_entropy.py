"""qlora::linear_cross_entropy against fp64, in one chunk and in many, and what it must not keep or compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_compile import cross_entropy_sweep as sweep
from qlora_compile import linear_cross_entropy as module
from qlora_compile import lora_group
from qlora_compile.runtime.kernels import cpu_gemm, devices

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@dataclass(frozen=True)
class Case:
    """One call. 2 x 37 rows with 45 features over 211 classes: nothing is square or a multiple of a tile."""

    shape: tuple[int, ...] = (2, 37, 45)
    classes: int = 211
    dtype: torch.dtype = torch.float32
    bias: bool = True
    scale: float = 1.0
    soft_cap: float = 0.0
    ignored: float = 0.2
    needs: tuple[bool, bool, bool] = (True, True, True)
    contiguous: bool = True
    seed: int = 0


def arguments(case: Case) -> list[Any]:
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    x = randn(*case.shape) if case.contiguous else randn(*case.shape[:-1], 2 * case.shape[-1])[..., ::2]
    weight, bias = randn(case.classes, case.shape[-1]), randn(case.classes) if case.bias else None
    target = torch.randint(0, case.classes, case.shape[:-1], generator=generator)
    target[torch.rand(target.shape, generator=generator) < case.ignored] = -100
    for tensor, need in zip((x, weight, bias), case.needs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(need)
    return [x, weight, bias, target, -100, case.scale, case.soft_cap]


def reference(given: list[Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """The loss and its leaves, unfused."""
    leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in given[:3] if t is not None]
    z = F.linear(*leaves) * given[5]
    if given[6]:
        z = torch.tanh(z / given[6]) * given[6]
    z = z.reshape(-1, z.shape[-1])
    z = z.float() if dtype != torch.float64 else z
    return F.cross_entropy(z, given[3].reshape(-1), ignore_index=given[4], reduction="sum"), leaves


def numbers(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, wanted)]


BASE = Case()
CASES = {
    "fp32": BASE,
    "no_bias": replace(BASE, bias=False, seed=1),
    "scaled": replace(BASE, scale=0.25, seed=2),
    "capped": replace(BASE, soft_cap=5.0, seed=3),
    "scaled_and_capped": replace(BASE, scale=0.5, soft_cap=3.0, seed=4),
    "two_dimensions": replace(BASE, shape=(37, 45), seed=5),
    "not_contiguous": replace(BASE, contiguous=False, seed=6),
    "one_row": replace(BASE, shape=(1, 45), ignored=0.0, seed=7),
    "nothing_ignored": replace(BASE, ignored=0.0, seed=8),
    "all_ignored": replace(BASE, ignored=2.0, seed=9),
    "frozen_head": replace(BASE, needs=(True, False, False), seed=10),
    "head_only": replace(BASE, needs=(False, True, True), seed=11),
    "bf16": replace(BASE, dtype=torch.bfloat16, seed=12),
    "bf16_capped": replace(BASE, dtype=torch.bfloat16, soft_cap=5.0, seed=13),
    "fp16": replace(BASE, dtype=torch.float16, seed=14),
    "bf16_frozen": replace(BASE, dtype=torch.bfloat16, bias=False, needs=(True, False, False), seed=15),
    "bf16_frozen_bias": replace(BASE, dtype=torch.bfloat16, needs=(True, False, False), seed=19),
    "bf16_frozen_scaled": replace(
        BASE, dtype=torch.bfloat16, bias=False, scale=0.0625, needs=(True, False, False), seed=17
    ),
    "bf16_frozen_capped": replace(
        BASE, dtype=torch.bfloat16, bias=False, scale=0.5, soft_cap=3.0, needs=(True, False, False), seed=18
    ),
    "bf16_all_ignored": replace(
        BASE, dtype=torch.bfloat16, bias=False, ignored=2.0, needs=(True, False, False), seed=16
    ),
}


def share_of(case: Case) -> float:
    """Of the largest value. fp32: sums of at most 211 terms. Half precision: the inputs are exact, the gradient is rounded
    when it is stored and when it is multiplied (2 half steps), and where products run in half precision their factors once
    more. Beside a bias logits of 32 are rounded after it is added, by 0.06 at most, which is 6 % of a probability."""
    if case.dtype == torch.bfloat16 and case.bias:
        return 2**-5
    return {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[case.dtype]


def check(case: Case, kernel: str = "") -> None:
    given = arguments(case)
    ours = numbers(torch.ops.qlora.linear_cross_entropy(*given, kernel), [t for t in given[:3] if t is not None])
    exact = numbers(*reference(given))
    share = share_of(case)
    assert ours[0].dtype == torch.float32
    for mine, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=share * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_fp64(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize(
    "name", ["fp32", "scaled_and_capped", "bf16", "bf16_frozen_bias", "bf16_frozen_capped", "all_ignored", "head_only"]
)
def test_nothing_waits_for_the_number_of_rows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As on a GPU: every row is computed, and the gradient of those that do not count is zero, also of not-a-number."""
    monkeypatch.setattr(sweep, "drops_rows", lambda device: False)
    monkeypatch.setitem(sweep.CHUNK_BYTES, "cpu", 4 * 211 * 9)
    monkeypatch.setattr(sweep, "LEAST_ROWS", 1)
    check(CASES[name])
    x, weight, _, target, *rest = arguments(CASES["bf16_frozen"])
    x.data[target == -100] = torch.nan
    loss, dx = torch.ops.qlora.linear_cross_entropy_grads(x.detach(), weight, None, target, *rest, True, False, False)
    assert loss.isfinite() and dx.isfinite().all() and not dx[target == -100].any() and dx.any()


KERNELS = {  # what runs, and whether the library's products are in the tensors' own dtype
    "fp32": (sweep.LIBRARY, False),
    "half": (sweep.LIBRARY, True),
    "wide_gemm": (sweep.FUSED, False),
    "softmax": (sweep.SOFTMAX, True),
}


def hold_to(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel to force; skips where this machine cannot run it."""
    kernel, native = KERNELS[name]
    monkeypatch.setattr(sweep, "multiplies_natively", lambda dtype: native)
    if kernel == sweep.FUSED and cpu_gemm.declines():
        pytest.skip("wide_gemm cannot run here")
    if kernel == sweep.SOFTMAX and not devices.has_avx512_bf16():
        pytest.skip("the sweep over logits in bf16 needs AVX-512 BF16")
    return kernel


@pytest.mark.parametrize("products", KERNELS)
@pytest.mark.parametrize(
    "name",
    [
        *("fp32", "scaled_and_capped", "bf16", "bf16_capped", "fp16", "one_row", "all_ignored"),
        *("bf16_frozen", "bf16_frozen_bias", "bf16_frozen_scaled", "bf16_frozen_capped"),
    ],
)
def test_many_chunks_tiles_and_blocks(monkeypatch: pytest.MonkeyPatch, name: str, products: str) -> None:
    """Products in fp32 by the library, in half precision, in fp32 by the generated GEMM, and the generated softmax."""
    monkeypatch.setattr(sweep, "LEAST_ROWS", 1)
    monkeypatch.setattr(sweep, "CHUNK_BYTES", {"cpu": 7 * 211 * 4 + 3})
    monkeypatch.setattr(sweep, "BLOCK_BYTES", {"cpu": 3 * 211 * 4})
    monkeypatch.setattr(sweep, "TILE_BYTES", 60 * 45 * 4)
    check(CASES[name], hold_to(products, monkeypatch))


NAMES_WITH_LOGITS = (
    *("fp32", "no_bias", "scaled_and_capped", "bf16", "one_row"),
    *("bf16_frozen", "bf16_frozen_bias", "bf16_frozen_scaled", "bf16_frozen_capped", "bf16_all_ignored"),
)


@pytest.mark.parametrize("products", KERNELS)
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("name", NAMES_WITH_LOGITS)
def test_logits_beside_the_loss(monkeypatch: pytest.MonkeyPatch, name: str, everywhere: bool, products: str) -> None:
    """The loss and its gradients are those of the op without logits, and every row has logits; in many chunks."""
    monkeypatch.setattr(sweep, "LEAST_ROWS", 1)
    monkeypatch.setitem(sweep.CHUNK_BYTES, "cpu", 4 * 211 * 9)
    monkeypatch.setattr(sweep, "drops_rows", lambda device: not everywhere)
    case = CASES[name]
    given = [*arguments(case), hold_to(products, monkeypatch)]
    loss, logits = torch.ops.qlora.linear_cross_entropy_logits(*given)
    leaves = [t for t in given[:3] if t is not None]
    exact = F.linear(*[t.detach().double() for t in leaves])
    share = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[case.dtype]  # of each: two roundings of bf16, with a bias
    torch.testing.assert_close(logits.double(), exact, rtol=share, atol=share)
    assert not logits.requires_grad and logits.dtype == case.dtype
    ours, wanted = numbers(loss, leaves), numbers(*reference(given[:-1]))
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=share_of(case) * float(theirs.abs().max()))
    with torch.no_grad():
        again, same = torch.ops.qlora.linear_cross_entropy_logits(*given)
    torch.testing.assert_close(again, loss.detach(), rtol=1e-6, atol=0)
    assert torch.equal(same, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, 0.0), (0.25, 0.0), (0.5, 3.0)])
def test_logits_have_a_gradient_where_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, native: bool, scale: float, soft_cap: float
) -> None:
    monkeypatch.setattr(sweep, "multiplies_natively", lambda dtype: native)
    hidden, weight = torch.randn(2, 5, 45, dtype=dtype, requires_grad=True), torch.randn(211, 45, dtype=dtype)
    wide = hidden.detach().double().requires_grad_()
    y = F.linear(wide, weight.double()) * scale
    y = soft_cap * torch.tanh(y / soft_cap) if soft_cap else y
    plain = y.detach().to(dtype)
    logits = module.with_gradient(hidden, plain, weight, scale, soft_cap)
    assert logits.data_ptr() == plain.data_ptr()
    dy = torch.randn_like(logits)
    logits.mul_(2)  # no view: it may be written
    (got,) = torch.autograd.grad(logits, hidden, dy)
    (wanted,) = torch.autograd.grad(y, wide, 2 * dy.double())
    # the largest of 450 sums over 211 classes, each of parts of some 2: bf16 rounds the parts, the logits and the sum
    share = 2**-6 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=share * float(wanted.abs().max()))
    assert got.dtype == dtype and module.with_gradient(hidden.detach(), plain, weight, scale, soft_cap) is plain


def test_a_cast_of_kept_logits_is_differentiated() -> None:
    hidden, weight = torch.randn(3, 45).bfloat16().requires_grad_(), torch.randn(211, 45).bfloat16()
    logits = module.with_gradient(hidden, F.linear(hidden, weight).detach().float(), weight)
    dy = torch.randn_like(logits)
    (got,) = torch.autograd.grad(logits, hidden, dy)
    wanted = dy.double() @ weight.double()
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2**-6 * float(wanted.abs().max()))  # as above


@pytest.mark.parametrize("drops_rows", [True, False])
@pytest.mark.parametrize("products", KERNELS)
@pytest.mark.parametrize("name", ["all_ignored", "bf16_all_ignored"])
def test_the_gradient_of_no_rows_is_zero_whatever_comes_in(
    monkeypatch: pytest.MonkeyPatch, name: str, products: str, drops_rows: bool
) -> None:
    """As torch's: the mean of no rows is 0 / 0, whose backward hands over 1 / 0. Where a row counts an infinity stays one,
    for a GradScaler to see."""
    monkeypatch.setattr(sweep, "drops_rows", lambda device: drops_rows)
    kernel = hold_to(products, monkeypatch)
    nothing, some = arguments(CASES[name]), arguments(replace(CASES[name], ignored=0.5))
    op = torch.ops.qlora
    for given, counted in ((nothing, False), (some, True)):
        leaves = [t for t in given[:3] if t is not None and t.requires_grad]
        for loss in (op.linear_cross_entropy(*given, kernel), op.linear_cross_entropy_logits(*given, kernel)[0]):
            for incoming in (torch.inf, torch.nan):
                grads = torch.autograd.grad(loss, leaves, torch.tensor(incoming), retain_graph=True)
                assert all(bool(g.any()) == counted and bool(g.isfinite().all()) != counted for g in grads)


def test_bf16_is_no_worse_than_the_unfused_graph() -> None:
    given = arguments(CASES["bf16"])
    exact, unfused = numbers(*reference(given)), numbers(*reference(given, torch.bfloat16))
    ours = numbers(torch.ops.qlora.linear_cross_entropy(*given), given[:3])
    # one number, in which errors cancel by luck: within bf16's half step
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2**-9, atol=0)
    for mine, theirs, wanted in zip(ours[1:], unfused[1:], exact[1:], strict=True):
        assert float((mine - wanted).norm()) <= 1.1 * float((theirs - wanted).norm())


def test_a_small_gradient_survives_fp16() -> None:
    """1 / tokens comes in backward, in fp32: a loss scale in the incoming gradient still finds all digits."""
    given = arguments(replace(BASE, dtype=torch.float16, needs=(True, False, False)))
    loss = torch.ops.qlora.linear_cross_entropy(*given)
    (scaled,) = torch.autograd.grad(loss * 1e-7 * 65536, given[0])
    exact, leaves = reference(given)
    (wanted,) = torch.autograd.grad(exact * 1e-7 * 65536, leaves[0])
    assert float((scaled.double() - wanted).norm() / wanted.norm()) < 2**-9


@pytest.mark.parametrize("bad", [211, 5000, -1])
def test_a_target_that_is_no_class_is_named(bad: int) -> None:
    given = arguments(BASE)
    given[3][1, 4] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds: the output head has 211 classes"):
        torch.ops.qlora.linear_cross_entropy(*given)


class Called(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_gradients_none_is_computed() -> None:
    given = arguments(BASE)
    with Called() as called, torch.no_grad():
        torch.ops.qlora.linear_cross_entropy(*given)
    assert not any("grads" in name for name in called.names)
    assert any(name == "qlora.linear_cross_entropy.default" for name in called.names)


def test_only_a_gradient_is_saved_and_two_numbers() -> None:
    given = arguments(replace(BASE, needs=(True, False, False)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        torch.ops.qlora.linear_cross_entropy(*given)
    assert [tuple(t.shape) for t in saved] == [(), (), (2, 37, 45)]


def test_results_own_their_memory() -> None:
    given = arguments(BASE)
    first = numbers(torch.ops.qlora.linear_cross_entropy(*given), given[:3])
    before = [t.clone() for t in first]
    other = arguments(replace(BASE, seed=50))
    numbers(torch.ops.qlora.linear_cross_entropy(*other), other[:3])
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


def test_no_buffer_grows_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CHUNK_BYTES", {"cpu": 1 << 20})
    sizes = []
    for rows in (2000, 20000):
        lora_group.release_scratch()
        given = arguments(replace(BASE, shape=(rows, 45)))
        numbers(torch.ops.qlora.linear_cross_entropy(*given), given[:3])
        sizes.append(sum(buffer.numel() * buffer.element_size() for buffer in lora_group.SCRATCH.buffers.values()))
    assert max(sizes) <= 1 << 20  # x alone is 3.6 MB in the second


OPCHECKED = ("fp32", "no_bias", "scaled_and_capped", "frozen_head", "head_only", "bf16", "not_contiguous")


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    given = tuple(arguments(CASES[name]))
    torch.library.opcheck(torch.ops.qlora.linear_cross_entropy.default, given, test_utils=CHECKS)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_grads(needs: tuple[bool, bool, bool]) -> None:
    given = arguments(replace(BASE, needs=(False, False, False)))
    torch.library.opcheck(torch.ops.qlora.linear_cross_entropy_grads.default, (*given, *needs), test_utils=CHECKS)


@pytest.mark.parametrize("name", ["no_bias", "scaled_and_capped", "frozen_head", "bf16"])
def test_opcheck_logits(name: str) -> None:
    given = tuple(arguments(CASES[name]))
    torch.library.opcheck(torch.ops.qlora.linear_cross_entropy_logits.default, given, test_utils=CHECKS)


def test_opcheck_grads_with_logits() -> None:
    given = arguments(replace(BASE, needs=(False, False, False)))
    needs = (True, False, True, True)
    torch.library.opcheck(torch.ops.qlora.linear_cross_entropy_grads.default, (*given, *needs), test_utils=CHECKS)
