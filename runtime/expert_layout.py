"""Where a checkpoint keeps fused experts: transformers loads `experts.3.w1.weight` and the like into one parameter.

    model.layers.0.mlp.experts.gate_up_proj [E, 2I, H]  <->  ...experts.{e}.w1.weight [I, H], ...experts.{e}.w3.weight

transformers' own table says how (`conversion_mapping`), and its own code turns it round. It is asked with a probe whose
values are row numbers, of the parameter's shape but for its few columns: what comes out says whose rows each tensor holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, MissingDependencyError

_COLUMNS = 2  # of a probe, equal ones: transformers before 5.23 drops a dimension of size 1


@dataclass(frozen=True)
class ExpertRows:
    """What one tensor of a checkpoint holds: output features `rows` of one expert, as [rows, in] or `transposed`.

    `expert` None: of all experts, in order, as [E, rows, in] or [E, in, rows]. `parameter` is the fused one in the
    model, `fused_transposed` whether that holds [in, out] matrices; `siblings` are all tensors of this expert (itself
    too) as (key, rows, transposed).
    """

    parameter: str
    fused_transposed: bool
    expert: int | None
    rows: torch.Tensor
    transposed: bool
    siblings: tuple[tuple[str, torch.Tensor, bool], ...] = ()

    def own_part(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The fused parameter's adapter [E, r, in], [E, out, r] -> that of this tensor."""
        if self.expert is None:
            return a, b[:, self.rows]
        return a[self.expert], b[self.expert][self.rows]


class ExpertLayout:
    """The layout of one model's checkpoints, from its config.json. The model is built once, without weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._model: nn.Module | None = None

    def tensors(self, parameter: str) -> dict[str, ExpertRows]:
        """Key in the checkpoint -> what it holds, for a fused parameter of the model.

        Raises CheckpointError where the model has no such experts, or transformers stores them in another way;
        MissingDependencyError without transformers.
        """
        model = self._built()
        path, _, _ = parameter.rpartition(".")
        try:
            weight, module = model.get_parameter(parameter), model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(f"{type(model).__name__} has no parameter {parameter}.") from error
        transposed = bool(getattr(module, "is_transposed", False))
        experts, out = weight.shape[0], weight.shape[-1 if transposed else -2]
        probe = torch.arange(experts * out, dtype=torch.float64).view(experts, 1, out).repeat(1, _COLUMNS, 1)
        found = self._reverted(parameter, probe if transposed else probe.mT.contiguous())
        held = {key: _read_probe(parameter, transposed, out, tensor) for key, tensor in found.items()}
        if any(rows is None for rows in held.values()):
            raise CheckpointError(f"How checkpoints of {type(model).__name__} hold {parameter} is not understood.")
        return _with_siblings({key: rows for key, rows in held.items() if rows is not None})

    def is_transposed(self, parameter: str) -> bool:
        """Whether the model keeps this fused parameter as [E, in, out]."""
        module = self._built().get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False))

    def _reverted(self, parameter: str, probe: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._built(), {parameter: probe}))  # type: ignore[arg-type]

    def _built(self) -> nn.Module:
        if self._model is None:
            try:
                import transformers
            except ImportError:
                raise MissingDependencyError("transformers", "transformers", "Exporting a mixture of experts") from None
            kind = transformers.CONFIG_MAPPING[self._config["model_type"]]
            config = kind.from_dict(self._config)
            cls = getattr(transformers, (self._config.get("architectures") or ["?"])[0], None)
            if cls is None:
                raise CheckpointError(
                    f"config.json names {self._config.get('architectures')}, unknown to transformers."
                )
            with torch.device("meta"):
                self._model = cls(config)
        return self._model


def _read_probe(parameter: str, fused_transposed: bool, out: int, tensor: torch.Tensor) -> ExpertRows | None:
    """A tensor of row numbers -> whose rows it holds: one expert's, or the same ones of all; None for anything else."""
    if tensor.dim() not in (2, 3):
        return None
    column = next((d for d in (-1, -2) if tensor.shape[d] == _COLUMNS and _is_constant(tensor, d)), None)
    if column is None:
        return None
    transposed = column == -2
    numbers = tensor.long().select(column, 0)
    experts, rows = numbers // out, numbers % out
    if numbers.dim() == 1:
        one = bool((experts == experts[0]).all())
        return ExpertRows(parameter, fused_transposed, int(experts[0]), rows, transposed) if one else None
    in_order = torch.equal(experts, torch.arange(len(experts))[:, None].expand_as(experts))
    same = torch.equal(rows, rows[:1].expand_as(rows))
    return ExpertRows(parameter, fused_transposed, None, rows[0], transposed) if in_order and same else None


def _is_constant(tensor: torch.Tensor, dim: int) -> bool:
    return torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))


def _with_siblings(held: Mapping[str, ExpertRows]) -> dict[str, ExpertRows]:
    of_expert: dict[int | None, list[tuple[str, torch.Tensor, bool]]] = {}
    for key, rows in held.items():
        of_expert.setdefault(rows.expert, []).append((key, rows.rows, rows.transposed))
    return {
        key: ExpertRows(
            rows.parameter,
            rows.fused_transposed,
            rows.expert,
            rows.rows,
            rows.transposed,
            tuple(of_expert[rows.expert]),
        )
        for key, rows in held.items()
    }
