"""What the worker scripts of these tests share: a small decoder, its data, and how a worker answers.

Each worker runs under torchrun with gloo on the CPU, one thread a process. It trains the model on its part of a batch,
and a second copy of it alone on the whole batch, and writes what it found as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import qlora_compile as qc

WIDTH, INNER, VOCABULARY, LENGTH, ROWS = 96, 160, 61, 12, 4
# lr: SGD, so that an update is as exact as its gradient; AdamW divides by the gradient's size
LR = 0.02


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.o, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (linear(h).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """`checkpointing`: each block is computed again in backward instead of kept."""

    def __init__(self, blocks: int = 2, checkpointing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpointing = checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return F.cross_entropy(self.lm_head(x)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def prepared(
    checkpointing: bool = False, dtype: torch.dtype = torch.float32, weights_seed: int = 3, **options: Any
) -> Decoder:
    """The same decoder on every rank: fp32, so that sums of a batch and of its parts differ by rounding alone."""
    torch.manual_seed(weights_seed)
    model = Decoder(checkpointing=checkpointing).to(dtype)
    base = {
        "r": 4,
        "lora_alpha": 1,
        "block_size": 32,
        "init_lora_weights": False,
        "lowering": "aot_eager",
        "compute_dtype": dtype,
    }
    qc.prepare(model, base | options)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batches(steps: int) -> list[Tensor]:
    """ids [ROWS, LENGTH] of each step, however many ranks share them."""
    generator = torch.Generator().manual_seed(7)
    shape = (ROWS, LENGTH)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(steps)]


def mine(ids: Tensor) -> Tensor:
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def train(call: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, data: list[Tensor]) -> list[float]:
    losses = []
    for ids in data:
        loss = call(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_together(call: Callable[[Tensor], Tensor], optimizer: Any, steps: int, skip: int = 0) -> list[float]:
    """Mean losses over the ranks, each of which trains on its part; the data of the first `skip` steps is left out."""
    losses = torch.tensor(train(call, optimizer, [mine(ids) for ids in batches(skip + steps)[skip:]]))
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def train_alone(steps: int, **options: Any) -> tuple[Decoder, list[float]]:
    """One process, the whole batch."""
    model = prepared(**options)
    return model, train(model, torch.optim.SGD(trainable(model), LR), batches(steps))


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """Of all trained parameters; sharded ones are gathered."""
    pairs = zip(trainable(model), trainable(other), strict=True)
    return max((whole(one) - whole(two)).abs().max().item() for one, two in pairs)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def on_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def main(checks: dict[str, Callable[[DeviceMesh], Any]]) -> None:
    """`worker.py OUT NAME...`: run these checks on every rank; rank 0 writes what they return to OUT, as JSON by name."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name in sys.argv[2:]:
        torch._dynamo.reset()
        found[name] = checks[name](mesh)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter's shutdown
