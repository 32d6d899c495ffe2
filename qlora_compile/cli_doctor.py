"""`qlora-compile doctor`: what is installed, what this machine can do, and what to install."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated, Any

import typer

from .cli_common import import_torch, print_json, print_table
from .errors import KernelError, MissingDependencyError

PACKAGES = ("torch", "triton", "safetensors", "transformers", "accelerate", "gguf", "peft", "bitsandbytes")
# Package -> (extra that installs it, what it is for). Without them the library works, the command line does not.
OPTIONAL = {
    "transformers": ("transformers", "Fine-tuning from the command line"),
    "gguf": ("gguf", "Reading a GGUF file"),
}
KERNEL_OPS = ("quantize_4bit", "dequantize_4bit")
# What a 2048 x 2048 layer of a bf16 model asks the dispatch table: (op, rows, n, k).
TYPICAL = {
    "decoding, a linear of 1 row": ("lora_linear", 1, 2048, 2048),
    "training, a linear of 512 rows": ("lora_linear", 512, 2048, 2048),
    "its backward": ("lora_linear_backward", 512, 2048, 2048),
    "attention of 512 tokens, heads of 64": ("attention", 512, 512, 64),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show versions, devices, compiler and kernels, and what to install.

    Exit code 1 means that something needed is missing.

    Example: qlora-compile doctor --json
    """
    import_torch()
    found = examine()
    if as_json:
        print_json(found)
    else:
        print_table(_rows(found))
        for line in found["advice"] or ["Everything needed is there."]:
            print(line)
    raise typer.Exit(0 if found["ok"] else 1)


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, JSON-ready. `ok` is whether the base package can compile and train here."""
    import torch

    from . import __version__

    versions = {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__}  # with its build
    found: dict[str, Any] = {
        "versions": {"qlora-compile": __version__, "python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "backend_registered": _is_backend_registered(),
    }
    found |= _devices()
    found["compiler"] = _compiler()
    kinds = ["cpu", "cuda"] if len(found["devices"]) > 1 else ["cpu"]
    found["kernels"] = _kernels(kinds)
    found["chosen"] = {kind: _chosen(kind) for kind in kinds}
    found["advice"] = _advice(found)
    works = all(not state.startswith("failed") for ops in found["kernels"].values() for state in ops.values())
    found["ok"] = found["backend_registered"] and found["compiler"] is not None and works
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_backend_registered() -> bool:
    """Whether `torch.compile(backend="qlora")` finds us: by the entry point that an installation leaves."""
    return any(point.name == "qlora" for point in importlib.metadata.entry_points(group="torch_dynamo_backends"))


def _devices() -> dict[str, Any]:
    import torch

    devices = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        devices.append(f"cuda:{index} ({properties.name}, {gib:.0f} GiB, sm_{properties.major}{properties.minor})")
    return {"devices": devices, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _compiler() -> str | None:
    """The C++ compiler that Inductor and our CPU kernels use, or None."""
    from .runtime.kernels import cpp_build

    return cpp_build.find_compiler()


def _kernels(devices: list[str]) -> dict[str, dict[str, str]]:
    """Per device type and op: "generated" where a kernel was built, "plain torch" (slower, same numbers), "failed"."""
    from .runtime import kernels

    def state(op: str, kind: str) -> str:
        try:
            return "plain torch" if kernels.find(op, kind) is None else "generated"
        except KernelError as error:
            return f"failed: {error}"

    return {kind: {op: state(op, kind) for op in KERNEL_OPS} for kind in devices}


def _chosen(kind: str) -> dict[str, str]:
    """For a typical layer, the kernel that `lower_kernels` would choose here, and why."""
    import torch

    from .runtime import kernels

    def choice(op: str, rows: int, n: int, k: int) -> str:
        linear: dict[str, Any] = {"rank": 16, "quant_type": "nf4", "block_size": 64} if op != "attention" else {}
        try:
            found = kernels.choose_kernel(op, rows=rows, n=(n,), k=k, dtype=torch.bfloat16, device=kind, **linear)
        except KernelError as error:
            return f"failed: {error}"
        return f"{found.name} ({found.why})"

    return {name: choice(*problem) for name, problem in TYPICAL.items()}


def _advice(found: dict[str, Any]) -> list[str]:
    lines = []
    if not found["backend_registered"]:
        lines.append(
            "The backend 'qlora' is not registered with torch: reinstall the package (in a clone: pip install -e .)."
        )
    if found["compiler"] is None:
        lines.append("No C++ compiler was found, so Inductor cannot compile for the CPU: install g++ or clang++.")
    for package, (extra, purpose) in OPTIONAL.items():
        if found["versions"][package] is None:
            lines.append(str(MissingDependencyError(package, extra, purpose)))
    lines += _too_old(found["versions"])
    for kind, ops in found["kernels"].items():
        failed = sorted(op for op, state in ops.items() if state.startswith("failed"))
        lines += [f"The {kind} kernel of {op} does not build: {ops[op]}" for op in failed]
    return lines


def _too_old(versions: dict[str, str | None]) -> list[str]:
    """A sentence for each installed package that is older than what this package declares."""
    from packaging.requirements import Requirement

    lines = {}
    for line in importlib.metadata.requires("qlora-compile") or []:
        need = Requirement(line)
        installed = versions.get(need.name)
        if installed is not None and not need.specifier.contains(installed, prereleases=True):
            lines[need.name] = (
                f"{need.name} {installed} was not tried, {need.name}{need.specifier} is needed: some of it may not work. "
                f"pip install '{need.name}{need.specifier}'."
            )
    return [*lines.values()]


def _rows(found: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [(name, version or "-") for name, version in found["versions"].items()]
    rows.append(("platform", found["platform"]))
    rows += [("device", device) for device in found["devices"]]
    rows.append(("C++ compiler", found["compiler"] or "-"))
    rows.append(("backend 'qlora'", "registered" if found["backend_registered"] else "not registered"))
    for kind, ops in found["kernels"].items():
        rows += [(f"{op} on {kind}", how) for op, how in ops.items()]
        rows += [(f"{name} on {kind}", how) for name, how in found["chosen"][kind].items()]
    return rows
