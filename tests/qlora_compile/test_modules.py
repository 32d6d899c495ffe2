"""`QLoRALinear`, adapted parameters and adapter sites: their numbers, names, seeds, and what copies of them share."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile import QLoRAConfig, prepare
from qlora_compile.adapter_edits import add_adapter
from qlora_compile.errors import ModelStateError, NoAdapterError
from qlora_compile.modules import QLoRALinear, adapter_parameters, adapter_sites, is_quantized, prepared_config
from qlora_compile.tensor import QuantizedTensor

FP32 = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 5}


class Two(nn.Module):
    """13 -> 22 -> 7."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(13, 22)
        self.down = nn.Linear(22, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Raw(nn.Module):
    """A linear over a parameter of its own: y = x w.T, with w [9, 13]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 13))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


def fill(model: nn.Module, name: str = "default") -> None:
    """B is zero after `prepare`: half of the formula would be untested."""
    for site in adapter_sites(model).values():
        nn.init.normal_(site.b(name), std=0.3)


# --- the forward ---


@pytest.mark.parametrize("shape", [(13,), (1, 13), (2, 3, 13)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_base_plus_scaled_adapters(shape: tuple[int, ...], bias: bool):
    model = nn.Sequential(nn.Linear(13, 22, bias=bias))
    prepare(model, FP32)
    fill(model)
    (linear,), x = model, torch.randn(shape)
    site = adapter_sites(model)["0"]
    weight = linear.weight.dequantize() + 5 / 3 * site.b() @ site.a()
    # fp32 sums of 13 terms
    torch.testing.assert_close(model(x), F.linear(x, weight, linear.bias), rtol=1e-5, atol=1e-5)


def test_forward_computes_in_the_compute_dtype_and_answers_in_the_inputs():
    model = prepare(Two(), FP32 | {"compute_dtype": "bfloat16"})
    fill(model)
    x = torch.randn(4, 13)
    y = model.up(x)
    assert y.dtype == torch.float32 and torch.equal(y, y.bfloat16().float())
    exact = F.linear(x, model.up.weight.dequantize() + 5 / 3 * model.up.lora_B["default"] @ model.up.lora_A["default"])
    # bf16 rounds x, W, h and y once each (2^-9 relative): 2^-6 of the largest
    torch.testing.assert_close(y, exact + model.up.bias, rtol=0, atol=2**-6 * float(exact.detach().abs().max()))


def test_gradients_reach_the_adapters_and_nothing_else():
    model = prepare(Two(), FP32)
    fill(model)
    x = torch.randn(4, 13, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    sites = ("up.lora_A.default", "up.lora_B.default", "down.lora_A.default", "down.lora_B.default")
    assert with_grad == set(sites)


def test_several_adapters_add_up_with_their_weights():
    model = prepare(Two(), FP32)
    add_adapter(model, "second", rank=2, alpha=7.0, scaling={"up": 3.5, "down": 3.5})
    fill(model)
    fill(model, "second")
    site = adapter_sites(model)["up"]
    site.adapter_weight("default").fill_(0.5)
    site.adapter_weight("second").fill_(-0.25)
    delta = 0.5 * 5 / 3 * site.b() @ site.a() - 0.25 * 3.5 * site.b("second") @ site.a("second")
    x = torch.randn(4, 13)
    expected = F.linear(x, model.up.weight.dequantize() + delta, model.up.bias)
    torch.testing.assert_close(model.up(x), expected, rtol=1e-5, atol=1e-5)  # fp32 sums of 13 terms


def test_dropout_is_on_in_training_mode_only():
    model = prepare(Two(), FP32 | {"lora_dropout": 0.5})
    fill(model)
    x = torch.randn(4, 13)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_conv1d_has_peft_shaped_adapters_and_the_right_numbers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(Conv1D(22, 13))  # weight [13, 22]: in, out
    nn.init.normal_(model[0].bias)
    prepare(model, FP32)
    fill(model)
    site = adapter_sites(model)["0"]
    assert site.fan_in_fan_out and (site.in_features, site.out_features) == (13, 22)
    assert site.a().shape == (3, 13) and site.b().shape == (22, 3)
    assert model[0].weight.transposed and model[0].weight.shape == (13, 22)
    x = torch.randn(2, 4, 13)
    weight = model[0].weight.dequantize() + 5 / 3 * (site.b() @ site.a()).t()
    torch.testing.assert_close(model(x), x @ weight + model[0].bias, rtol=1e-5, atol=1e-5)  # fp32 sums of 13 terms


# --- class and containers ---


def test_the_class_is_a_subclass_of_the_one_it_had():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(13, 22), nn.Linear(22, 7))
    prepare(model, FP32)
    assert isinstance(model[0], Mine) and isinstance(model[0], QLoRALinear) and isinstance(model[1], nn.Linear)
    assert type(model[0]).__name__ == "QLoRALinear"
    assert type(prepare(nn.Sequential(nn.Linear(5, 3)), FP32)[0]) is type(model[1])  # one class per base


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Own(13, 22), nn.Linear(22, 7))
    prepare(model, FP32)
    assert type(model[0]) is Own and list(adapter_sites(model)) == ["1"]


def test_names_in_the_state_dict_are_pefts_without_its_prefix():
    names = set(prepare(Two(), FP32).state_dict())
    adapters = {f"{site}.lora_{part}.default" for site in ("up", "down") for part in "AB"}
    assert names == {"up.weight", "up.bias", "down.weight"} | adapters


def test_a_name_that_the_module_has_already_is_refused():
    model = Two()
    model.up.lora_A = nn.Linear(2, 3)
    with pytest.raises(ModelStateError, match="up cannot be adapted: Linear already has 'lora_A'"):
        prepare(model, FP32 | {"target_modules": ["up"]})


def test_sites_are_in_module_order_and_know_their_numbers():
    model = prepare(Two(), FP32 | {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": 9}})
    sites = adapter_sites(model)
    assert list(sites) == ["up", "down"]
    assert [(s.rank(), s.alpha(), s.scaling()) for s in sites.values()] == [
        (3, pytest.approx(5), 5 / 3),
        (2, pytest.approx(9), 4.5),
    ]
    assert [(s.out_features, s.in_features) for s in sites.values()] == [(22, 13), (7, 22)]
    assert all(s.adapters == ["default"] and is_quantized(s.weight) for s in sites.values())
    expected = [sites["up"].a(), sites["up"].b(), sites["down"].a(), sites["down"].b()]
    found = adapter_parameters(model)
    assert [id(p) for p in found] == [id(p) for p in expected]
    assert adapter_parameters(model, "other") == [] == adapter_parameters(Two())


# --- how adapters start ---


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero():
    """PEFT: Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in))."""
    model = nn.Sequential(nn.Linear(450, 37))
    prepare(model, {"r": 24})
    site, bound = adapter_sites(model)["0"], 1 / math.sqrt(450)
    a = site.a().detach()
    assert float(a.abs().max()) <= bound
    # 10,800 uniform draws: the largest is within 0.1% of the bound, the standard deviation within 2% of bound/sqrt(3)
    assert float(a.abs().max()) > 0.999 * bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not site.b().any()


def test_the_bounds_are_those_of_the_installed_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=24, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(450, 37)), config).base_model.model[0].lora_A["default"].weight
    model = nn.Sequential(nn.Linear(450, 37))
    prepare(model, {"r": 24})
    ours = adapter_sites(model)["0"].a()
    assert ours.shape == theirs.shape
    assert float(ours.detach().abs().max()) == pytest.approx(float(theirs.detach().abs().max()), rel=2e-3)
    assert float(ours.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.03)


def test_gaussian_and_random_initialization():
    model = nn.Sequential(nn.Linear(450, 370))
    prepare(model, {"r": 24, "init_lora_weights": "gaussian"})
    site = adapter_sites(model)["0"]
    assert float(site.a().detach().std()) == pytest.approx(1 / 24, rel=0.04)  # 10,800 normal draws
    assert not site.b().any()
    model = nn.Sequential(nn.Linear(450, 370))
    prepare(model, {"r": 24, "init_lora_weights": False})
    b = adapter_sites(model)["0"].b().detach()
    assert b.any() and float(b.abs().max()) <= 1 / math.sqrt(24)


def test_the_draw_depends_on_seed_site_and_name_only():
    first = prepare(Two(), FP32)
    torch.rand(17)  # nor on torch's own generator
    again = prepare(Two(), FP32)
    other = prepare(Two(), FP32 | {"seed": 1})
    only = prepare(Two(), FP32 | {"target_modules": ["down"]})
    down = [adapter_sites(m)["down"].a() for m in (first, again, other, only)]
    assert torch.equal(down[0], down[1]) and torch.equal(down[0], down[3])
    assert not torch.equal(down[0], down[2])
    same_shape = prepare(nn.ModuleDict({"p": nn.Linear(13, 22), "q": nn.Linear(13, 22)}), FP32)
    p, q = adapter_sites(same_shape).values()
    assert not torch.equal(p.a(), q.a())


def test_preparing_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    model = Two()
    state = torch.get_rng_state()
    prepare(model, FP32)
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(before, state)


def test_adapters_have_the_adapter_dtype_whatever_the_models_is():
    model = prepare(Two().bfloat16(), FP32)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    half = prepare(Two(), FP32 | {"adapter_dtype": "bfloat16"})
    assert {p.dtype for p in adapter_parameters(half)} == {torch.bfloat16}


# --- further adapters ---


def test_add_adapter_at_some_sites():
    model = prepare(Two(), FP32)
    add_adapter(model, "b", rank={"down": 2}, alpha={"down": 4}, scaling={"down": 2.0})
    sites = adapter_sites(model)
    assert sites["up"].adapters == ["default"] and sites["down"].adapters == ["default", "b"]
    assert (sites["down"].rank("b"), sites["down"].alpha("b"), sites["down"].scaling("b")) == (2, 4.0, 2.0)
    assert len(adapter_parameters(model, "b")) == 2


def test_add_adapter_refuses_unknown_sites_and_taken_names_and_changes_nothing():
    model = prepare(Two(), FP32)
    with pytest.raises(NoAdapterError, match="no adapted layer 'nowhere'"):
        add_adapter(model, "b", rank={"up": 2, "nowhere": 2}, alpha=4, scaling={"up": 2.0, "nowhere": 2.0})
    with pytest.raises(ModelStateError, match="up already has an adapter 'default'"):
        add_adapter(model, "default", rank=2, alpha=4, scaling={"up": 2.0, "down": 2.0})
    assert all(site.adapters == ["default"] for site in adapter_sites(model).values())


# --- a parameter that another module's code uses ---


def raw() -> Raw:
    model = Raw()
    prepare(model, FP32, example_inputs=torch.randn(4, 13))
    fill(model)
    return model


def test_an_adapted_parameter_reads_as_weight_plus_adapters():
    model = raw()
    site = adapter_sites(model)["w"]
    assert isinstance(site.weight, QuantizedTensor) and isinstance(model, Raw)
    expected = site.weight.dequantize() + 5 / 3 * site.b() @ site.a()
    torch.testing.assert_close(model.w, expected, rtol=1e-6, atol=1e-6)  # an fp32 sum of 3 terms
    x = torch.randn(4, 13)
    model(x).sum().backward()
    assert site.a().grad is not None and site.b().grad is not None
    assert set(model.state_dict()) == {"w", "w_lora_A.default", "w_lora_B.default"}


# --- copies and moves ---


@pytest.mark.parametrize("make", [lambda: prepare(Two(), FP32), raw])
def test_deepcopy_shares_nothing_and_computes_the_same(make):
    model = make()
    fill(model)
    x = torch.randn(4, 13)
    expected = model(x).detach()
    twin = copy.deepcopy(model)
    assert prepared_config(twin) == prepared_config(model)
    assert type(twin) is type(model)
    ours, theirs = adapter_parameters(model), adapter_parameters(twin)
    assert len(ours) == len(theirs) > 0 and not {id(p) for p in ours} & {id(p) for p in theirs}
    for site in adapter_sites(model).values():
        nn.init.zeros_(site.b())
        site.adapter_weight().fill_(0)
        site.info.scaling["default"] = 0.0
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert all(s.adapter_weight() == 1 for s in adapter_sites(twin).values())


def test_a_prepared_model_can_be_wrapped():
    model = prepare(Two(), FP32)
    wrapped = nn.ModuleDict({"inner": model})
    assert prepared_config(wrapped) == QLoRAConfig.from_options(FP32)
    assert len(adapter_parameters(wrapped)) == 4


@pytest.mark.parametrize("make", [lambda: prepare(Two(), FP32), raw])
def test_moving_the_model_moves_the_adapters_weights_with_it(make):
    model = make().to("meta")
    weights = [site.adapter_weight() for site in adapter_sites(model).values()]
    assert {t.device.type for t in (*model.parameters(), *weights)} == {"meta"}


@pytest.mark.parametrize("compiled", [True, False])
def test_changing_the_models_dtype_keeps_it_computing(compiled: bool):
    model = prepare(Two(), FP32)
    fill(model)
    call = torch.compile(model, backend="qlora", options={"lowering": "aot_eager"}) if compiled else model
    x = torch.randn(4, 13)
    call(x).sum().backward()
    expected = call(x).detach()
    model.bfloat16()
    assert model.up.weight.dtype == torch.bfloat16 and isinstance(model.up.weight, QuantizedTensor)
    y = call(x.bfloat16()).detach()
    assert y.dtype == torch.bfloat16 and adapter_sites(model)["up"].adapter_weight().dtype == torch.float32
    # weights, adapters and both layers' outputs rounded to 8 bits: 2^-5 of the largest
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=2**-5 * float(expected.abs().max()))


def test_owners_of_a_shared_weight_still_share_it_after_a_move():
    model = nn.ModuleList([nn.Linear(13, 22), nn.Linear(13, 22)])
    model[1].weight = model[0].weight
    prepare(model, FP32).bfloat16()
    assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.bfloat16
    assert model[0].lora_A is model[1].lora_A and len(adapter_parameters(model)) == 2
