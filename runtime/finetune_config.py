"""`FinetuneConfig`: every choice of a training run in one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import QLoRAConfig, parse_dtype
from ..counts import MOST_SEQUENCES, MOST_TOKENS
from ..errors import ConfigError, UnknownOptionError
from .memory import parse_bytes
from .optimizer import OPTIMIZERS
from .schedule import SCHEDULES


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train, on what, for how long, and where the results go.

    `model` is a Hugging Face folder, a `.gguf` file or a folder that holds one; `data` and `eval_data` are `.txt` or
    `.jsonl` files or folders of them; `out` is a folder that does not exist yet or is empty.

    Length: `steps` optimizer steps or, where it is None, `epochs` passes over the data (a fraction is allowed). A step
    takes `grad_accum` micro-batches of `batch` sequences of `seq_len` tokens, each loss token with the same weight.

    Rate: `lr` after `warmup` steps (below 1: a fraction of all steps), then `schedule` "cosine", "linear" (both to 0)
    or "constant". `max_grad_norm` clips the global norm (0.3 is the QLoRA paper's; 0: no clipping).

    `optimizer` is "adamw" (torch's), "paged_adamw", "paged_adamw8bit" or "paged_lion"; the paged ones keep their state in
    pages: on the device at most `optimizer_budget` (bytes or "2GiB"; None: all), the rest in RAM or, with
    `optimizer_folder`, in a nameless file there.

    `step_in_backward` has a paged optimizer update each parameter in the backward pass, as soon as its gradient is ready:
    not with accumulation, clipping (`max_grad_norm`), float16 or several processes, which need all gradients first.
    `memory_budget` (bytes or "16GiB") bounds the device memory of a step, as `estimate` foresees it: where a batch does not
    fit, the optimizer's pages leave, then it is split into micro-batches with the same summed gradient.

    `seed` (None: that of `qlora`) orders the data and draws dropout. `save_every` steps a checkpoint is written (0:
    only when interrupted), of which the newest `keep_last` stay. `resume` is True (the newest checkpoint in `out`) or
    a checkpoint folder. `eval_every` (0: only before and after) and `eval_batches` (None: all) bound evaluation.
    Under torchrun every process takes `batch` sequences of its own; with `fsdp` the weights are split over the processes
    too (FSDP2), else each process has them all (DistributedDataParallel).

    `dtype` is the base model's (None: `qlora.compute_dtype`), `device` None means CUDA where there is one.

    `dense_bits` is a budget of bits a weight: the layers that lose the most by quantization stay dense within it
    (`numerics.layer_errors`), besides those of the configuration's `dense_modules`.

    `tensorboard` is a folder for TensorBoard's files, in it one by the name of `out`; `posthog` the address of a PostHog
    server that is told of start, evaluations and end (its key: environment variable POSTHOG_API_KEY).

    Raises ConfigError where a value is out of range, MemoryBudgetError for a budget that cannot work,
    UnknownOptionError from `from_options`.
    """

    model: Path
    data: Path
    out: Path
    eval_data: Path | None = None
    qlora: QLoRAConfig = field(default_factory=QLoRAConfig)
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 1
    grad_accum: int = 1
    seq_len: int = 512
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    max_grad_norm: float = 0.3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    optimizer_budget: int | str | None = None
    optimizer_folder: Path | None = None
    step_in_backward: bool = False
    memory_budget: int | str | None = None
    seed: int | None = None
    save_every: int = 100
    keep_last: int = 2
    resume: bool | Path = False
    eval_every: int = 0
    eval_batches: int | None = None
    compile: bool = True
    dtype: torch.dtype | None = None
    device: str | None = None
    fsdp: bool = False
    dense_bits: float | None = None
    tensorboard: Path | None = None
    posthog: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "data", "out", "eval_data"):
            value = getattr(self, name)
            if isinstance(value, (str, Path)):
                _require(str(value) != "", name, value, "a path")
                object.__setattr__(self, name, Path(value).expanduser())
            else:
                _require(value is None and name == "eval_data", name, value, "a path")
        if not isinstance(self.resume, bool):
            _require(isinstance(self.resume, (str, Path)), "resume", self.resume, "True, False or a checkpoint folder")
            object.__setattr__(self, "resume", Path(self.resume).expanduser())
        if self.tensorboard is not None:
            object.__setattr__(self, "tensorboard", Path(self.tensorboard).expanduser())
        ok = self.posthog is None or re.match(r"https?://[^/\s]+", self.posthog) is not None
        _require(ok, "posthog", self.posthog, "the address of a server (https://...)")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        self._check_out()
        self._check_counts()
        self._check_float16()
        self._check_rates()
        self._check_memory()

    def _check_out(self) -> None:
        for name in ("data", "eval_data"):
            folder = getattr(self, name)
            if folder is not None and self.out.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"out ({self.out}) lies in {name} ({folder}), so a resumed run would read its own records as text: "
                    "choose a folder outside of it."
                )

    def _check_counts(self) -> None:
        bounds = {
            "batch": (1, MOST_SEQUENCES),
            "grad_accum": (1, MOST_SEQUENCES),
            "seq_len": (2, MOST_TOKENS),
            "keep_last": (1, MOST_SEQUENCES),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            ok = _is_int(value, least) and value <= most
            _require(ok, name, value, f"a whole number from {least} to {most}")
        for name in ("save_every", "eval_every"):
            _require(_is_int(getattr(self, name), 0), name, getattr(self, name), "a number of steps, 0 for never")
        for name in ("steps", "eval_batches"):
            value = getattr(self, name)
            _require(value is None or _is_int(value, 1), name, value, "a whole number of at least 1")
        if self.eval_data is None and (self.eval_every or self.eval_batches is not None):
            raise ConfigError("eval_every and eval_batches are for an evaluation: give eval_data, too.")
        _require(_is_number(self.epochs) and self.epochs > 0, "epochs", self.epochs, "a number above 0")
        _require(self.seed is None or _is_int(self.seed, 0), "seed", self.seed, "a whole number of at least 0")
        if self.qlora.r == 0 and not any(self.qlora.rank_pattern.values()):
            raise ConfigError("r is 0, so there would be no adapters to train: give a rank of at least 1.")

    def _check_float16(self) -> None:
        """Raises ConfigError for what does not go with a loss scale. torch unscales no float16 gradient: it would vanish."""
        if not self.scales_loss:
            return
        if self.fsdp:
            raise ConfigError(
                "fsdp does not go with float16, whose loss scale each rank would choose alone: use bfloat16."
            )
        if self.qlora.adapter_dtype == torch.float16:
            raise ConfigError("adapter_dtype is float16, but in a float16 run adapters train in float32: leave it out.")
        if self.qlora.modules_to_save and self.base_dtype == torch.float16:
            raise ConfigError(
                "modules_to_save are trained in the base model's dtype, which must not be float16: use bfloat16, or "
                "--dtype float32 (dtype='float32')."
            )

    def _check_rates(self) -> None:
        _require(_is_number(self.lr) and self.lr > 0, "lr", self.lr, "a number above 0")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        ok = _is_number(self.warmup) and self.warmup >= 0 and (self.warmup < 1 or float(self.warmup).is_integer())
        _require(ok, "warmup", self.warmup, "a number of steps, or a fraction of all steps below 1")
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        ok = self.dense_bits is None or (_is_number(self.dense_bits) and 0 < self.dense_bits <= 16)
        _require(ok, "dense_bits", self.dense_bits, "bits a weight, at most 16")
        for name in ("max_grad_norm", "weight_decay"):
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, value, "a number of at least 0")

    def _check_memory(self) -> None:
        if self.optimizer == "adamw" and (self.optimizer_budget is not None or self.optimizer_folder is not None):
            raise ConfigError("optimizer_budget and optimizer_folder are for the paged optimizers: choose paged_adamw.")
        if self.optimizer_folder is not None:
            if self.optimizer_budget is None and self.memory_budget is None:
                raise ConfigError(
                    "optimizer_folder keeps what a budget leaves no room for: set optimizer_budget or memory_budget, too."
                )
            object.__setattr__(self, "optimizer_folder", Path(self.optimizer_folder).expanduser())
        for budget in (self.optimizer_budget, self.memory_budget):
            if budget is not None:
                parse_bytes(budget)
        if self.fsdp and self.memory_budget is not None:
            raise ConfigError("memory_budget is for one process: with fsdp choose batch by hand.")
        if self.step_in_backward:
            self._check_step_in_backward()

    def _check_step_in_backward(self) -> None:
        """Raises ConfigError naming what needs all gradients before the first update."""
        if self.optimizer == "adamw":
            raise ConfigError("step_in_backward is for the paged optimizers: choose paged_adamw.")
        for asked, what, remedy in (
            (self.grad_accum > 1, f"accumulation over {self.grad_accum} micro-batches", "set grad_accum to 1"),
            (self.max_grad_norm > 0, "clipping by the global norm", "set max_grad_norm to 0"),
            (self.scales_loss, "float16, whose loss scale is found from all gradients", "use bfloat16"),
            (self.fsdp, "fsdp, which averages gradients over processes", "leave one of the two out"),
        ):
            if asked:
                raise ConfigError(
                    "step_in_backward updates each parameter as soon as its gradient is ready, which does not go with "
                    f"{what}: {remedy}."
                )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> FinetuneConfig:
        """A dictionary of field names -> FinetuneConfig. Raises UnknownOptionError naming the nearest field."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise UnknownOptionError(name, known)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, for `run.json`."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, QLoRAConfig):
                value = value.to_dict()
            elif isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            elif isinstance(value, Path):
                value = str(value)
            out[f.name] = value
        return out

    @property
    def base_dtype(self) -> torch.dtype:
        """What the base model's dense weights are loaded in."""
        return self.qlora.compute_dtype if self.dtype is None else self.dtype

    @property
    def scales_loss(self) -> bool:
        """Whether float16 takes part, whose gradients need a loss scale."""
        return torch.float16 in (self.qlora.compute_dtype, self.base_dtype)

    @property
    def data_seed(self) -> int:
        """What orders the data and draws dropout."""
        return self.qlora.seed if self.seed is None else self.seed

    def total_steps(self, n_blocks: int, processes: int = 1) -> int:
        """Optimizer steps of this run over `n_blocks` packed sequences (at least 1; the last step may wrap around)."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * n_blocks / (self.batch * self.grad_accum * processes)))

    def pick_device(self) -> torch.device:
        """The device to train on. Raises ConfigError for one that does not exist here."""
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ConfigError(f"device must be 'cpu' or 'cuda', got {self.device!r}.") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {self.device!r}, but torch sees no CUDA device here.")
        return device


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {wanted}, got {value!r}.")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
