"""chunk_cross_entropy: head + loss -> one op; what it recognises, what it declines and why, and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qlora_compile as qc
from qlora_compile.passes import PIPELINE, chunk_cross_entropy

V, K = 53, 21
Loss = Callable[[Tensor, Tensor], Any]  # (logits, targets) -> what the model returns


class Model(nn.Module):
    """A trunk, a head without or with bias, and a loss of the test's own."""

    def __init__(self, loss: Loss, bias: bool = False) -> None:
        super().__init__()
        self.trunk, self.lm_head, self.loss = nn.Linear(K, K, bias=False), nn.Linear(K, V, bias=bias), loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.lm_head(torch.tanh(self.trunk(x))), target)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, V, (2, 7), generator=generator)
    target[0, :3] = target[:, -1] = -100
    return torch.randn(2, 7, K, generator=generator).to(dtype), target


def flat(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z.view(-1, V), t.view(-1), **options)


def shifted(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers 4 wrote, and many models of their own still do."""
    return flat(z[..., :-1, :].contiguous().float(), t[..., 1:].contiguous()), z


RECOGNISED: dict[str, Loss] = {
    "mean": lambda z, t: (flat(z.float(), t), z),
    "sum": lambda z, t: (flat(z, t, reduction="sum"), z),
    "divided": lambda z, t: (flat(z, t, reduction="sum") / 11, z),
    "ignore_index": lambda z, t: (flat(z, t.clamp(min=0), ignore_index=0), z),
    "module": lambda z, t: (nn.CrossEntropyLoss()(z.flatten(0, 1), t.flatten()), z),
    "shifted": shifted,
    "sliced": lambda z, t: (F.cross_entropy(z[:, 2:].reshape(-1, V), t[:, 2:].reshape(-1)), z),
    "transposed": lambda z, t: (F.cross_entropy(z.transpose(1, 2), t), z),
    "permuted": lambda z, t: (F.cross_entropy(z.permute(0, 2, 1).float(), t), z),
    "scaled": lambda z, t: (flat(y := z * 0.25, t), y),
    "divided_logits": lambda z, t: (flat(z / 8.0, t), z),
    "soft_cap": lambda z, t: (flat(y := torch.tanh(z / 3.0) * 3.0, t), y),
    "scaled_then_capped": lambda z, t: (flat(torch.tanh(z * 0.5 / 3.0) * 3.0, t), None),
    "loss_only": lambda z, t: (flat(z, t), None),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RECOGNISED)
def test_it_computes_the_same_loss_and_gradients(traced: Callable[..., Any], name: str, bias: bool) -> None:
    module = Model(RECOGNISED[name], bias)
    graph = traced(module, *inputs(), keep_logits=False)
    wrt = (module.trunk.weight, *module.lm_head.parameters())  # a head that trains too
    loss = graph()
    before = [loss.detach(), *torch.autograd.grad(loss, wrt)]
    assert graph.count(chunk_cross_entropy) == 1
    assert graph.targets().count("linear_cross_entropy") == 1
    assert not {"cross_entropy", "linear_cross_entropy_grads"} & set(graph.targets())
    loss = graph()
    after = [loss.detach(), *torch.autograd.grad(loss, wrt)]
    for mine, theirs in zip(after, before, strict=True):
        # fp32 sums over 53 classes, 21 features and 14 rows in another order
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))
    assert graph.count(chunk_cross_entropy) == 0


def test_the_logits_leave_the_output(traced: Callable[..., Any]) -> None:
    graph = traced(Model(RECOGNISED["mean"]), *inputs(), keep_logits=False)
    output = list(graph.gm.graph.nodes)[-1]
    assert None not in output.args[0]
    graph.run(chunk_cross_entropy)
    assert len(output.args[0]) == 2 and output.args[0][1] is None


KEPT: dict[str, tuple[Loss, float, float]] = {  # and f of what is returned
    **{
        name: (RECOGNISED[name], 1.0, 0.0)
        for name in ("mean", "sum", "divided", "ignore_index", "module", "transposed", "permuted", "divided_logits")
    },
    "scaled": (RECOGNISED["scaled"], 0.25, 0.0),
    "soft_cap": (RECOGNISED["soft_cap"], 1.0, 3.0),
    "cast": (lambda z, t: (flat(y := z.to(torch.float64), t), y), 1.0, 0.0),
    "scaled_and_cast": (lambda z, t: (flat(y := (z / 8.0).to(torch.float64), t), y), 0.125, 0.0),
    "scaled_and_capped": (lambda z, t: (flat(y := torch.tanh(z * 0.5 / 3.0) * 3.0, t), y), 0.5, 3.0),
    "capped_for_the_loss": (lambda z, t: (flat(torch.tanh(z / 3.0) * 3.0, t), z), 1.0, 0.0),
}


WITH_BIAS = tuple(name for name in KEPT if name != "soft_cap" and "capped" not in name)


@pytest.mark.parametrize(("name", "bias"), [*((name, False) for name in KEPT), *((name, True) for name in WITH_BIAS)])
def test_logits_that_are_kept_are_no_business_of_autograd(traced: Callable[..., Any], name: str, bias: bool) -> None:
    function, scale, soft_cap = KEPT[name]
    module = Model(function, bias)
    graph = traced(module, *inputs())
    loss = graph()
    before = [loss.detach(), *torch.autograd.grad(loss, module.trunk.weight)]
    logits = module(*inputs())[1].detach()
    assert graph.count(chunk_cross_entropy) == 1 and graph.count(chunk_cross_entropy) == 0
    assert graph.targets().count("linear_cross_entropy_logits") == 1 and "cross_entropy" not in graph.targets()
    (returned,) = graph.gm.graph.output_node().args
    assert len(returned) == 3
    ((index, head, *found),) = graph.ctx.kept_logits
    assert index == 1 and graph.values[head] is module.lm_head.weight and found == [scale, soft_cap]
    loss = graph()
    after = [loss.detach(), *torch.autograd.grad(loss, module.trunk.weight)]
    for mine, theirs in zip(after, before, strict=True):
        # fp32 sums over 53 classes, 21 features and 14 rows in another order
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))
    module.lm_head.requires_grad_(False)  # as it is where this pass runs
    given = graph.values
    _, kept, hidden = graph.gm(*[given[n.name] for n in graph.gm.graph.find_nodes(op="placeholder")])
    torch.testing.assert_close(kept, logits)
    assert not kept.requires_grad and hidden.requires_grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["loss_only", "scaled_then_capped"])
def test_where_no_logits_are_returned_there_are_none_by_default(
    traced: Callable[..., Any], name: str, bias: bool
) -> None:
    module = Model(RECOGNISED[name], bias)
    graph = traced(module, *inputs())
    loss = graph()
    before = [loss.detach(), *torch.autograd.grad(loss, module.trunk.weight)]
    assert graph.count(chunk_cross_entropy) == 1 and not graph.ctx.kept_logits
    assert graph.targets().count("linear_cross_entropy") == 1 and "cross_entropy" not in graph.targets()
    loss = graph()
    for mine, theirs in zip([loss.detach(), *torch.autograd.grad(loss, module.trunk.weight)], before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))  # as above


KEPT_AS_THEY_ARE: dict[str, Loss] = {
    "shifted": RECOGNISED["shifted"],
    "sliced": RECOGNISED["sliced"],
    "half_changed": lambda z, t: (flat(torch.tanh((y := z * 0.5) / 3.0) * 3.0, t), y),
    "half_capped": lambda z, t: (flat((y := torch.tanh(z / 3.0)) * 3.0, t), y),
    "reshaped": lambda z, t: (F.cross_entropy(y := z.view(-1, V), t.view(-1)), y),
    "twice": lambda z, t: (flat(y := z * 2.0, t), y, z),
}


@pytest.mark.parametrize("name", KEPT_AS_THEY_ARE)
@pytest.mark.filterwarnings("error")
def test_by_default_logits_that_are_returned_in_another_way_stay(traced: Callable[..., Any], name: str) -> None:
    graph = traced(Model(KEPT_AS_THEY_ARE[name]), *inputs())
    before = graph.text()
    assert graph.declined(chunk_cross_entropy) == {} and graph.text() == before and not graph.ctx.kept_logits


@pytest.mark.filterwarnings("error")
def test_by_default_a_head_that_trains_and_a_graph_without_gradients_stay(traced: Callable[..., Any]) -> None:
    for model, options in (
        (Model(RECOGNISED["mean"]), {"modules_to_save": ("lm_head",)}),
        (Model(RECOGNISED["soft_cap"], bias=True), {}),
        (Model(RECOGNISED["mean"]).requires_grad_(False), {}),
    ):
        graph = traced(model, *inputs(), **options)
        before = graph.text()
        assert graph.declined(chunk_cross_entropy) == {} and graph.text() == before
    with torch.no_grad():
        graph = traced(Model(RECOGNISED["mean"]), *inputs())
    assert graph.declined(chunk_cross_entropy) == {}


DECLINED: dict[str, tuple[Loss, str]] = {
    "weights": (lambda z, t: flat(z, t, weight=torch.ones(V)), "weighs the classes"),
    "smoothing": (lambda z, t: flat(z, t, label_smoothing=0.1), "smooths the labels"),
    "no_reduction": (lambda z, t: flat(z, t, reduction="none").sum(), "reduces by 'none'"),
    "probabilities": (lambda z, t: F.cross_entropy(z.view(-1, V), z.detach().view(-1, V).softmax(-1)), "probabilities"),
    "other_reader": (lambda z, t: (flat(z, t), z.argmax(-1)), "argmax reads the logits too"),
    "other_reader_of_scaled": (lambda z, t: (flat(y := z * 2, t), y.sum()), "reads the logits too"),
    "function_between": (lambda z, t: flat(torch.sin(z), t), "sin stands between the output head and the loss"),
    "temperature_tensor": (lambda z, t: flat(z * z.new_ones(()), t), "stands between"),
    "cap_then_scale": (lambda z, t: flat(torch.tanh(z / 3.0) * 3.0 * 2.0, t), "stands between"),
    "single_class": (lambda z, t: F.cross_entropy(z[..., :40].reshape(-1, 40), t.view(-1) % 40), "picks single logits"),
    "mixed_rows": (lambda z, t: F.cross_entropy(z.view(V, -1).t(), t.view(-1)), "t stands between the output head"),
    "reordered": (lambda z, t: F.cross_entropy(z.permute(1, 2, 0), t.t()), "not the last dimension"),
    "two_swaps": (lambda z, t: flat(z.transpose(0, 1).contiguous(), t), "transpose stands between"),
    "one_row": (lambda z, t: F.cross_entropy(z[0, 3], t[0, 3]), "one row without a batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_does_not_know_stays_with_a_reason(traced: Callable[..., Any], name: str) -> None:
    loss, reason = DECLINED[name]
    graph = traced(Model(loss), *inputs(), keep_logits=False)
    before = graph.text()
    with pytest.warns(UserWarning, match=f"keep_logits=False has no effect on .*({reason})"):
        declined = graph.declined(chunk_cross_entropy)
    assert len(declined) == 1 and graph.text() == before


def test_a_write_between_head_and_loss_is_seen(traced: Callable[..., Any]) -> None:
    class Writes(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            hidden = torch.tanh(self.trunk(x))
            logits = self.lm_head(hidden)
            hidden.add_(1)
            return flat(logits, target) + hidden.sum()

    graph = traced(Writes(lambda z, t: None), *inputs(), keep_logits=False)
    with pytest.warns(UserWarning, match="writes in place"):
        assert list(graph.declined(chunk_cross_entropy).values()) == [
            "something between the output head and the loss writes in place"
        ]


def test_a_quantized_head_is_named(traced: Callable[..., Any]) -> None:
    graph = traced(Model(RECOGNISED["mean"]), *inputs(), keep_logits=False, exclude_modules=())
    with pytest.warns(
        UserWarning, match="the output head is quantized or has adapters: leave it out by exclude_modules"
    ):
        graph.declined(*PIPELINE)


NO_LOSS: dict[str, Loss] = {
    "logits": lambda z, t: z,
    "changed": lambda z, t: torch.tanh(z.float() / 3.0) * 3.0,
    "sliced": lambda z, t: z[:, 1:].contiguous(),
}


@pytest.mark.parametrize("name", NO_LOSS)
def test_logits_for_a_loss_outside_of_the_graph_are_said(traced: Callable[..., Any], name: str) -> None:
    graph = traced(Model(NO_LOSS[name]), *inputs(), keep_logits=False)
    with pytest.warns(
        UserWarning, match="keep_logits=False has no effect on .*: the loss is not computed in its graph"
    ):
        assert len(graph.declined(chunk_cross_entropy)) == 1


@pytest.mark.parametrize("case", ["kept", "not trained", "not returned"])
def test_nothing_is_said_of_other_graphs_without_a_loss(
    traced: Callable[..., Any], case: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = Model((lambda z, t: z.argmax(-1)) if case == "not returned" else NO_LOSS["logits"])
    with torch.set_grad_enabled(case != "not trained"):
        graph = traced(model, *inputs(), keep_logits=case == "kept")
    assert not graph.declined(chunk_cross_entropy)
    assert not [w for w in recwarn if "keep_logits" in str(w.message)]


# --- whole models ---


def model_and_batch(
    make: Callable[..., nn.Module], dtype: torch.dtype, layers: int = 1, **config: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    model = qc.prepare(
        make(dtype, num_hidden_layers=layers), {"r": 3, "compute_dtype": dtype, "init_lora_weights": False} | config
    )
    ids = torch.randint(0, 211, (2, 13))
    labels = ids.clone()
    labels[0, :6] = -100
    return model, {"input_ids": ids, "labels": labels}


def compiled(model: nn.Module, keep_logits: bool, **options: Any) -> Any:
    torch._dynamo.reset()
    options = {"lowering": "aot_eager", "keep_logits": keep_logits} | options
    return torch.compile(model, backend="qlora", options=options, fullgraph=True)


def gradients(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(17)}])
def test_a_llama_trains_the_same_without_logits(tiny_llama: Callable[..., nn.Module], extra: dict[str, Any]) -> None:
    model, batch = model_and_batch(tiny_llama, torch.float32)
    kept = compiled(model, True)(**batch, **extra)
    kept.loss.backward()
    wanted = gradients(model)
    out = compiled(model, False)(**batch, **extra)
    assert out.logits is None and kept.logits.shape == (2, 13, 211)
    out.loss.backward()
    torch.testing.assert_close(out.loss, kept.loss, rtol=1e-6, atol=0)
    # fp32 through one layer, sums in another order: 1e-5 is some hundred roundings of 6e-8
    assert float((gradients(model) - wanted).norm() / wanted.norm()) < 1e-5


def test_bf16_is_as_close_to_fp32_as_with_logits(tiny_llama: Callable[..., nn.Module]) -> None:
    model, batch = model_and_batch(tiny_llama, torch.bfloat16, modules_to_save=("lm_head",))
    found = []
    for keep in (True, False):
        out = compiled(model, keep)(**batch)
        out.loss.backward()
        found.append((float(out.loss.detach()), gradients(model).float()))
    exact = model.float()
    out = exact(**batch)  # the same bf16 weights, in fp32
    out.loss.backward()
    loss, wanted = float(out.loss.detach()), gradients(exact)
    errors = [(abs(mine - loss), float((grads - wanted).norm())) for mine, grads in found]
    assert errors[1][0] <= errors[0][0] + 1e-4 and errors[1][1] <= 1.2 * errors[0][1]  # bf16 noise of one batch


def test_evaluation_without_labels_and_generation_keep_logits(tiny_llama: Callable[..., nn.Module]) -> None:
    model, batch = model_and_batch(tiny_llama, torch.float32)
    model.eval()
    with torch.no_grad():
        eager = model(**batch)
        out = compiled(model, False)(**batch)
        assert out.logits is None
        torch.testing.assert_close(out.loss, eager.loss, rtol=1e-6, atol=0)
        out = compiled(model, False)(input_ids=batch["input_ids"], logits_to_keep=4)
        torch.testing.assert_close(out.logits, eager.logits[:, -4:], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    wanted = model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    model.compile(backend="qlora", options={"lowering": "aot_eager", "keep_logits": False})
    assert torch.equal(model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False), wanted)


def test_other_lengths_reuse_one_graph(tiny_llama: Callable[..., nn.Module]) -> None:
    model, _ = model_and_batch(tiny_llama, torch.float32)
    run = compiled(model, False)
    for rows, length in ((2, 13), (3, 9), (4, 21), (5, 17)):
        ids = torch.randint(0, 211, (rows, length))
        out = run(input_ids=ids, labels=ids)
        out.loss.backward()
        assert out.logits is None
        torch.testing.assert_close(out.loss, model(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=0)
    assert qc.explain(model).graphs == 2  # the first shape's own, then one for all


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("lowering", ["aot_eager", "eager"])
def test_a_batch_without_a_label_has_no_loss_and_a_gradient_of_zeros(lowering: str, keep_logits: bool) -> None:
    options = {"r": 3, "compute_dtype": torch.float32, "init_lora_weights": False, "exclude_modules": ["lm_head"]}
    model = qc.prepare(Model(RECOGNISED["mean"]), options)
    x, target = inputs()
    for run in (model, compiled(model, keep_logits, lowering=lowering)):
        loss, _ = run(x, target.fill_(-100))
        loss.backward()
        assert loss.isnan() and not gradients(model).any()
    assert {each.name: each.rewrites for each in qc.explain(model).passes}["chunk_cross_entropy"] == 1


class Sizes(TorchDispatchMode):
    """How many elements each op's results have."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("lowering", ["aot_eager", "eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reads", ["loss", "logits", "both", "written"])
def test_kept_logits_differentiate_as_ever(tiny_llama: Callable[..., nn.Module], reads: str, lowering: str) -> None:
    """By the loss, by a loss of one's own on the logits, by both at once, and of logits that were written in place."""
    model, batch = model_and_batch(tiny_llama, torch.float32)
    weights = torch.randn(2, 13, 211)
    found = []
    for run in (model, compiled(model, True, lowering=lowering)):
        out = run(**batch)
        logits = out.logits.mul_(0.5) if reads == "written" else out.logits
        total = torch.zeros(()) if reads in ("logits", "written") else out.loss
        total = total if reads == "loss" else total + (logits.tanh() * weights).mean()
        with Sizes() as sizes:
            total.backward()
        found.append((out.loss.detach(), out.logits.detach(), gradients(model)))
    assert out.logits.grad_fn is not None
    for mine, theirs in zip(*found, strict=True):
        # fp32 through one layer, sums in another order: some hundred roundings of 6e-8, where random signs cancel
        assert float((mine - theirs).norm() / theirs.norm()) < 3e-5
    if reads == "loss":
        assert weights.numel() not in sizes.found  # no gradient of logits that nobody asked for


def test_kept_logits_of_a_plain_model_and_without_gradients(tiny_llama: Callable[..., nn.Module]) -> None:
    plain = tiny_llama(torch.float32, num_hidden_layers=1)
    _, batch = model_and_batch(tiny_llama, torch.float32)
    run = compiled(plain, True, r=3, compute_dtype="float32")
    out = run(**batch)
    passes = {each.name: each.rewrites for each in qc.explain(plain).passes}
    assert "_WithGradient" in out.logits.grad_fn.name() and passes["chunk_cross_entropy"] == 1
    out.loss.backward()
    with torch.no_grad():
        again = run(**batch)
    assert not again.logits.requires_grad
    torch.testing.assert_close(again.logits, out.logits.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.loss, out.loss.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reads", ["loss", "logits", "both"])
@pytest.mark.parametrize("name", ["scaled", "scaled_and_capped", "capped_for_the_loss", "scaled_and_cast"])
def test_kept_logits_that_are_scaled_or_capped_differentiate_as_ever(name: str, reads: str) -> None:
    options = {"r": 3, "compute_dtype": torch.float32, "init_lora_weights": False}
    model = qc.prepare(Model(KEPT[name][0]), options)
    found = []
    for run in (model, compiled(model, True)):
        loss, logits = run(*inputs())
        total = loss if reads == "loss" else (logits.tanh() ** 2).mean()
        (total if reads != "both" else total + loss).backward()
        found.append((loss.detach(), logits.detach(), gradients(model)))
    passes = {each.name: each.rewrites for each in qc.explain(model).passes}
    assert "_WithGradient" in logits.grad_fn.name() and passes["chunk_cross_entropy"] == 1
    for mine, theirs in zip(*found, strict=True):
        # fp32 through one layer, sums in another order: some hundred roundings of 6e-8, where random signs cancel
        assert float((mine - theirs).norm() / theirs.norm()) < 3e-5
