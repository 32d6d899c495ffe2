"""What an op of ours allocates inside itself while it runs: copies, casts and reused buffers that no graph shows.

Follows `lora_group.py` and `cross_entropy_sweep.py` line by line; tests compare it with what the allocator counts. What
a library takes for each thread within a product (oneDNN: some 130 KB) is not in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from . import cross_entropy_sweep as loss
from . import expert_ops, linear_cross_entropy  # noqa: F401  define ops that are named here
from . import expert_products as experts
from .fx_utils import hint
from .lora_group import choose_kernel, kernel_for
from .memory_plan import Rows

_FORWARD = torch.ops.qlora.lora_linear.default
_BACKWARD = torch.ops.qlora.lora_linear_backward.default
_LOGITS = torch.ops.qlora.linear_cross_entropy_logits.default
_LOSSES = (
    torch.ops.qlora.linear_cross_entropy.default,
    torch.ops.qlora.linear_cross_entropy_grads.default,
    _LOGITS,
)
_EXPERTS = (torch.ops.qlora.grouped_lora_linear.default, torch.ops.qlora.grouped_lora_linear_backward.default)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The op's arguments by the names in its schema, tensors as their fake values."""
    target: Any = node.target
    values: Any = fx.node.map_aggregate(node.args, lambda v: v.meta.get("val") if isinstance(v, fx.Node) else v)
    defaults = {"keep_logits": True} if target is _LOGITS else {}
    return defaults | dict(zip((argument.name for argument in target._schema.arguments), values))


def workspace_bytes(node: fx.Node, device: str) -> list[int | Rows]:
    """Bytes alive inside the op at its widest moment, one number for each part that scales alike."""
    if node.target in _LOSSES:
        return _loss_bytes(named_arguments(node), device)
    if node.target in (_FORWARD, _BACKWARD) and _is_fused(given := named_arguments(node), device):
        return [_fused_bytes(given, backward=node.target is _BACKWARD)]
    if node.target is _FORWARD:
        given = named_arguments(node)
        x, dtype = given["x"], given["dtype"]
        tokens = math.prod(x.shape[:-1])
        if x.dtype == dtype:
            return []
        return [tokens * (x.shape[-1] + max(given["out_features"])) * dtype.itemsize]  # x, and y before its cast back
    return [_backward_bytes(named_arguments(node))] if node.target is _BACKWARD else []


def _backward_bytes(given: dict[str, Any]) -> int:
    grads, x, dtype, need_dx = given["grads"], given["x"], given["dtype"], given["need_dx"]
    tokens, width, n = math.prod(x.shape[:-1]), dtype.itemsize, sum(given["out_features"])
    ranks = sum(a.shape[0] for a in given["lora_a"])
    cast = tokens * (n + x.shape[-1]) * width if x.dtype != dtype else 0
    copied = sum(tokens * g.shape[-1] * width for g in grads if x.dtype == dtype and not g.is_contiguous())
    low = tokens * ranks * width
    joined = tokens * (n + ranks) * width if need_dx and (len(grads) > 1 or ranks) else 0
    uncast = tokens * x.shape[-1] * width if need_dx and x.dtype != dtype else 0
    return cast + copied + low + joined + uncast


def _is_fused(given: dict[str, Any], device: str) -> bool:
    """Whether the generated product reads everything where it is, and nothing is decoded, cast or joined before it."""
    whole = given["quant_type"] == "none" or given["x"].shape[-1] % given["block_size"] == 0
    forced = given.get("forward_kernel" if "bias" in given else "backward_kernel", "")
    if not whole or device != "cpu" or forced in ("fp32_gemm", "library_gemm"):
        return False
    return kernel_for("wide_gemm", torch.device(device)) is not None


def _fused_bytes(given: dict[str, Any], backward: bool) -> int:
    """h (g) in fp32, x or what drops some of it, and y (dx) before its cast back."""
    x, dtype = given["x"], given["dtype"]
    tokens, k, ranks = math.prod(x.shape[:-1]), x.shape[-1], sum(a.shape[0] for a in given["lora_a"])
    wide = 4 * k if given["dropout"] else 0
    out = k if backward else max(given["out_features"])
    cast = (k + out + (sum(given["out_features"]) if backward else 0)) * dtype.itemsize if x.dtype != dtype else 0
    return int(tokens * (4 * ranks + wide + cast))


def scratch_bytes(node: fx.Node, device: str) -> dict[str, int | Rows]:
    """The buffers of `scratch` that the op needs, by name: on a CPU they grow to the largest and are never given back."""
    if node.target in _LOSSES:
        return _loss_scratch(named_arguments(node), device)
    if node.target in _EXPERTS:
        return _expert_scratch(named_arguments(node), device)
    if node.target not in (_FORWARD, _BACKWARD) or _is_fused(given := named_arguments(node), device):
        return {}
    k, dtype, rows = given["x"].shape[-1], given["dtype"], given["out_features"]
    if node.target is _FORWARD:
        return {f"weight {dtype}": max(rows) * k * dtype.itemsize} if given["quant_type"] != "none" else {}
    ranks = 0 if given["dropout"] else sum(a.shape[0] for a in given["lora_a"])
    return {f"stacked {dtype}": (sum(rows) + ranks) * k * dtype.itemsize} if given["need_dx"] else {}


