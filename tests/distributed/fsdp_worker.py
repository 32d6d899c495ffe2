"""FSDP2 (`fully_shard`) of a prepared model: each function is one check, run on every rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import (
    LR,
    VOCABULARY,
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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qlora_compile as qc
from qlora_compile.config import QLoRAConfig
from qlora_compile.errors import ModelStateError
from qlora_compile.modules import adapter_sites
from qlora_compile.runtime.distributed import split_model
from qlora_compile.scaling import Parts
from qlora_compile.sharding import QuantizedShard
from qlora_compile.tensor import QuantizedTensor

STEPS = 3


def shard(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


class Weight(nn.Module):
    """One weight, to be split."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def _inner(weight: Any) -> dict[str, Tensor]:
    names = ("codes", "absmax", "absmax_scale", "absmax_offset")
    return {name: getattr(weight, name).clone() for name in names if getattr(weight, name) is not None}


def exact_bytes(mesh: DeviceMesh) -> dict[str, Any]:
    """Split, gathered, split and gathered again: every byte of codes and scales is the original's."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    # rows that the ranks share unevenly, fewer rows than ranks, scale blocks of 256 that end inside a rank's rows
    for rows, columns, options in (
        (50, 96, {"block_size": 32}),
        (2, 64, {}),
        (1111, 128, {}),
        (1111, 128, {"double_quant": False, "quant_type": "fp4"}),
        (517, 320, {"block_size": 64}),
        (5, (33, 70), {"per_expert": True}),
        (8, (33, 70), {"per_expert": True, "double_quant": False}),
    ):
        shape = (rows, *columns) if isinstance(columns, tuple) else (rows, columns)
        dense = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        original = qc.quantize_4bit(dense, **options)
        before, values = _inner(original), original.dequantize()
        module = fully_shard(Weight(original), mesh=mesh)
        local = module.weight.to_local()
        checks = {
            "sharded": isinstance(local, QuantizedShard),
            "full": torch.equal(module.weight.full_tensor(), values),
        }
        start = mesh.get_local_rank() * -(-rows // mesh.size())
        checks["rows"] = torch.equal(local.dequantize(), values[start : start + local.shape[0]])
        for turn in (1, 2):
            module.unshard()
            weight = module.weight
            checks["whole"] = isinstance(weight, QuantizedTensor) and weight.shape == shape
            after = _inner(weight)
            checks[f"bytes {turn}"] = all(torch.equal(before[name], after[name]) for name in before)
            checks["values"] = torch.equal(weight.dequantize(), values)
            module.reshard()
        found[f"{rows} x {columns} {options}"] = checks
    everywhere = on_all_ranks(found)
    return {key: [check for ranks in everywhere for check, ok in ranks[key].items() if not ok] for key in found}


def _compare(model: Any, call: Any, **options: Any) -> dict[str, Any]:
    alone, expected = train_alone(STEPS, **options)
    losses = train_together(call, torch.optim.SGD(trainable(model), LR), STEPS)
    model.unshard()
    for block in model.blocks:
        block.unshard()
    pairs = zip(adapter_sites(model).values(), adapter_sites(alone).values(), strict=True)
    same = all(torch.equal(one.weight.codes, two.weight.codes) for one, two in pairs)
    for block in model.blocks:
        block.reshard()
    model.reshard()
    difference = largest_difference(model, alone)
    return {
        "losses": losses,
        "expected": expected,
        "difference": difference,
        "weights as they were": all(on_all_ranks(same)),
    }


def eager(mesh: DeviceMesh) -> dict[str, Any]:
    model = shard(prepared(), mesh)
    return _compare(model, model)


def compiled_whole(mesh: DeviceMesh) -> dict[str, Any]:
    model = shard(prepared(), mesh)
    model.compile(backend="qlora")
    return _compare(model, model) | _fused(model)


def compiled_blocks(mesh: DeviceMesh) -> dict[str, Any]:
    model = prepared()
    for block in model.blocks:
        block.compile(backend="qlora")
    shard(model, mesh)
    return _compare(model, model) | _fused(model)


def inductor(mesh: DeviceMesh) -> dict[str, Any]:
    """Real code, whose backward reads codes that were freed and gathered again."""
    model = prepared(lowering="inductor")
    for block in model.blocks:
        block.compile(backend="qlora")
    shard(model, mesh)
    return _compare(model, model) | _fused(model)


def experts(mesh: DeviceMesh) -> dict[str, Any]:
    """A mixture of experts: five fused experts on the ranks, uneven, with adapters of each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_local_experts=5, num_key_value_heads=2, use_cache=False, **sizes)

    def make() -> Any:
        torch.manual_seed(3)
        model = MixtralForCausalLM(config)
        options = {"r": 4, "lora_alpha": 1, "block_size": 32, "init_lora_weights": False, "compute_dtype": "float32"}
        return qc.prepare(model, options)

    def losses(model: Any, data: list[Tensor]) -> list[float]:
        return train(lambda ids: model(input_ids=ids, labels=ids).loss, torch.optim.SGD(trainable(model), LR), data)

    alone, model = make(), make()
    expected = losses(alone, batches(STEPS))
    left_whole = split_model(model, mesh)
    found = torch.tensor(losses(model, [mine(ids) for ids in batches(STEPS)]))
    dist.all_reduce(found)
    shards = [site.weight.to_local() for site in adapter_sites(model).values() if site.weight.dim() == 3]
    return {
        "losses": (found / mesh.size()).tolist(),
        "expected": expected,
        "difference": largest_difference(model, alone),
        "weights as they were": len(shards) == 4 and all(isinstance(shard, QuantizedShard) for shard in shards),
        "left whole": left_whole,
    }


