"""State dictionaries of paged optimizers, in the layouts of others.

    32-bit   torch.optim.AdamW      step (0-dim fp32), exp_avg, exp_avg_sq
    8-bit    bitsandbytes           step (int), state1, state2 (uint8, or fp32 for small parameters), qmap1, qmap2,
                                    absmax1, absmax2; its own state_dict wraps all but step into one more dictionary

and "master" beside them for a bf16 or fp16 parameter. What is read may be either, whatever the optimizer keeps.

The state of a parameter that FSDP2 split is written in torch's layout whatever the optimizer keeps, as DTensors of the
parameter's own split: blocks of 256 of one rank's rows mean nothing to a run on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, ModelStateError
from ..nf4 import dynamic_map
from .paged_optimizer_checks import check_group
from .paged_optimizer_layout import (
    BLOCK,
    ParamState,
    StateLayout,
    Views,
    dequantize_blocks,
    layout_for,
    quantize_blocks,
    signed_map,
)
from .sharded import as_shard, is_sharded, local_part, part_like

if TYPE_CHECKING:
    from .paged_optimizer import PagedOptimizer

_WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes hides its tensors from FSDP in a dictionary of this name
_TORCH_NAMES = {"first": "exp_avg", "second": "exp_avg_sq"}
_NUMBERS = {"first": "1", "second": "2"}  # bitsandbytes': state1, absmax1, qmap1


def to_dict(state: ParamState, values: Views, parameter: Tensor, state_bits: int) -> dict[str, Any]:
    """Flat tensors by field -> the dictionary of one parameter: bitsandbytes' for 8-bit optimizers, torch's for others."""
    if is_sharded(parameter):
        return _to_shards(state, values, parameter)
    shape, found = parameter.shape, {}
    moments = [field for field in state.layout.fields if field != "master"]
    if state_bits == 32:
        found = {_TORCH_NAMES[field]: values[field].view(shape) for field in moments}
        found["step"] = torch.tensor(float(state.step), dtype=torch.float32)
    else:
        for field in moments:
            found[f"state{_NUMBERS[field]}"] = values[field].view(shape)
            if state.layout.narrow:
                found[f"qmap{_NUMBERS[field]}"] = dynamic_map(signed_map(field)).clone()
                found[f"absmax{_NUMBERS[field]}"] = values[f"{field} scales"]
        found["step"] = state.step
    if "master" in values:
        found["master"] = values["master"].view(shape)
    return found


def _to_shards(state: ParamState, values: Views, parameter: Tensor) -> dict[str, Any]:
    """The same in torch's layout, each tensor split over the ranks as the parameter is."""
    shape = local_part(parameter).shape
    found: dict[str, Any] = {"step": torch.tensor(float(state.step), dtype=torch.float32)}
    for field in state.layout.fields:
        part = values[field]
        if f"{field} scales" in values:
            part = dequantize_blocks(part, values[f"{field} scales"], dynamic_map(signed_map(field)))
        part = part.view(shape).to(parameter.device)
        found[_TORCH_NAMES.get(field, field)] = as_shard(part, parameter)
    return found


