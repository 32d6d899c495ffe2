"""The processes of one training run, as torchrun or `accelerate launch` started them: who writes, who sees which data.

    torchrun --nproc-per-node 8 -m -- qlora_compile.cli finetune ...

Every process runs the whole program. `Processes` is what differs between them, and does nothing where there is one:
DistributedDataParallel sums the adapters' gradients (each process holds the whole 4-bit model), FSDP2 also splits the
weights (each holds its rows, and gathers a layer's codes before it runs). Only the first process writes files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..errors import CheckpointError, ConfigError, DistributedError, ModelStateError, QLoRACompileError
from ..modules import adapter_sites
from ..sharding_ops import split_problem
from .lost_process import (
    Member,
    TermWatch,
    first_sentence,
    is_lost_connection,
    leave_the_last_word,
    lost,
    myself,
    note_end,
)

T = TypeVar("T")
TIMEOUT_S = 1800.0  # of one exchange: compiling may take one process minutes longer than another


@dataclass(frozen=True)
class Processes:
    """`count` processes, of which this is number `rank`; `local_rank` on its machine. `members`: where each one runs."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    members: tuple[Member, ...] = ()

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """The processes that the launcher's environment variables tell of; one where there are none.

        Raises DistributedError where they do not find each other.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            try:
                timeout = datetime.timedelta(seconds=TIMEOUT_S)
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            except (RuntimeError, ValueError) as error:
                raise DistributedError(
                    f"The {count} processes did not find each other ({first_sentence(error)}): start them with torchrun, "
                    "or unset WORLD_SIZE to train in one process."
                ) from error
        members: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(members, myself())
        return cls(dist.get_rank(), len(members), int(os.environ.get("LOCAL_RANK", "0")), tuple(members))

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Each process of a machine has a GPU of its own. Raises ConfigError where there are fewer."""
        if self.count == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {self.local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}, so start as many processes (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def mine(self, items: list[T]) -> list[T]:
        """This process's part of a list: equal parts, in order."""
        part = len(items) // self.count
        return items[self.rank * part : (self.rank + 1) * part]

    def total(self, value: float, device: torch.device) -> float:
        """The sum over all processes."""
        if self.count == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        dist.all_reduce(found)
        return found.item()

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first process, everywhere; so is an error of ours."""
        if self.count == 1:
            return function()
        box: list[Any] = [None]
        if self.first:
            try:
                box[0] = function()
            except QLoRACompileError as error:
                box[0] = error
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], QLoRACompileError):
            raise box[0]
        return box[0]

    def check_same(self, what: str, value: object) -> None:
        """Raises CheckpointError, on every process, where they hold different values."""
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise CheckpointError(
                f"Process {other} read another {what} than process 0: every machine needs the same files."
            )

    @contextlib.contextmanager
    def own_folder(self, config: T) -> Iterator[T]:
        """The configuration of a run, for this process: all but the first write into a folder that is thrown away."""
        if self.first:
            yield config
            return
        with tempfile.TemporaryDirectory(prefix=f"qlora-compile-{self.rank}-") as folder:
            out = Path(folder) / "out"
            yield dataclasses.replace(config, out=out, resume=False, tensorboard=None, posthog=None)  # type: ignore[type-var]

    def wrap(self, model: nn.Module, *, split: bool, notice: Callable[[str], None]) -> nn.Module:
        """A prepared model -> what to call in training. `split`: by FSDP2, in place; else in DistributedDataParallel."""
        if self.count == 1:
            return model
        if not split:
            return nn.parallel.DistributedDataParallel(model)
        for name, problem in split_model(model).items():
            notice(f"{name} stays whole on every process: {problem}")
        return model

    def reducing(self, call: Any, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch: gradients are exchanged after the last one of a step only."""
        if self.count == 1:
            return contextlib.nullcontext()
        if isinstance(call, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext() if last else call.no_sync()
        call.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def ended_by_signal(self) -> contextlib.AbstractContextManager[None]:
        """Within it SIGTERM, by which torchrun ends those that a lost process leaves behind, is an error of one sentence."""
        return TermWatch(self.rank, self.members)()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raises DistributedError in place of what the network says where another process is gone."""
        try:
            yield
        except DistributedError:
            raise
        except Exception as error:
            if self.count > 1 and isinstance(error, RuntimeError) and is_lost_connection(error):
                leave_the_last_word()
                raise lost(self.rank, self.members, error) from error
            if self.count > 1:  # the others will lose this one
                note_end(f"process {self.rank}, which ended with: {first_sentence(error)}")
            raise

    def leave(self) -> None:
        """Once all are done, and nobody holds the DistributedDataParallel any more.

        Its reducer would be the last to let go of the process group, and waits for gloo's threads (torch 2.13) while it
        holds the GIL, which they need to free the tensors of the last collective.
        """
        if self.count > 1:
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


def split_model(model: nn.Module, mesh: Any = None) -> dict[str, str]:
    """FSDP2 (`fully_shard`) of a prepared model: each repeated block by itself, then the rest. In place.

    A 4-bit weight that cannot be split by rows stays whole on every rank; -> why, by name.
    Raises ModelStateError (not prepared; adapters and modules_to_save of different dtypes).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sites = adapter_sites(model)
    if not sites:
        raise ModelStateError("Only a prepared model can be split: call qlora_compile.prepare(model, config) first.")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        raise ModelStateError(
            "FSDP2 wants all trained parameters in one dtype: load the model in the adapters' dtype, or leave "
            "modules_to_save out."
        )
    device = next(model.parameters()).device.type
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    whole = {name: problem for name, site in sites.items() if (problem := split_problem(site.weight, mesh.size()))}
    options: dict[str, Any] = {"ignored_params": {sites[name].weight for name in whole}, "mesh": mesh}
    options["shard_placement_fn"] = functools.partial(_placement, _lora_a_ids(model), mesh.size())
    for block in repeated_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return whole


def _lora_a_ids(model: nn.Module) -> set[int]:
    return {id(site.a(name)) for site in adapter_sites(model).values() for name in site.adapters}


def _placement(lora_a: set[int], ranks: int, parameter: nn.Parameter) -> Any:
    """By rows, but A [r, in] by columns where r does not divide evenly: 16 rows on 1024 ranks are gathered as 1024."""
    from torch.distributed.tensor import Shard

    by_columns = id(parameter) in lora_a and parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0
    return Shard(1) if by_columns else Shard(0)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the model: the children of its longest `nn.ModuleList`s, none inside another's."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside and len(module) > 1:
            found += module
            inside |= {id(part) for part in module.modules()}
    return found