def _loss_scratch(given: dict[str, Any], device: str) -> dict[str, int | Rows]:
    """A chunk of logits and, where the products' dtype is not W's, a part of W in it."""
    x, (v, k) = given["x"], given["weight"].shape
    kernel = _loss_kernel(given, device)
    dtype = torch.bfloat16 if kernel == loss.SOFTMAX else torch.float32
    found: dict[str, int | Rows] = {
        f"logits {dtype}": Rows(math.prod(x.shape[:-1]), v * dtype.itemsize, loss.most_rows(v, device))
    }
    product = loss.product_dtype(x.dtype, device)
    if product != given["weight"].dtype and kernel != loss.FUSED:
        found[f"head {product}"] = loss.tile_rows(v, k) * k * product.itemsize
    return found


def _loss_kernel(given: dict[str, Any], device: str) -> str:
    """The name of the kernel that runs. A GPU need not be here: its generated one leaves the logits in bf16."""
    x, trained = given["x"], bool(given.get("need_dw") or given.get("need_db"))
    sizes = loss.problem(x, given["weight"], given["bias"], trained) | {"device": device}
    forced = given.get("loss_kernel", "")
    if device != "cpu":
        covered = sizes["dtype"] == torch.bfloat16 and loss.SOFTMAX not in dict(sizes["barred"])
        swept = covered and forced != loss.LIBRARY
        return loss.SOFTMAX if swept else loss.LIBRARY
    rows = hint(math.prod(x.shape[:-1]))
    return choose_kernel("linear_cross_entropy", forced=forced, rows=rows, **sizes).name  # type: ignore[no-any-return]


def _loss_bytes(given: dict[str, Any], device: str) -> list[int | Rows]:
    """What is held for every row, and the larger of two moments: products over a chunk, and the slope of a soft cap."""
    x, (v, k) = given["x"], given["weight"].shape
    tokens, need = math.prod(x.shape[:-1]), given.get("need_dx", False)
    product, most = loss.product_dtype(x.dtype, device), loss.most_rows(v, device)
    every = 8 + 8 + 4  # which rows count, their targets, their losses
    dw_bytes = (
        4 * v * k if given.get("need_dw") and given["weight"].dtype != torch.float32 else 0
    )  # in fp32, until rounded
    added = 0
    row = k * product.itemsize  # the chunk's rows of x; then, with a gradient, its product with W and what is cast
    swept = _loss_kernel(given, device) == loss.SOFTMAX
    if swept:
        row = (0 if given.get("keep_logits") else row) + (k * product.itemsize if need else 0)
    else:
        cast = v * product.itemsize if product != torch.float32 else 0
        if cast * most < dw_bytes and cast:  # wider: a chunk's part of dW in fp32, on its way into the sum
            added = dw_bytes
        else:
            row += cast + (k * (4 + product.itemsize) if need else 0)
    moment = Rows(tokens, row, most)
    if given["soft_cap"] and need and not swept:
        block = min(loss.block_rows(v, device), most)
        slope = Rows(tokens, 2 * 4 * v, block)  # 1 - part * part
        moment = max(moment, slope, key=lambda rows: rows.row_bytes * rows.chunk)
    return [Rows(tokens, every), moment, *(size for size in (dw_bytes, added) if size)]


def _expert_scratch(given: dict[str, Any], device: str) -> dict[str, int | Rows]:
    """One expert's dense matrix at a time, where its codes are not multiplied as they are; a dense weight of another dtype
    is cast into a fresh tensor instead."""
    n, k = given["dy"].shape[1] if "dy" in given else given["out_features"], given["x"].shape[1]
    dtype, columns = given["dtype"], n if given["transposed"] else k
    if given["quant_type"] == "none" or not given.get("need_dx", True):
        return {}
    if columns % given["block_size"] == 0 and device == "cpu" and _expert_kernel(given, n, k) == experts.FUSED:
        return {}
    return {f"weight {dtype}": n * k * dtype.itemsize}


def _expert_kernel(given: dict[str, Any], n: int, k: int) -> str:
    """The name of the kernel that runs on a CPU."""
    op, argument = "grouped_lora_linear", "forward_kernel"
    if "dy" in given:
        op, argument = f"{op}_backward", "backward_kernel"
    kind = (given[name] for name in ("lora_a", "lora_b", "dtype", "quant_type", "block_size"))
    rows, sizes = hint(given["x"].shape[0]), experts.problem((n, k), *kind)
    return choose_kernel(op, forced=given.get(argument, ""), rows=rows, device="cpu", **sizes).name  # type: ignore[no-any-return]
