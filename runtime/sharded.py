"""A parameter that FSDP2 split over ranks (a DTensor) <-> plain tensors: the rows of this rank, or all of them.

Plain tensors pass through, so that optimizers, checkpoints and adapters' files need no second way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor. By its method: importing the class costs a third of a second."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """The rows of this rank, as a view; the tensor itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def gathered(tensor: Tensor) -> Tensor:
    """All rows, on every rank: every rank has to call it, for the same tensors in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def as_shard(part: Tensor, like: Any) -> Tensor:
    """This rank's rows -> a DTensor that is split as `like` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def part_like(whole: Tensor, like: Any) -> Tensor:
    """All rows, the same on every rank -> those that `like` has on this rank; nothing is sent."""
    if not is_sharded(like) or is_sharded(whole):
        return local_part(whole)
    from torch.distributed.tensor import distribute_tensor

    shard = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return local_part(shard)


def has_shards(model: nn.Module) -> bool:
    """Whether FSDP2 split any parameter of the model."""
    return any(is_sharded(parameter) for parameter in model.parameters())