def _fused(model: Any) -> dict[str, Any]:
    reports = model.__dict__["_qlora_state"].reports
    stages = [stage for report in reports for stage in report.passes]
    return {
        "fused": sum(stage.rewrites for stage in stages if stage.name == "fuse_lora_linear"),
        "grouped": sum(stage.rewrites for stage in stages if stage.name == "group_linears"),
        "linears": len(adapter_sites(model)),
        "graphs": len(reports),
    }


def checkpointing(mesh: DeviceMesh) -> dict[str, Any]:
    model = shard(prepared(checkpointing=True), mesh)
    return _compare(model, model)


def checkpointing_compiled(mesh: DeviceMesh) -> dict[str, Any]:
    model = shard(prepared(checkpointing=True), mesh)
    model.compile(backend="qlora")
    return _compare(model, model) | _fused(model)


def bf16(mesh: DeviceMesh) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(prepared(dtype=torch.bfloat16), mesh, mp_policy=policy)
    return _compare(model, model, dtype=torch.bfloat16)


def hybrid(mesh: DeviceMesh) -> dict[str, Any]:
    """Split over pairs of ranks, each pair with a copy."""
    model = shard(prepared(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows")))
    return _compare(model, model)


def accumulation(mesh: DeviceMesh) -> dict[str, Any]:
    data = batches(2)
    alone = prepared()
    train(lambda ids: (alone(data[0]) + alone(data[1])) / 2, torch.optim.SGD(trainable(alone), LR), data[:1])
    model = shard(prepared(), mesh)
    optimizer = torch.optim.SGD(trainable(model), LR)
    model.set_requires_gradient_sync(False)
    (model(mine(data[0])) / 2).backward()
    none = all(parameter.grad is None for parameter in trainable(model))
    model.set_requires_gradient_sync(True)
    (model(mine(data[1])) / 2).backward()
    optimizer.step()
    return {"difference": largest_difference(model, alone), "nothing reduced before the last": none}


def _bytes(tensor: Any) -> int:
    return tensor.stored_bytes if hasattr(tensor, "stored_bytes") else tensor.numel() * tensor.element_size()


def memory_and_traffic(mesh: DeviceMesh) -> dict[str, Any]:
    """Bytes that each rank keeps, and that all together gather and reduce in a training step."""
    plain = Decoder()
    config = QLoRAConfig(r=6, block_size=32)  # six rows of A are no multiple of four ranks: columns are split there
    parts = Parts.of(plain, plain.blocks, config)
    model = prepared(r=6)
    found: dict[str, Any] = {"whole": sum(_bytes(parameter) for parameter in model.parameters())}
    split_model(model, mesh)
    found["kept"] = on_all_ranks(sum(_bytes(parameter.to_local()) for parameter in model.parameters()))
    found |= {"gathered": 0, "reduced": 0}
    names = ("all_gather_single", "reduce_scatter_single")
    if not hasattr(dist, names[0]):  # torch 2.11
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    gather, reduce = (getattr(dist, name) for name in names)

    def gathering(output: Tensor, given: Tensor, **options: Any) -> Any:
        found["gathered"] += output.numel() * output.element_size()
        return gather(output, given, **options)

    def reducing(output: Tensor, input: Tensor, **options: Any) -> Any:
        found["reduced"] += input.numel() * input.element_size()
        return reduce(output, input, **options)

    with mock.patch.multiple(dist, **dict(zip(names, (gathering, reducing), strict=True))):
        model(mine(batches(1)[0])).backward()
    return found | {"formula": {name: getattr(parts, name)(mesh.size()) for name in ("kept", "gathered", "reduced")}}


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What cannot be split says what to do; a weight that is left whole works."""
    found = {}
    odd = qc.quantize_4bit(torch.randn(3 * mesh.size(), 40))
    sideways = qc.quantize_4bit(torch.randn(64, 64), transposed=True)
    for name, weight in (("odd", odd), ("transposed", sideways)):
        try:
            fully_shard(Weight(weight), mesh=mesh)
        except ModelStateError as error:
            found[name] = str(error)
        module = Weight(weight)
        fully_shard(module, mesh=mesh, ignored_params={module.weight})
        found[f"{name}, left whole"] = type(module.weight).__name__
    return found


if __name__ == "__main__":
    names = (exact_bytes, eager, compiled_whole, compiled_blocks, checkpointing, bf16, hybrid, accumulation)
    more = (memory_and_traffic, refusals, inductor, checkpointing_compiled, experts)
    main({check.__name__: check for check in (*names, *more)})
