"""Models in plain PyTorch, as people write them: both doors leave the same state, and compiled equals eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile.modules import adapter_parameters, adapter_sites, is_quantized

OPTIONS = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 7}
WIDTH = 42  # three heads; no power of two, and blocks of 32 end inside the rows


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 70), nn.Linear(70, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, 3, 14).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Written by hand; the output head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(59, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 59, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ControlFlow(nn.Module):
    """Breaks the graph twice: a branch on a value, and one asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.left, self.right = nn.Linear(WIDTH, 50), nn.Linear(50, WIDTH), nn.Linear(50, WIDTH)
        self.out = nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        if h.sum() > 0:
            h = self.left(h)
        else:
            h = self.right(h)
        torch._dynamo.graph_break()
        return self.out(h)


class Shared(nn.Module):
    """One module under two names, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first
        self.twice = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(F.silu(self.first(x))))
        return self.twice(F.gelu(self.twice(x)))


class SharedWeight(nn.Module):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, 50), nn.Linear(WIDTH, 50)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x)) * self.other(x + 1)


class Indexed(nn.Module):
    """ModuleList and ModuleDict by index, backwards, and one of them not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.named = nn.ModuleDict({"a": nn.Linear(WIDTH, 25), "b": nn.Linear(WIDTH, 25)})

    def forward(self, x: Tensor) -> Tensor:
        for index in (-1, 0, 2):
            x = torch.tanh(self.layers[index](x))
        return self.named["b"](x) * self.named["a"](x)


class Scaled(nn.Module):
    """A parameter used by code that is inherited, with arguments that have defaults: Dynamo guards on those."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(25, WIDTH) / 6)

    def forward(self, x: Tensor, scale: float = 0.5, shift: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.own) * scale
        return y if shift is None else y + shift


class Inherits(Scaled):
    pass


class Inherited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scaled = nn.Linear(WIDTH, WIDTH), Inherits()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(torch.tanh(self.up(x)))


class Attention(nn.Module):
    """nn.MultiheadAttention on itself, and on something else with keys and values of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 3, kdim=20, vdim=26)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own, weights = self.own(x, x, x)
        other, _ = self.cross(x.transpose(0, 1), key, value, need_weights=False)
        return own * weights.sum() + other.transpose(0, 1)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 70, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _transformer() -> nn.Module:
    return nn.Transformer(WIDTH, 2, 1, 2, 70, dropout=0.0, batch_first=True)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


TOKENS = torch.randint(0, 59, (3, 9), generator=torch.Generator().manual_seed(8))
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "gpt": (GPT, (TOKENS,)),
    "control flow": (ControlFlow, (_x(5, WIDTH),)),
    "shared modules": (Shared, (_x(5, WIDTH),)),
    "shared weight": (SharedWeight, (_x(5, WIDTH),)),
    "inherited": (Inherited, (_x(2, 5, WIDTH),)),
    "indexed": (Indexed, (_x(2, 5, WIDTH),)),
    "attention": (Attention, (_x(2, 5, WIDTH), _x(7, 2, 20), _x(7, 2, 26))),
    "encoder": (_encoder, (_x(2, 5, WIDTH),)),
    "transformer": (_transformer, (_x(2, 5, WIDTH), _x(2, 6, WIDTH))),
}
SLOW = ("transformer", "shared weight")  # its parts are tested by "encoder" and "attention"; by "shared modules"
EVERYWHERE = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
)


def _build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(4)
    make, inputs = MODELS[name]
    return make(), inputs


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for site in adapter_sites(model).values():
            site.b().normal_(std=0.2, generator=generator)


