"""What a training step on N ranks keeps and sends, from shapes alone: bytes by formula, checked against real runs.

Of a weight [out, in] in blocks of B, S = 1 byte a block (4 without double quantization), R = ceil(out / N) rows a rank:

    4-bit bytes of rows    b4(rows) = rows * in * (1/2 + S / B)
    second-level scales    s = 4 * ceil(out * in / (256 B)) + 4                      (double quantization; on every rank)
    FSDP2 keeps            b4(R) + s, and 4 bytes for each of its part of an adapter's values, 12 more in training
    FSDP2 gathers          N * b4(R), and as much of the dense parameters and of the adapters, once in forward and once
                           in backward (the root's once, it stays); 4 bytes of gradient an adapter's value are reduced
    DDP keeps              everything; sends 4 bytes of gradient an adapter's value, there and back

A rank receives (N - 1) / N of what is gathered. Rows are padded to N equal parts: R * N of them travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .config import QLoRAConfig
from .nf4 import SCALE_BLOCK_SIZE

FP32 = 4


@dataclass(frozen=True)
class Group:
    """What is gathered together: 4-bit weights [out, in] with adapters of rank `r`, and dense parameters (shape, width)."""

    linears: tuple[tuple[int, int], ...]
    dense: tuple[tuple[tuple[int, ...], int], ...]
    config: QLoRAConfig

    @property
    def adapter_values(self) -> int:
        """Of A and B."""
        return sum(self.config.r * (out + width) for out, width in self.linears)

    @property
    def four_bit_bytes(self) -> int:
        """Codes and all scales of the weights, as one process keeps them."""
        return sum(self._rows(out, width) + self._second_level(out * width) for out, width in self.linears)

    @property
    def dense_bytes(self) -> int:
        return sum(math.prod(shape) * width for shape, width in self.dense)

    def _rows(self, rows: int, width: int) -> int:
        blocks = -(-rows * width // self.config.block_size)
        return -(-rows * width // 2) + blocks * (1 if self.config.double_quant else FP32)

    def _second_level(self, values: int) -> int:
        if not self.config.double_quant:
            return 0
        return FP32 * -(-values // (self.config.block_size * SCALE_BLOCK_SIZE)) + FP32

    def adapter_part(self, ranks: int) -> int:
        """Values of adapters that a rank holds, padding included. A is split by columns where those divide evenly."""
        r, total = self.config.r, 0
        for out, width in self.linears:
            by_columns = r % ranks and width % ranks == 0
            total += r * width // ranks if by_columns else -(-r // ranks) * width
            total += -(-out // ranks) * r
        return total

    def kept(self, ranks: int) -> int:
        """Bytes of parameters on one rank: its rows, and the second-level scales of all."""
        return self.gathered(ranks) // ranks + sum(self._second_level(out * width) for out, width in self.linears)

    def gathered(self, ranks: int) -> int:
        """Bytes of one all-gather of this group, over all ranks."""
        weights = sum(self._rows(-(-out // ranks), width) for out, width in self.linears)
        dense = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) * width for shape, width in self.dense)
        return ranks * (weights + dense + FP32 * self.adapter_part(ranks))


@dataclass(frozen=True)
class Parts:
    """The groups that `fully_shard` makes of a model: its blocks, and all the rest (embeddings, last norm, head)."""

    blocks: tuple[Group, ...]
    root: Group

    @classmethod
    def of(
        cls, model: nn.Module, blocks: Iterable[nn.Module], config: QLoRAConfig, heads: Iterable[str] = ("lm_head",)
    ) -> Parts:
        """Of a plain model, on the meta device if it is large; every `nn.Linear` but the `heads` is taken to be a target."""
        names = {id(module): name for name, module in model.named_modules()}
        excluded = {name for name in names.values() if name.rpartition(".")[2] in heads}
        seen: set[int] = set()

        def group(part: nn.Module) -> Group:
            linears, dense = [], []
            for module in part.modules():
                target = isinstance(module, nn.Linear) and names[id(module)] not in excluded
                for name, parameter in module._parameters.items():
                    if parameter is None or id(parameter) in seen:
                        continue
                    seen.add(id(parameter))
                    if target and name == "weight":
                        linears.append((parameter.shape[0], parameter.shape[1]))
                    else:
                        dense.append((tuple(parameter.shape), parameter.element_size()))
            return Group(tuple(linears), tuple(dense), config)

        found = tuple(group(block) for block in blocks)
        return cls(found, group(model))

    @property
    def groups(self) -> tuple[Group, ...]:
        return (*self.blocks, self.root)

    @property
    def adapter_values(self) -> int:
        return sum(group.adapter_values for group in self.groups)

    @property
    def stored_bytes(self) -> int:
        """4-bit and dense parameters, without adapters."""
        return sum(group.four_bit_bytes + group.dense_bytes for group in self.groups)

    def kept(self, ranks: int) -> int:
        """Bytes of parameters on a rank under FSDP2, adapters (fp32) included."""
        return sum(group.kept(ranks) for group in self.groups)

    def unsharded(self, ranks: int) -> int:
        """Bytes of what is gathered at the same time: the root, and two blocks, one at work and one on its way."""
        return self.root.gathered(ranks) + 2 * max(block.gathered(ranks) for block in self.blocks)

    def gathered(self, ranks: int) -> int:
        """Bytes of a step's all-gathers over all ranks: blocks in forward and again in backward, the root once."""
        return 2 * sum(block.gathered(ranks) for block in self.blocks) + self.root.gathered(ranks)

    def reduced(self, ranks: int) -> int:
        """Bytes of a step's reduce-scatters over all ranks: gradients of the adapters alone."""
        return ranks * FP32 * sum(group.adapter_part(ranks) for group in self.groups)
