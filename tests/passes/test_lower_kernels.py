"""lower_kernels: kernels chosen for each op, forced by option, measured on request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.passes import (
    fuse_lora_linear,
    insert_adapters,
    lower_kernels,
    normalize_linear,
    quantize_weights,
)
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import dispatch, tuning

PIPELINE = (normalize_linear, quantize_weights, insert_adapters, fuse_lora_linear, lower_kernels)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


def trace(traced: Callable[..., Any], **options: Any) -> Any:
    t = traced(nn.Linear(192, 72), torch.randn(3, 7, 192), compute_dtype="bfloat16", **options)
    t.ctx.chooser = partial(kernels.choose_kernel, tune=t.ctx.config.autotune)
    return t


def test_both_directions_are_chosen_and_recorded(traced: Callable[..., Any]) -> None:
    t = trace(traced)
    assert t.count(*PIPELINE) == 1
    (node,) = t.nodes("lora_linear")
    assert [op for op, _ in node.meta["qlora_kernels"]] == ["lora_linear", "lora_linear_backward"]
    _, choice = node.meta["qlora_kernels"][0]
    assert str(choice.problem) == "M≤32 N=72 K=192 R=3 bfloat16 nf4/32"
    assert len(node.args) == 17  # the op asks for itself


@pytest.mark.parametrize("name", ["fp32_gemm", "library_gemm"])
def test_a_forced_kernel_stands_in_the_graph(traced: Callable[..., Any], name: str) -> None:
    t = trace(traced, kernels={"lora_linear": name})
    before = t.count(*PIPELINE[:-1]), t()
    t.run(lower_kernels)
    (node,) = t.nodes("lora_linear")
    assert node.args[17:] == (name, "")
    assert node.meta["qlora_kernels"][0][1].why == "forced by option"
    # bf16 products of 192 terms, the weight rounded to bf16 in one of the two
    torch.testing.assert_close(t(), before[1], atol=2**-5, rtol=2**-6)


def test_autotune_measures_once(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    t = trace(traced, autotune=True)
    t.run(*PIPELINE)
    entries = {entry.op: entry for entry in tuning.measured("cpu")}
    assert set(entries) == {"lora_linear", "lora_linear_backward"}
    times = entries["lora_linear"].microseconds
    assert {"fp32_gemm", "library_gemm"} <= set(times) and all(us > 0 for us in times.values())
    (node,) = t.nodes("lora_linear")
    choice = node.meta["qlora_kernels"][0][1]
    assert choice.name == min(times, key=times.__getitem__)
    assert choice.why.startswith("measured here: M=32 N=72 K=192: ")
    monkeypatch.setattr(tuning, "time_all", lambda *a: pytest.fail("measured again"))
    trace(traced, autotune=True).run(*PIPELINE)


def test_a_wide_group_and_dense_problems_can_be_measured() -> None:
    for op, sizes in {
        "lora_linear": {"n": (64, 32), "k": 96, "rank": 4, "quant_type": "nf4", "block_size": 32, "dropout": True},
        "lora_linear_backward": {"n": (64, 32), "k": 96, "rank": 0},
        "dense_linear": {"n": (100,), "k": 96},
        "attention": {"n": (40,), "k": 16},
        "grouped_lora_linear": {"n": (48,), "k": 64, "rank": 4, "quant_type": "nf4", "block_size": 64},
        "grouped_lora_linear_backward": {"n": (48,), "k": 60},
    }.items():
        choice = kernels.choose_kernel(op, rows=24, dtype=torch.bfloat16, device="cpu", tune=True, **sizes)  # type: ignore[arg-type]
        assert choice.why.startswith("measured here"), op


def test_the_choice_does_not_name_what_was_not_measured() -> None:
    """Of the loss's kernels the first that covers it runs: there is nothing to measure."""
    choice = kernels.choose_kernel(
        "linear_cross_entropy", rows=24, n=(211,), k=32, dtype=torch.float32, device="cpu", tune=True
    )
    assert not choice.why.startswith("measured") and not tuning.measured("cpu")


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    few = {"vocab_size": 67, "num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, **few))


EXPERTS_AND_LOSS = ("grouped_lora_linear", "grouped_lora_linear_backward", "linear_cross_entropy")


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("forced", ["", "library_gemm"])
def test_experts_and_the_loss_are_chosen_and_forced(forced: str, keep_logits: bool) -> None:
    ids = torch.randint(0, 67, (2, 9))
    results = []
    for names in (dict.fromkeys(EXPERTS_AND_LOSS, forced) if forced else {}, {}):
        model = qc.prepare(_mixtral(), {"block_size": 32, "compute_dtype": "float32"})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        options = {"lowering": "eager", "keep_logits": keep_logits, "kernels": names}
        loss = torch.compile(model, backend="qlora", options=options)(input_ids=ids, labels=ids).loss
        loss.backward()
        rows = {row.op: row for row in qc.explain(model).choices if row.op in EXPERTS_AND_LOSS}
        assert set(rows) == set(EXPERTS_AND_LOSS)
        assert rows["linear_cross_entropy"].modules == ("lm_head",)
        assert "model.layers.1.mlp.experts.down_proj" in rows["grouped_lora_linear"].modules
        for row in rows.values():
            assert not names or (row.kernel, row.why) == ("library_gemm", "forced by option")
            assert set(row.sources) == set(row.parts)  # a CPU's are written when they are asked for
        assert {rows["grouped_lora_linear"].kernel} == {
            linear.lowering for linear in qc.explain(model).linears if ".experts." in linear.name
        }
        gradients = [p.grad for name, p in sorted(model.named_parameters()) if p.grad is not None]
        results.append([loss.detach(), *gradients])
    assert len(results[0]) > 4
    for mine, other in zip(*results, strict=True):
        # fp32 sums of some 60 products in another order
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_kernel_of_another_device_is_not_forced_in_silence() -> None:
    sizes: Any = {"rows": 8, "n": (64,), "k": 64, "dtype": torch.bfloat16, "quant_type": "nf4", "block_size": 64}
    barred = (("fused_fp32", "adapters are in float64"),)
    choice = kernels.choose_kernel("grouped_lora_linear", "fused_fp32", device="cuda", barred=barred, **sizes)
    assert choice.why == "the only one; fused_fp32 was asked for but declines: not for cuda"


@pytest.mark.parametrize("forced", ["", "library_gemm"])
def test_a_trace_names_them_in_its_graphs(forced: str) -> None:
    options = {"block_size": 32, "kernels": dict.fromkeys(EXPERTS_AND_LOSS, forced) if forced else {}}
    ids = torch.zeros(1, 9, dtype=torch.int64)
    report = qc.trace(_mixtral(), {"input_ids": ids, "labels": ids}, options)
    ops = ("qlora.grouped_lora_linear", "qlora.linear_cross_entropy")
    for graph, count in (("forward", 5), ("backward", 4)):
        named = [record for record in report.stages[graph] if record.target.startswith(ops)]
        assert len(named) == count
        assert all(record.kernels and (not forced or record.kernels[0][1] == forced) for record in named)


def test_what_a_head_that_trains_rules_out_is_said() -> None:
    from qlora_compile.cross_entropy_sweep import FUSED, SOFTMAX, problem

    x, weight = torch.randn(4, 32, dtype=torch.bfloat16), torch.randn(67, 32, dtype=torch.bfloat16)
    choice = kernels.choose_kernel("linear_cross_entropy", SOFTMAX, rows=4, **problem(x, weight, None, True))
    assert choice.name != SOFTMAX
    assert choice.why.endswith(f"; {SOFTMAX} was asked for but declines: the head trains")
    bias = torch.zeros(67, dtype=torch.float64)
    assert {name for name, _ in problem(x.float(), weight.float(), bias, False)["barred"]} == {SOFTMAX, FUSED}
