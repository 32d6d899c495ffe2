"""One compiled function that calls several models: which of them the backend edits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import ModelStateError
from qlora_compile.modules import adapter_sites, prepared_config

OPTIONS = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 7}
X = torch.randn(5, 21, generator=torch.Generator().manual_seed(8))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(21, 38), nn.Tanh(), nn.Linear(38, 13))


@pytest.mark.parametrize("order", [1, -1])
def test_the_student_is_edited_and_its_frozen_teacher_is_not(order: int) -> None:
    student, teacher = _model(), _model().requires_grad_(False)
    before = teacher(X)

    def distill(x: torch.Tensor) -> torch.Tensor:
        first, second = (student, teacher)[::order]
        return (first(x) - second(x)).square().mean()

    compiled = torch.compile(distill, backend="qlora", options=OPTIONS)
    losses = [compiled(X).item()]
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(X).backward()
        optimizer.step()
    losses.append(compiled(X).item())
    assert losses[1] < losses[0]
    torch.testing.assert_close(losses[1], distill(X).item(), rtol=1e-5, atol=1e-6)  # fp32
    assert len(adapter_sites(student)) == 2 and not adapter_sites(teacher)
    assert torch.equal(teacher(X), before) and prepared_config(teacher) is None


def test_two_plain_models_that_train_are_refused() -> None:
    one, other = _model(), _model()
    compiled = torch.compile(lambda x: one(x) + other(x), backend="qlora", options=OPTIONS)
    with pytest.raises(
        ModelStateError, match=r"several models \(Sequential and Sequential\), and the backend edits one"
    ):
        compiled(X)
    assert prepared_config(one) is None and prepared_config(other) is None
    assert all(p.requires_grad for p in [*one.parameters(), *other.parameters()])


def test_two_prepared_models_give_what_eager_gives() -> None:
    one, other = qc.prepare(_model(), OPTIONS), qc.prepare(_model(), OPTIONS | {"r": 2})
    for site in [*adapter_sites(one).values(), *adapter_sites(other).values()]:
        nn.init.normal_(site.b())
    y = torch.compile(lambda x: one(x) * other(x), backend="qlora")(X)
    torch.testing.assert_close(y, one(X) * other(X), rtol=1e-4, atol=1e-4)  # fp32, sums of 38 terms


def test_beside_a_prepared_model_a_trained_head_stays_dense() -> None:
    backbone, head = qc.prepare(_model(), OPTIONS), nn.Linear(13, 7)
    torch.compile(lambda x: head(backbone(x)), backend="qlora")(X).sum().backward()
    assert type(head) is nn.Linear and head.weight.grad is not None and not adapter_sites(head)
