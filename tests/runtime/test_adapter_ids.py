"""An adapter for each row of a batch: every row as if it were alone with its adapters, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.adapter_edits import add_adapter
from qlora_compile.errors import ConfigError, ModelStateError, NoAdapterError
from qlora_compile.modules import adapter_parameters, adapter_sites

MakeModel = Callable[..., torch.nn.Module]
IDS = torch.arange(39).reshape(3, 13) * 5 % 97
ROWS: list[Any] = ["a", None, {"a": 0.5, "default": -0.25}]


def with_two(model: torch.nn.Module, **config: Any) -> torch.nn.Module:
    """Prepared, with adapters "default" of rank 3 and "a" of rank 2 on some layers only; no B is zero."""
    qc.prepare(model, {"r": 3, "compute_dtype": torch.float32} | config)
    some = {name: 2 for name in adapter_sites(model) if "q_proj" in name or "down_proj" in name}
    add_adapter(model, "a", rank=some, alpha=4.0, scaling=dict.fromkeys(some, 2.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def one_by_one(model: torch.nn.Module, rows: list[Any]) -> torch.Tensor:
    out = []
    for number, row in enumerate(rows):
        qc.set_adapters(model, row or {})
        with torch.no_grad():
            out.append(model(IDS[number : number + 1]).logits)
    return torch.cat(out)


def test_each_row_is_as_if_alone(tiny_llama: MakeModel) -> None:
    model = with_two(tiny_llama())
    alone = one_by_one(model, ROWS)
    qc.set_adapters(model, adapter_ids=ROWS)
    with torch.no_grad():
        together = model(IDS).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # fp32, products of other sizes
    assert (alone[0] - alone[1]).norm() > 0.05 * alone[1].norm()
    with pytest.raises(ModelStateError, match="3 rows, this batch has 2"):
        model(IDS[:2])
    with pytest.raises(ModelStateError, match="chosen by row"):
        qc.export(model, "never", base_precision="dequantized")
    qc.set_adapters(model, {"a": 0.5, "default": -0.25})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[2:]).logits, alone[2:], rtol=1e-4, atol=1e-5)


def test_bf16_stays_bf16_and_gradients_reach_the_chosen_rows_only(tiny_llama: MakeModel) -> None:
    model = with_two(tiny_llama(torch.bfloat16), compute_dtype=torch.bfloat16)
    qc.set_adapters(model, adapter_ids=["default", "a", "default"])
    dtypes = set()
    for site in adapter_sites(model).values():
        site.module.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    logits = model(IDS).logits
    assert dtypes == {torch.bfloat16}
    logits[0].float().square().sum().backward()
    site = adapter_sites(model)["model.layers.0.self_attn.q_proj"]
    assert site.b("default").grad is not None and site.b("default").grad.norm() > 0
    assert site.b("a").grad is not None and site.b("a").grad.norm() == 0


@pytest.mark.parametrize("door", ["prepared", "backend"])
def test_compiled_once_for_all_choices(tiny_llama: MakeModel, door: str) -> None:
    if door == "prepared":
        model = with_two(tiny_llama(num_hidden_layers=1))
        compiled = torch.compile(model, backend="qlora", options={"lowering": "aot_eager"})
        names: list[Any] = ROWS
    else:
        model = tiny_llama(num_hidden_layers=1).eval()
        options = {"r": 3, "compute_dtype": "float32", "lowering": "aot_eager", "init_lora_weights": False}
        compiled = torch.compile(model, backend="qlora", options=options)
        with torch.no_grad():
            compiled(IDS)  # the backend edits the model here
        names = ["default", None, {"default": -0.5}]
    alone = one_by_one(model, names)
    qc.set_adapters(model, adapter_ids=names)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, alone, rtol=1e-4, atol=1e-5)
        state: Any = model.__dict__["_qlora_state"]
        graphs = len(state.reports)
        for shift in (1, 2):
            rows = names[shift:] + names[:shift]
            qc.set_adapters(model, adapter_ids=rows)
            together = compiled(IDS).logits
            assert len(state.reports) == graphs
            eager = model(IDS).logits
            torch.testing.assert_close(together, eager, rtol=1e-4, atol=1e-5)
            assert (together - alone).norm() > 0.01 * alone.norm()
        qc.set_adapters(model, names[0])  # back to one choice for all: one more graph
        torch.testing.assert_close(compiled(IDS).logits[0], alone[0], rtol=1e-4, atol=1e-5)


def test_wrong_choices_change_nothing(tiny_llama: MakeModel) -> None:
    model = with_two(tiny_llama())
    before = model(IDS).logits
    for error, words, arguments in [
        (NoAdapterError, "no adapter 'b'", {"adapter_ids": ["a", "b", None]}),
        (ConfigError, "adapter_ids is empty", {"adapter_ids": []}),
        (ConfigError, "a list with one entry for each row .* got 'a'", {"adapter_ids": "a"}),
        (ConfigError, "a list with one entry for each row", {"adapter_ids": {"a": 1}}),
        (ConfigError, "chosen by name, .* got 3", {"adapter_ids": ["a", 3, None]}),
        (ConfigError, r"chosen by name, .* got \[3\]", {"weights": [3]}),
        (ConfigError, "finite number", {"adapter_ids": [{"a": float("inf")}, None, None]}),
        (ConfigError, "either weights", {"weights": "a", "adapter_ids": ["a"]}),
        (ConfigError, "either weights", {}),
    ]:
        with pytest.raises(error, match=words):
            qc.set_adapters(model, **arguments)
    assert torch.equal(model(IDS).logits, before)


def test_a_parameter_of_other_code_cannot_choose_by_row() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(24, 40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.w)

    model = Odd()
    qc.prepare(model, {"r": 2, "compute_dtype": "float32", "lowering": "eager"}, example_inputs=(torch.randn(3, 40),))
    with pytest.raises(ModelStateError, match="cannot choose by row at w"):
        qc.set_adapters(model, adapter_ids=["default", None, None])
