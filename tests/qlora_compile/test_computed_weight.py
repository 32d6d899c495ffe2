"""What an adapted parameter reads as in eager code: the dense weight, into which nothing can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from toy_models import FP32, RawParameters, fill, seeded

import qlora_compile as qc
from qlora_compile.computed_weight import ComputedWeight
from qlora_compile.errors import ModelStateError

X = torch.randn(3, 37, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def model() -> Any:
    made = qc.prepare(seeded(RawParameters), FP32, example_inputs=(torch.randn(2, 37),))
    fill(made)
    return made


def _assign_data(m: Any) -> None:
    m.w.data = torch.zeros_like(m.w)


def _assign_rows(m: Any) -> None:
    m.w[1:3] = 0


def _subtract(m: Any) -> None:
    weight = m.w
    weight -= 1


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda m: m.w.add_(1),
    "data": lambda m: m.w.data.mul_(0),
    "detach": lambda m: m.w.detach().zero_(),
    "transpose": lambda m: m.w.t().zero_(),
    "a row": lambda m: m.w[0].fill_(3),
    "a chunk": lambda m: m.w.chunk(2)[1].zero_(),
    "init": lambda m: nn.init.kaiming_uniform_(m.w),
    "out": lambda m: torch.zeros(m.w.shape, out=m.w),
    "foreach": lambda m: torch._foreach_add_([m.w], 1),
    "op": lambda m: torch.ops.aten.mul_.Tensor(m.w, 2),
    "operator": _subtract,
    "assigned data": _assign_data,
    "assigned rows": _assign_rows,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused(model: Any, write: Callable[[Any], Any]) -> None:
    before = model(X)
    with torch.no_grad(), pytest.raises(ModelStateError, match=r"weight of w is computed .*would be lost: .*export"):
        write(model)
    assert torch.equal(model(X), before)


def test_reading_is_as_ever(model: Any) -> None:
    assert type(model.w) is ComputedWeight and type(model(X)) is Tensor
    rows = model.w[torch.tensor([2, 0])]  # a copy, which its owner may write into
    rows.add_(1)
    clone = model.w.data.clone()
    clone += 1
    other = torch.zeros(model.w.shape).add_(model.w)
    assert type(rows) is type(clone) is type(other) is Tensor
    torch.testing.assert_close(clone - 1, other, rtol=1e-5, atol=1e-5)  # 1 added and taken away again in fp32
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_who_sees_ops_one_by_one_gets_a_plain_tensor(model: Any) -> None:
    expected = model(X).detach()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).sum())(trained)
    assert grads.keys() == trained.keys()
    # one product in another order
    torch.testing.assert_close(torch.func.vmap(model)(X).detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(make_fx(model)(X)(X).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_no_adapter_into_4_bits(tiny_llama: Callable[..., Any], safe: bool) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.arange(22).reshape(2, 11)
    options = {"init_lora_weights": False, "target_modules": ["q_proj"]}
    adapted = peft.get_peft_model(tiny_llama(num_hidden_layers=1), peft.LoraConfig(r=3, **options)).eval()
    run = torch.compile(adapted, backend="qlora", options={"quantize": True, "lowering": "eager"})
    run(input_ids=ids)
    before = adapted(input_ids=ids).logits
    with pytest.raises(ModelStateError, match=r"q_proj is computed .*PEFT's save_pretrained"):
        adapted.merge_and_unload(safe_merge=safe)
    with pytest.raises(ModelStateError, match="would be lost"):
        adapted.merge_adapter(safe_merge=safe)
    assert torch.equal(adapted(input_ids=ids).logits, before)
