"""Toy models that several test files use, and what they do with them: fill adapters, compare states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qlora_compile.modules import adapter_parameters, adapter_sites
from qlora_compile.tensor import QuantizedTensor

# fp32, so that a wrong factor cannot hide in rounding; blocks of 32 leave ragged last blocks in these weights.
FP32: dict[str, Any] = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 5}
# Dynamo, the passes and AOTAutograd run for real, Inductor does not.
AOT_FP32: dict[str, Any] = FP32 | {"lowering": "aot_eager"}
# fp32 sums of at most 80 terms of size 1, added in another order
TIGHT: dict[str, float] = {"atol": 5e-5, "rtol": 5e-5}

Llama = Callable[..., nn.Module]  # conftest's `tiny_llama`


class MLP(nn.Module):
    """up [53, 37] with bias, down [21, 53] without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(37, 53), nn.Linear(53, 21, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class RawParameters(nn.Module):
    """Linears that are not modules: w [53, 37] and v [53, 21]."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(53, 37) * 0.2), nn.Parameter(torch.randn(53, 21) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.linear(x, self.w)) @ self.v


class Block(nn.Module):
    """q_proj [22, 13] with bias, out_proj [13, 22] without, around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(13, 22)
        self.out_proj = nn.Linear(22, 13, bias=False)
        self.norm = nn.LayerNorm(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.out_proj(torch.tanh(self.q_proj(x))))


class Language(nn.Module):
    """An embedding, two blocks and an output head that `tied` shares with the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 13)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(13, 37, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


# Language's linears that are quantized, and tokens for it.
BLOCKS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "out_proj")]
TOKENS = torch.arange(10).view(2, 5)


def random_tokens(*shape: int) -> Tensor:
    """For the tiny Llama of conftest: no special token."""
    return torch.randint(3, 211, shape)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make()


def compile_model(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="qlora", fullgraph=True, options=AOT_FP32 | options)


def fill(model: nn.Module) -> None:
    """Adapters that are not zero: B is, at first, and would hide half of the formula."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for site in adapter_sites(model).values():
            for name in site.adapters:
                site.b(name).normal_(std=0.3, generator=generator)


def take_grads(model: nn.Module) -> list[Tensor]:
    """The adapters' gradients, taken away from them."""
    grads = []
    for param in adapter_parameters(model):
        assert param.grad is not None
        grads.append(param.grad)
        param.grad = None
    return grads


def graphs_compiled(call: Callable[[], Any]) -> int:
    """How many graphs the call compiled."""
    before = counters["stats"]["unique_graphs"]
    call()
    return counters["stats"]["unique_graphs"] - before


def same_as_eager(model: nn.Module, compiled: Any, x: Tensor, **tolerance: float) -> None:
    """Output and adapter gradients of one call, compiled and eager."""
    tolerance = tolerance or TIGHT
    out = compiled(x)
    out.square().mean().backward()
    grads = take_grads(model)
    expected = model(x)
    expected.square().mean().backward()
    torch.testing.assert_close(out, expected, **tolerance)
    for mine, theirs in zip(grads, take_grads(model), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor by its name, the parts of quantized ones separately."""
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = tensor.data_4bit._asdict() if isinstance(tensor, QuantizedTensor) else {"": tensor}
        out |= {f"{name}/{key}": part for key, part in parts.items() if part is not None}
    return out


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Equal bits, layouts, kinds of modules (the model's own aside) and frozen parameters."""
    ours, theirs = state_of(a), state_of(b)
    frozen = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (a, b)]
    kinds = [[(name, type(m).__name__) for name, m in model.named_modules() if name] for model in (a, b)]
    layouts = [
        {name: t.layout_4bit for name, t in model.state_dict().items() if isinstance(t, QuantizedTensor)}
        for model in (a, b)
    ]
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return equal and all(one == other for one, other in (frozen, kinds, layouts))
