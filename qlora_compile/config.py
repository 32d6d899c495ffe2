"""`QLoRAConfig`: every choice of the compiler in one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ConfigError, UnknownOptionError
from .nf4 import BLOCK_SIZES, CODE_BOOKS

LOWERINGS = ("inductor", "aot_eager", "eager")
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INIT_METHODS = (True, False, "gaussian", "pissa", "olora", "loftq")


def parse_dtype(value: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """`"bfloat16"` or `torch.bfloat16` -> `torch.bfloat16`. Raises ConfigError for anything but bf16, fp16, fp32."""
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    text = str(value).removeprefix("torch.")
    dtype = COMPUTE_DTYPES.get(short.get(text, text))
    if dtype is None:
        raise ConfigError(f"{name} must be one of {', '.join(COMPUTE_DTYPES)}, got {value!r}.")
    return dtype


@dataclass(frozen=True)
class QLoRAConfig:
    """What to quantize, where adapters go and how the result is compiled. Words are PEFT's and bitsandbytes'.

    Adapters: `r` is the rank (0: quantize only), the scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
    `use_rslora` (arXiv 2312.03732). `rank_pattern` and `alpha_pattern` map a module name, its suffix or a regular
    expression to a value (first hit wins). `init_lora_weights` is PEFT's: True, False, "gaussian", or from the weight
    itself "pissa", "pissa_niter_4", "olora", "loftq" (`loftq_iter` rounds), which `save_adapter` turns into plain LoRA.
    `target_modules` is "all-linear", a regular expression that must match the whole module name, or a list of names and
    suffixes; `exclude_modules` likewise, where None means the output head and `()` means nothing. `modules_to_save` are
    trained in full and stored with the adapter.

    Quantization: `quantize="auto"` quantizes a plain model's targets but leaves the dense base of a PEFT model,
    True and False force it. `dense_modules` (names, suffixes or a regular expression) are targets whose weight stays
    dense under its adapter. `quant_type`, `block_size` and `double_quant` are bitsandbytes' (arXiv 2305.14314).

    Compilation: products run in `compute_dtype`, adapters are stored in `adapter_dtype`. `activation_budget` is the
    fraction of saved activations to keep (1.0 keeps all, lower recomputes). `outline_layers=True` compiles equal layers
    once; "auto" does where there are many (with Inductor), else the report says what True would save; False compiles each
    by itself.
    With `keep_logits=False` a loss over an output head is computed in chunks, and the output has `logits=None`.
    `kernels` forces kernels by op, as in `{"lora_linear": "library_gemm"}`; `autotune` measures all kernels for the
    shapes that are compiled, once a machine.

    Raises ConfigError (a value is out of range) or, from `from_options`, UnknownOptionError.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    loftq_iter: int = 1
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    quantize: bool | str = "auto"
    dense_modules: str | tuple[str, ...] = ()
    seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    activation_budget: float = 1.0
    keep_logits: bool = True
    outline_layers: bool | str = "auto"
    lowering: str = "inductor"
    kernels: Mapping[str, str] = field(default_factory=dict)
    autotune: bool = False
    dump_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("compute_dtype", "adapter_dtype"):
            object.__setattr__(self, name, parse_dtype(getattr(self, name), name))
        for name in ("target_modules", "exclude_modules", "modules_to_save", "dense_modules"):
            value = getattr(self, name)
            if value is None and name == "modules_to_save":
                object.__setattr__(self, name, ())
            elif isinstance(value, (list, set, frozenset, tuple)):
                object.__setattr__(self, name, tuple(sorted(value, key=str)))
        for name in ("rank_pattern", "alpha_pattern", "kernels"):
            value, of = getattr(self, name), "ops to kernels" if name == "kernels" else "module names to numbers"
            _require(value is None or isinstance(value, Mapping), name, value, f"a mapping of {of}")
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if isinstance(self.dump_dir, os.PathLike):
            object.__setattr__(self, "dump_dir", os.fspath(self.dump_dir))
        self._check_adapters()
        self._check_targets()
        self._check_rest()

    def _check_adapters(self) -> None:
        _require(_is_int(self.r) and self.r >= 0, "r", self.r, "a rank of 0 (quantize only) or more")
        for pattern, rank in self.rank_pattern.items():
            _require(_is_int(rank) and rank >= 0, f"rank_pattern[{pattern!r}]", rank, "a rank of 0 or more")
            _check_regex("rank_pattern", pattern)
        for pattern, alpha in self.alpha_pattern.items():
            _require(_is_number(alpha), f"alpha_pattern[{pattern!r}]", alpha, "a finite number")
            _check_regex("alpha_pattern", pattern)
        _require(_is_number(self.lora_alpha), "lora_alpha", self.lora_alpha, "a finite number")
        ok = _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1
        _require(ok, "lora_dropout", self.lora_dropout, "a probability of at least 0 and below 1")
        init = self.init_lora_weights
        ok = init in INIT_METHODS or (isinstance(init, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", init) is not None)
        wanted = f"one of {', '.join(map(repr, INIT_METHODS))} or 'pissa_niter_4'"
        _require(ok, "init_lora_weights", init, wanted)
        _require(
            init != "loftq" or self.quantize is not False, "init_lora_weights", init, "another with quantize=False"
        )
        ok = _is_int(self.loftq_iter) and self.loftq_iter > 0
        _require(ok, "loftq_iter", self.loftq_iter, "a number of rounds of at least 1")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "dense_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _require(name != "modules_to_save", name, value, "a list of module names")
                _check_regex(name, value)
            elif value is not None or name == "dense_modules":
                ok = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
                _require(ok, name, value, "a list of module names")
        _require(bool(self.target_modules), "target_modules", self.target_modules, "'all-linear', a regex or a list")

    def _check_rest(self) -> None:
        _require(self.quantize in (True, False, "auto"), "quantize", self.quantize, "one of 'auto', True, False")
        _require(self.quant_type in CODE_BOOKS, "quant_type", self.quant_type, f"one of {', '.join(CODE_BOOKS)}")
        sizes = ", ".join(map(str, BLOCK_SIZES))
        _require(self.block_size in BLOCK_SIZES, "block_size", self.block_size, f"one of {sizes}")
        ok = self.outline_layers in (True, False, "auto")
        _require(ok, "outline_layers", self.outline_layers, "one of 'auto', True, False")
        for op, kernel in self.kernels.items():
            named = isinstance(op, str) and isinstance(kernel, str)
            _require(named, "kernels", self.kernels, "a mapping of ops to kernels")
        for name in ("use_rslora", "double_quant", "keep_logits", "autotune"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        ok = _is_number(self.activation_budget) and 0 <= self.activation_budget <= 1
        _require(ok, "activation_budget", self.activation_budget, "a fraction from 0 (recompute all) to 1 (keep all)")
        _require(self.lowering in LOWERINGS, "lowering", self.lowering, f"one of {', '.join(LOWERINGS)}")
        ok = self.dump_dir is None or (isinstance(self.dump_dir, str) and self.dump_dir != "")
        _require(ok, "dump_dir", self.dump_dir, "a folder or None")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | QLoRAConfig | None) -> QLoRAConfig:
        """`torch.compile(..., options={...})` -> QLoRAConfig.

        Raises UnknownOptionError naming the nearest option, ConfigError for what is no mapping of options.
        """
        if isinstance(options, QLoRAConfig):
            return options
        if not (options is None or isinstance(options, Mapping)):
            raise ConfigError(_not_options(options))
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options or {}:
            if name not in known:
                raise UnknownOptionError(name, known)
        return cls(**(options or {}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `QLoRAConfig.from_options(config.to_dict())` equals the original."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            elif isinstance(value, tuple):
                value = list(value)
            out[f.name] = value
        return out

    def rank_for(self, module_name: str) -> int:
        """The rank of this module's adapter: `rank_pattern`'s first hit, else `r`."""
        return int(_first_hit(self.rank_pattern, module_name, self.r))

    def scaling_for(self, module_name: str) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA, for this module's alpha and rank (0 where the rank is 0)."""
        rank = self.rank_for(module_name)
        alpha = float(_first_hit(self.alpha_pattern, module_name, self.lora_alpha))
        if rank == 0:
            return 0.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, module_name: str) -> bool:
        """Whether `target_modules` names this module ("all-linear" names each)."""
        return self.target_modules == "all-linear" or names_module(self.target_modules, module_name)

    def is_excluded(self, module_name: str, *, is_output_head: bool = False) -> bool:
        """Whether `exclude_modules` (None: the output head, unless a target list names it) keeps it as it was."""
        if self.exclude_modules is None:
            return is_output_head and self.target_modules == "all-linear"
        return names_module(self.exclude_modules, module_name)

    def stays_dense(self, module_name: str) -> bool:
        """Whether `dense_modules` names this module."""
        return names_module(self.dense_modules, module_name)


def names_module(spec: str | tuple[str, ...], module_name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or dotted suffixes."""
    if isinstance(spec, str):
        return re.fullmatch(spec, module_name) is not None
    return any(module_name == item or module_name.endswith(f".{item}") for item in spec)


def pattern_names(pattern: str, module_name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the name or a dotted suffix of it."""
    return re.match(rf"(.*\.)?({pattern})$", module_name) is not None


def _first_hit(patterns: Mapping[str, Any], module_name: str, default: Any) -> Any:
    """PEFT's pattern rule (`get_pattern_key`): the first key that matches the name or a dotted suffix of it."""
    return next((value for pattern, value in patterns.items() if pattern_names(pattern, module_name)), default)


def _not_options(given: object) -> str:
    kind = type(given)
    text = f"The options must be a QLoRAConfig or a mapping of its fields, got {kind.__name__}: "
    if kind.__module__.startswith("peft."):
        return text + (
            "QLoRAConfig(r=..., lora_alpha=..., target_modules=...) has PEFT's words; or give the model to "
            "peft.get_peft_model and compile that, without prepare."
        )
    return text + "write QLoRAConfig(r=16)."


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {wanted}, got {value!r}.")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name} holds {pattern!r}, which is not a regular expression: {error}.") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
