"""What an op of ours allocates inside itself, as the plan has it, against what the CPU allocator counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qlora_compile import cross_entropy_sweep, workspace
from qlora_compile.lora_group import release_scratch
from qlora_compile.memory_plan import MemoryPlan, Size
from qlora_compile.runtime.kernels import cpu_gemm
from qlora_compile.step_graphs import StepGraphs
from qlora_compile.step_plan import Symbols, plan_of

SYMBOLS = Symbols(7919, 100003)
V, K = 16001, 96


def _graph(rows: int, dtype: torch.dtype, soft_cap: float, need_dw: bool, keep: bool = False) -> fx.GraphModule:
    """One call of the op, on meta tensors; the weight trains with `need_dw`, and `keep` wants the logits."""
    graph = fx.Graph()
    inputs = []
    shapes = ((rows, K), (V, K), (rows,))
    for name, shape in zip("xwt", shapes):
        inputs.append(graph.placeholder(name))
        inputs[-1].meta["val"] = torch.empty(shape, dtype=torch.long if name == "t" else dtype, device="meta")
    x, w, t = inputs
    node = graph.call_function(
        torch.ops.qlora.linear_cross_entropy_grads.default,
        (x, w, None, t, -100, 1.0, soft_cap, True, need_dw, False, keep),
    )
    results = [((), torch.float32), ((rows, K), dtype), *([((V, K), dtype)] if need_dw else [])]
    results += [((rows, V), dtype)] if keep else []
    node.meta["val"] = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in results]
    graph.output((node,))
    return fx.GraphModule(torch.nn.Module(), graph)


def _plan(rows: int, symbols: Symbols | None, *args: object, device: str = "cpu") -> MemoryPlan:
    graph = _graph(rows, *args)  # type: ignore[arg-type]
    return plan_of([StepGraphs(graph, None, 1)], symbols, device=device)


def _measured(rows: int, dtype: torch.dtype, soft_cap: float, need_dw: bool, keep: bool = False) -> int:
    """Peak bytes, without what a product's library takes and gives back within the product: oneDNN wants some for each
    thread, which is none of our allocations."""
    x, w = torch.randn(rows, K).to(dtype), torch.randn(V, K).to(dtype)
    target = torch.randint(0, V, (rows,))

    def run() -> list[Tensor]:
        needs = (True, need_dw, False, keep)
        return torch.ops.qlora.linear_cross_entropy_grads(x, w, None, target, -100, 1.0, soft_cap, *needs)

    run()  # builds the kernel, if there is one
    release_scratch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    now = peak = product_ends = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.start_ns() > product_ends:
            peak = max(peak, now)
        if event.name() == "[memory]":
            now += event.nbytes()
        elif event.name() in ("aten::mm", "aten::addmm"):
            product_ends = event.end_ns()
    del kept
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("soft_cap", "need_dw", "keep"), [(0.0, False, False), (30.0, False, False), (0.0, True, False), (0.0, False, True)]
)
def test_the_loss_in_chunks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, soft_cap: float, need_dw: bool, keep: bool
) -> None:
    for limits in (cross_entropy_sweep.CHUNK_BYTES, cross_entropy_sweep.BLOCK_BYTES):
        monkeypatch.setitem(limits, "cpu", 4 * V * 150)
    for batch, seq in ((3, 160), (1, 70)):  # four chunks of 120 rows; one of 70
        planned = _plan(SYMBOLS.batch * SYMBOLS.seq, SYMBOLS, dtype, soft_cap, need_dw, keep).at(batch, seq)
        assert planned.peak().bytes == pytest.approx(_measured(batch * seq, dtype, soft_cap, need_dw, keep), rel=0.01)
        assert _plan(batch * seq, None, dtype, soft_cap, need_dw, keep).peak() == planned.peak()


def test_a_gpus_chunks_are_larger() -> None:
    cpu, gpu = (_plan(2**16, None, torch.bfloat16, 0.0, False, device=device) for device in ("cpu", "cuda"))
    (logits,) = [buffer.size for buffer in gpu.buffers if ": logits" in buffer.name]  # given back at the op's end
    assert 64 << 20 < gpu.size(logits) <= 128 << 20 and gpu.peak().bytes > cpu.peak().bytes
    assert not gpu.scratch and [name for name in cpu.scratch if name.startswith("logits")]


def _experts(**more: Any) -> dict[str, Any]:
    x, factor = torch.empty(6, 64), torch.empty(2, 3, 64)
    kind = {"transposed": False, "quant_type": "nf4", "block_size": 32, "dtype": torch.float32, "out_features": 32}
    return {"x": x, "lora_a": [factor], "lora_b": [torch.empty(2, 32, 3)], **kind, **more}


def test_what_is_decoded_is_what_the_kernel_decodes() -> None:
    whole = {"weight torch.float32": 32 * 64 * 4}
    assert workspace._expert_scratch(_experts(forward_kernel="library_gemm"), "cpu") == whole
    assert workspace._expert_scratch(_experts(), "cuda") == whole
    fused = {} if cpu_gemm.declines() is None else whole
    assert workspace._expert_scratch(_experts(forward_kernel="fused_fp32"), "cpu") == fused
    wide = [torch.empty(2, 32, 3, dtype=torch.float64)]
    assert workspace._expert_scratch(_experts(forward_kernel="fused_fp32", lora_b=wide), "cpu") == whole


def test_a_forced_loss_on_a_gpu() -> None:
    given = {"x": torch.empty(5, 8).bfloat16(), "weight": torch.empty(97, 8).bfloat16(), "bias": None}
    for forced, dtype in (("", "bfloat16"), ("library_gemm", "float32")):
        assert list(workspace._loss_scratch(given | {"loss_kernel": forced}, "cuda")) == [f"logits torch.{dtype}"]


def test_sizes_of_chunks() -> None:
    assert Size(10, 1, 1, 150).at(3, 160) == 10 * 120 and Size(10, 1, 1).at(3, 160) == 4800
    assert Size(10, 1, 1, 150).at(1, 1) == 10
