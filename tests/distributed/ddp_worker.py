"""DistributedDataParallel around a prepared model: each function is one check, run on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from harness import (
    LR,
    Decoder,
    batches,
    largest_difference,
    main,
    mine,
    on_all_ranks,
    prepared,
    train,
    train_alone,
    train_together,
    trainable,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel as DDP

import qlora_compile as qc
from qlora_compile.errors import ModelStateError
from qlora_compile.modules import adapter_sites

STEPS = 3


def _compare(model: Any, call: Any, **options: Any) -> dict[str, Any]:
    alone, expected = train_alone(STEPS, **options)
    losses = train_together(call, torch.optim.SGD(trainable(model), LR), STEPS)
    same = all(
        torch.equal(one.weight.codes, two.weight.codes) and torch.equal(one.weight.absmax, two.weight.absmax)
        for one, two in zip(adapter_sites(model).values(), adapter_sites(alone).values(), strict=True)
    )
    return {
        "losses": losses,
        "expected": expected,
        "difference": largest_difference(model, alone),
        "weights as they were": all(on_all_ranks(same)),
    }


def eager(mesh: DeviceMesh) -> dict[str, Any]:
    model = prepared()
    return _compare(model, DDP(model))


def bf16(mesh: DeviceMesh) -> dict[str, Any]:
    model = prepared(dtype=torch.bfloat16)
    return _compare(model, DDP(model), dtype=torch.bfloat16)


def compiled(mesh: DeviceMesh) -> dict[str, Any]:
    model = prepared()
    model.compile(backend="qlora")
    return _compare(model, DDP(model))


def compiled_outside(mesh: DeviceMesh) -> dict[str, Any]:
    model = prepared()
    return _compare(model, torch.compile(DDP(model), backend="qlora"))


def split_by_dynamo(mesh: DeviceMesh) -> dict[str, Any]:
    """Buckets smaller than the adapters: Dynamo cuts the graph where a bucket ends, and compiles each piece."""
    model = prepared()
    model.compile(backend="qlora")
    before, dist._DEFAULT_FIRST_BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, 4000
    found = _compare(model, DDP(model, bucket_cap_mb=0.004))
    dist._DEFAULT_FIRST_BUCKET_BYTES = before
    reports = model.__dict__["_qlora_state"].reports
    fused = sum(stage.rewrites for report in reports for stage in report.passes if stage.name == "fuse_lora_linear")
    return found | {"graphs": len(reports), "fused": fused, "linears": len(adapter_sites(model))}


def checkpointing(mesh: DeviceMesh) -> dict[str, Any]:
    model = prepared(checkpointing=True)
    return _compare(model, DDP(model))


def accumulation(mesh: DeviceMesh) -> dict[str, Any]:
    """Two micro-batches, the first without synchronization, against their mean over all ranks in one process."""
    data = batches(2)
    alone = prepared()
    train(lambda ids: (alone(data[0]) + alone(data[1])) / 2, torch.optim.SGD(trainable(alone), LR), data[:1])
    model = prepared()
    ddp = DDP(model)
    optimizer = torch.optim.SGD(trainable(model), LR)
    with ddp.no_sync():
        (ddp(mine(data[0])) / 2).backward()
    local = torch.cat([p.grad.flatten() for p in trainable(model)])
    (ddp(mine(data[1])) / 2).backward()
    optimizer.step()
    equal = all(torch.equal(local, other) for other in on_all_ranks(local))
    return {"difference": largest_difference(model, alone), "ranks agree before the last": equal}


def paged(mesh: DeviceMesh) -> dict[str, Any]:
    """Inductor's code with the ops that move pages in its backward pass, gradients in pages or not, beside DDP's hooks."""

    def optimizer(model: Any, kind: Any, **options: Any) -> Any:
        # a gradient that is all rounding must not become a whole step: eps is large beside it
        return kind(trainable(model), lr=LR, **({} if kind is qc.PagedLion else {"eps": 1e-2}), **options)

    found = {}
    for name, kind, bits, budget in (
        ("gradients in pages", qc.PagedAdamW, 32, "1MiB"),
        ("8 bits", qc.PagedAdamW, 8, "16KiB"),
        ("Lion", qc.PagedLion, 32, "16KiB"),
    ):
        torch._dynamo.reset()
        alone = prepared(r=48)
        expected = train(alone, optimizer(alone, kind, state_bits=bits), batches(STEPS))
        model = prepared(r=48, lowering="inductor")
        pages = optimizer(model, kind, state_bits=bits, device_budget=budget)
        model.compile(backend="qlora")
        losses = train_together(DDP(model), pages, STEPS)
        values = torch.cat([parameter.detach().flatten() for parameter in trainable(model)])
        numbers = pages.statistics()
        found[name] = {
            "losses": losses,
            "expected": expected,
            "difference": largest_difference(model, alone),
            "ranks agree": all(torch.equal(values, other) for other in on_all_ranks(values)),
            "moved": numbers.moved_in_bytes,
            "misses": numbers.misses,
        }
    return found


def wrapped_in_a_module(mesh: DeviceMesh) -> dict[str, Any]:
    """DDP does not find the list of what to leave alone on a module around the prepared one: it sends dense values."""
    model = prepared()
    outer = torch.nn.Sequential(model)
    return _compare(model, DDP(outer))


def too_early(mesh: DeviceMesh) -> dict[str, str]:
    """A plain model in DDP, then compiled or prepared: the adapters would never be summed over the ranks."""
    found = {}
    plain = DDP(Decoder())
    for name, use in (
        ("compiled", lambda: torch.compile(plain, backend="qlora", options={"r": 4})(mine(batches(1)[0]))),
        ("prepared", lambda: qc.prepare(plain)),
    ):
        try:
            use()
        except ModelStateError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    ways = (eager, bf16, compiled, compiled_outside, split_by_dynamo, checkpointing, accumulation, wrapped_in_a_module)
    main({check.__name__: check for check in (too_early, *ways, paged)})