def _step(model: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    y = call(*inputs)
    (y * _x(*y.shape)).sum().backward()  # a norm at the end leaves a sum of squares constant
    return {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@EVERYWHERE
@pytest.mark.parametrize("door", ["prepare", pytest.param("example_inputs", marks=pytest.mark.slow), "backend"])
def test_compiled_equals_eager(name: str, door: str) -> None:
    model, inputs = _build(name)
    if door != "backend":
        qc.prepare(model, OPTIONS, example_inputs=inputs if door == "example_inputs" else None)
    compiled = torch.compile(model, backend="qlora", options=OPTIONS if door == "backend" else None)
    compiled(*inputs)
    _fill(model)
    ours, eager = _step(model, compiled, inputs), _step(model, model, inputs)
    assert ours.keys() == eager.keys() and len(ours) > 1
    for key, value in ours.items():
        # fp32; sums of up to 70 terms in another order, through a few layers
        scale = eager[key].abs().max().item()
        torch.testing.assert_close(value, eager[key], atol=2e-5 * scale, rtol=1e-4, msg=lambda m: f"{key}: {m}")  # noqa: B023


def _state(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: (site.out_features, site.in_features) for name, site in adapter_sites(model).items()}


@EVERYWHERE
def test_both_doors_leave_the_same_state(name: str) -> None:
    """Bit for bit, except that the backend adds nothing to what has not run yet."""
    states = {}
    for door in ("prepare", "backend"):
        torch._dynamo.reset()
        model, inputs = _build(name)
        if door == "prepare":
            qc.prepare(model, OPTIONS)
        else:
            torch.compile(model, backend="qlora", options=OPTIONS)(*inputs)
        states[door] = adapter_sites(model)
    unused = {"control flow": {"left", "right"}, "indexed": {"layers.1"}}.get(name, set())
    untraced = {"scaled.own"} if name == "inherited" else set()  # no module says that it is a linear's weight
    assert states["prepare"].keys() - states["backend"].keys() <= unused
    assert states["backend"].keys() - states["prepare"].keys() == untraced
    for site_name in states["backend"].keys() - untraced:
        site, other = states["backend"][site_name], states["prepare"][site_name]
        assert torch.equal(site.a(), other.a()) and is_quantized(site.weight)
        assert torch.equal(site.weight.codes, other.weight.codes)


@EVERYWHERE
@pytest.mark.parametrize("mode", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
def test_evaluation_gives_the_same(name: str, mode: Callable[[], Any]) -> None:
    """Eager and compiled, with adapters that count: torch's own fast paths must not pass them by."""
    model, inputs = _build(name)
    qc.prepare(model, OPTIONS)
    _fill(model)
    expected = model.train()(*inputs).detach()
    model.eval()
    compiled = torch.compile(model, backend="qlora")
    with mode():
        for y in (model(*inputs), compiled(*inputs)):
            torch.testing.assert_close(y.clone(), expected, atol=1e-4, rtol=1e-4)  # fp32, a few layers


@EVERYWHERE
def test_first_used_without_gradients_then_trained(name: str) -> None:
    model, inputs = _build(name)
    compiled = torch.compile(model, backend="qlora", options=OPTIONS)
    with torch.inference_mode():
        compiled(*inputs)
    _fill(model)
    grads = _step(model, compiled, inputs)
    assert all(value.isfinite().all() for value in grads.values())
    assert any(p.grad is not None for p in adapter_parameters(model))


def test_every_linear_of_a_model_of_torchs_own_is_adapted() -> None:
    model, inputs = _build("encoder")
    torch.compile(model, backend="qlora", options=OPTIONS)(*inputs)
    assert _state(model) == {
        f"layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "self_attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "self_attn.out_proj": (WIDTH, WIDTH),
            "linear1": (70, WIDTH),
            "linear2": (WIDTH, 70),
        }.items()
    }


def test_pieces_between_graph_breaks_share_one_set_of_adapters() -> None:
    model, (x,) = _build("control flow")
    compiled = torch.compile(model, backend="qlora", options=OPTIONS)
    compiled(x), compiled(-3 * x)
    sites = adapter_sites(model)
    assert {"inner", "out"} < set(sites) <= {"inner", "left", "right", "out"}
    before = {name: site.a() for name, site in sites.items()}
    compiled(x[:2])
    assert all(site.a() is before[name] for name, site in adapter_sites(model).items() if name in before)
    assert len(qc.explain(model).passes) > 1
