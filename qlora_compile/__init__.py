"""qlora-compile: a compiler for QLoRA fine-tuning. `torch.compile(model, backend="qlora")` is the one-line use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Lazily imported, so that `import qlora_compile` is cheap and Dynamo can load the backend from inside our own import.
_EXPORTS = {
    "QLoRAConfig": "config",
    "prepare": "preparation",
    "explain": "report",
    "trace": "tracing",
    "CompileReport": "report",
    "QuantizedTensor": "tensor",
    "quantize_4bit": "tensor",
    "dequantize_4bit": "tensor",
    "save_adapter": "runtime.adapters",
    "load_adapter": "runtime.adapters",
    "set_adapters": "runtime.adapters",
    "combine_adapters": "runtime.combine",
    "CombineReport": "runtime.combine",
    "PagedAdamW": "runtime.paged_optimizer",
    "PagedLion": "runtime.paged_optimizer",
    "QLoRAQuantizationConfig": "runtime.transformers_quantizer",
    "export": "runtime.export",
    "ExportReport": "runtime.export",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qlora_compile' has no attribute {name!r}")
    module = importlib.import_module(f".{_EXPORTS[name]}", __name__)
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
