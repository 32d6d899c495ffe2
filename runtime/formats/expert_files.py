"""How PEFT's files hold the adapters of fused experts (`target_parameters`), whose keys name a module, no parameter.

    A [E, r, in]   <->  lora_A.weight [r * E, in]      row e * r + i is row i of expert e
    B [E, out, r]  <->  lora_B.weight [out, r * E]     column i * E + e is column i of expert e

Several parameters of one module are wrapped one around the other, in the order in which the module registers them: the
last has the module's own path, and each one before it a `.base_layer` more. The files do not say which is which, and
sort `target_parameters`; transformers' modules register `down_proj` last. (peft 0.21, `ParamWrapper`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ...errors import CheckpointError

_LAST = "down_proj"


def flatten(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, r, in] and B [E, out, r] -> as PEFT's files hold them."""
    experts, rank, _ = a.shape
    return a.reshape(experts * rank, -1), b.permute(1, 2, 0).reshape(b.shape[1], rank * experts)


def unflatten(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [r * E, in] and lora_B [out, r * E] of a file -> A [E, r, in] and B [E, out, r]."""
    return a.reshape(-1, rank, a.shape[1]), b.reshape(b.shape[0], rank, -1).permute(2, 0, 1).contiguous()


def module_paths(parameters: Mapping[str, str]) -> dict[str, str]:
    """{full name: its last part} in the order of registration -> {full name: the module's path in PEFT's keys}."""
    by_module: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        by_module.setdefault(name.removesuffix(f".{parameter}"), []).append(name)
    return {
        name: module + ".base_layer" * (len(names) - 1 - i)
        for module, names in by_module.items()
        for i, name in enumerate(names)
    }


def registration_order(names: Iterable[str]) -> dict[str, str]:
    """{full name: its last part} in the order in which transformers' modules register them, for `module_paths`."""
    leaves = {name: name.rpartition(".")[2] for name in names}
    return dict(sorted(leaves.items(), key=lambda item: (item[1] == _LAST, item[0])))


def parameter_names(modules: Iterable[str], target_parameters: Iterable[str]) -> dict[str, str]:
    """Paths in PEFT's keys -> the names of the parameters that they stand for; other modules are left out.

    Raises CheckpointError where a module has more adapters than `target_parameters` names.
    """
    wrapped: dict[str, list[str]] = {}
    for path in modules:
        wrapped.setdefault(path.replace(".base_layer", ""), []).append(path)
    found = {}
    for module, paths in wrapped.items():
        parts = [target.rpartition(".") for target in target_parameters]
        names = {leaf for parent, _, leaf in parts if module == parent or module.endswith(f".{parent}")}
        if not names:
            continue
        if len(names) != len(paths):
            raise CheckpointError(
                f"{module} has {len(paths)} adapters, and target_parameters names {len(names)} of its parameters."
            )
        ordered = registration_order(names)
        for name, path in zip(ordered, sorted(paths, key=len, reverse=True), strict=True):
            found[path] = f"{module}.{name}"
    return found