def from_dict(optimizer: PagedOptimizer, state_dict: Mapping[str, Any]) -> dict[nn.Parameter, tuple[int, Views]]:
    """-> (step, flat tensors by field in the optimizer's own layout) by parameter. Raises CheckpointError."""
    try:
        saved, groups = dict(state_dict["state"]), state_dict["param_groups"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            "The optimizer's state dictionary lacks 'state' or 'param_groups': give what its state_dict() returned."
        ) from None
    # torch adds entries of its own to the defaults, which groups do not have
    needed = [name for name in optimizer.defaults if name in optimizer.param_groups[0]]
    for name in ("params", *(name for name in needed if not (optimizer.lion and name == "eps"))):
        if not all(isinstance(group, Mapping) and name in group for group in groups):
            raise CheckpointError(
                f"A parameter group of the optimizer's state dictionary lacks {name!r}: it is another optimizer's."
            )
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in groups]
    if here != there:
        raise CheckpointError(
            f"The optimizer's state dictionary has groups of {there} parameters, this optimizer has {here}: "
            "the parameters are not those that it was saved with."
        )
    for group in groups:
        try:
            check_group(dict(group), type(optimizer).__name__)
        except ConfigError as error:
            raise CheckpointError(f"The optimizer's state dictionary is of other settings: {error}") from error
    indices = [index for group in groups for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loaded = {}
    for index, parameter in zip(indices, parameters, strict=True):
        if saved.get(index):
            if not isinstance(saved[index], Mapping):
                raise CheckpointError(
                    f"The optimizer's state of parameter {index} is no dictionary: it is another optimizer's."
                )
            flat = {**saved[index], **saved[index].get(_WRAPPED, {})}
            if optimizer.lion and not {"exp_avg_sq", "state2"}.isdisjoint(flat):
                raise CheckpointError(
                    f"The optimizer's state of parameter {index} has a second moment: it is not Lion's."
                )
            layout = layout_for(local_part(parameter), lion=optimizer.lion, state_bits=optimizer.state_bits)
            loaded[parameter] = (_step(flat, index), _values(flat, parameter, layout, f"parameter {index}"))
    return loaded


def _step(saved: Mapping[str, Any], index: Any) -> int:
    step = saved.get("step")
    if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise CheckpointError(
            f"The optimizer's state of parameter {index} has no 'step', the number of updates so far: it is another "
            "optimizer's."
        )
    number = float(step)
    if not (number >= 0 and number.is_integer()):
        raise CheckpointError(
            f"The optimizer's state of parameter {index} has 'step' {number:g}, which is no count of updates."
        )
    return int(number)


def _values(saved: Mapping[str, Any], parameter: Tensor, layout: StateLayout, what: str) -> Views:
    found: Views = {}
    for field in layout.fields:
        if field == "master":
            # A state that was saved without one belongs to a parameter that was itself what was trained.
            master = saved.get("master", parameter.detach())
            found[field] = _flat(master, parameter, f"the master of {what}").float()
            continue
        codes, scales, code_map = _stored(saved, field, parameter, what)
        kept = code_map is not None and torch.equal(code_map, dynamic_map(signed_map(field)))
        if layout.narrow and kept and scales is not None:
            found[field], found[f"{field} scales"] = codes, scales
            continue
        wide = codes.float() if scales is None or code_map is None else dequantize_blocks(codes, scales, code_map)
        if layout.narrow:
            found[field], found[f"{field} scales"] = quantize_blocks(wide, signed=signed_map(field))
        else:
            found[field] = wide
    return found


def _stored(saved: Mapping[str, Any], field: str, parameter: Tensor, what: str) -> tuple[Tensor, Any, Any]:
    """-> (values, None, None), or (codes, scales, code map) for 8-bit states."""
    number = _NUMBERS[field]
    for name in (_TORCH_NAMES[field], f"state{number}"):
        if name in saved:
            break
    else:
        names = f"{_TORCH_NAMES[field]!r} nor 'state{number}'"
        raise CheckpointError(f"The optimizer's state of {what} has neither {names}: it is another optimizer's.")
    values = _flat(saved[name], parameter, f"{name} of {what}")
    if values.dtype != torch.uint8:
        return values, None, None
    blocks = -(-parameter.numel() // BLOCK)
    scales, code_map = saved.get(f"absmax{number}"), saved.get(f"qmap{number}")
    if scales is None or code_map is None or scales.numel() != blocks or code_map.numel() != 256:
        raise CheckpointError(
            f"The 8-bit optimizer state of {what} needs absmax{number} with {blocks} scales and qmap{number} with 256 "
            f"values: blocks of {BLOCK} are what is read."
        )
    return values, scales.detach().cpu().float().view(-1), code_map.detach().cpu().float().view(-1)


def _flat(tensor: Any, parameter: Tensor, what: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"The optimizer's state does not fit: {what} is no tensor.")
    if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"The optimizer's state does not fit: {what} is {tensor.dtype}, {tensor.layout}, on {tensor.device}, "
            "where dense real values are needed."
        )
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"The optimizer's state does not fit: {what} is {tuple(tensor.shape)} there and "
            f"{tuple(parameter.shape)} here: load it for the model that it was saved with."
        )
    return part_like(tensor.detach(), parameter).cpu().contiguous().view(-1)


class StateView(MutableMapping):
    """`optimizer.state`: parameter -> its state as ordinary tensors on the CPU, copied out of the pages when asked for."""

    def __init__(self, optimizer: PagedOptimizer) -> None:
        self._optimizer = optimizer

    def __contains__(self, parameter: object) -> bool:
        return self._optimizer.states.get(parameter) is not None

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        """{} where there is none, as in torch's optimizers."""
        state = self._optimizer.states.get(parameter)
        if state is None:
            return {}
        return to_dict(state, state.read(self._optimizer.pool), parameter, self._optimizer.state_bits)

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        raise ModelStateError("The state lies in pages: change it with load_state_dict.")

    def __delitem__(self, parameter: Tensor) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self._optimizer.states.free([id(parameter)])

    def pop(self, parameter: Tensor, *default: Any) -> Any:
        """The state, which is reset; KeyError without one and without a default."""
        if parameter not in self and default:
            return default[0]
        found = self[parameter]
        del self[parameter]
        return found

    def clear(self) -> None:
        """Reset everything."""
        self._optimizer.states.clear()

    def __iter__(self) -> Iterator[Tensor]:
        owners = [state.owner() for state in self._optimizer.states]
        return iter([owner for owner in owners if owner is not None])

    def __len__(self) -> int:
        return len(self._optimizer.states)
