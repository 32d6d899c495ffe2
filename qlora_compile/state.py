"""`ModelEdits`: the one piece of code that changes a model's state, behind both doors (`prepare` and the backend).

Passes ask it by names and shapes; it knows the modules and the values. What it decides depends on the model and the
configuration only, so both doors leave bit-identical state.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_edits import add_adapter_to_site, attach
from .attention import forgo_fast_path
from .config import QLoRAConfig, names_module
from .errors import ConfigError, InvalidWeightError, ModelStateError
from .experts import experts_class, runs_own_experts
from .foreign import is_bnb_weight, is_peft_model, peft_layers, tuner_kinds, variant_of
from .initialization import SpectralStart, is_spectral, start_from_weight
from .modules import AdapterInfo, AdapterSite, PreparedState, linear_class, parameter_class, prepared_state
from .page_ops import pager_of
from .param_info import ParamInfo, is_adapter, is_conv1d, is_linear_weight, router_names, site_name
from .tensor import QuantizedTensor, quantize_4bit

# What may differ between the configuration that a model was prepared with and the one that it is compiled with.
COMPILE_ONLY = ("lowering", "outline_layers", "activation_budget", "keep_logits", "dump_dir", "kernels", "autotune")
STALE_OPTIMIZER = (
    "A paged optimizer was made of dense weights that are quantized now: it does not train the adapters beside them. "
    "Make it after qlora_compile.prepare(model, config), or after the first call of a compiled model."
)


class ModelEdits:
    """Decides which weights of `root` are targets, and makes the edits: quantize, add adapters, freeze."""

    def __init__(self, root: nn.Module, config: QLoRAConfig) -> None:
        self.root, self.config = root, config
        self.is_peft = is_peft_model(root)
        self._params = self._index()
        quantized = [(entry, entry.param) for entry in self._params.values()]
        self._codes = {id(q.codes): entry for entry, q in quantized if isinstance(q, QuantizedTensor)}
        before = prepared_state(root)
        self._complete = before is not None and before.complete
        self._was_frozen = before is not None  # what trains since then is the caller's decision
        # a model that PEFT adapted or bitsandbytes quantized keeps the state that they gave it
        self.is_foreign = self.is_peft or any(is_bnb_weight(entry.param) for entry in self._params.values())
        self.peft_layers = peft_layers(root) if self.is_peft else {}
        self.tuners = tuner_kinds(root) if self.is_peft else {}
        self._warned = False
        self._heads, self._routers = self._output_heads(), router_names(root)

    def _index(self) -> dict[int, ParamInfo]:
        owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for name, module in self.root.named_modules():
            for key, param in module._parameters.items():
                if param is not None:
                    owners.setdefault(id(param), []).append((name, module, key))
        return {key: ParamInfo(site_name(*found[0]), tuple(found)) for key, found in owners.items()}

    def _output_heads(self) -> set[int]:
        """ids of the weights of output heads: what `get_output_embeddings` gives, a classifier, else `lm_head`."""
        heads = [m.get_output_embeddings() for m in self.root.modules() if hasattr(m, "get_output_embeddings")]
        names = ["lm_head", "embed_out"]
        if "Classification" in type(self.root).__name__:
            names += ["score", "classifier"]
        heads += [getattr(self.root, name, None) for name in names]
        return {id(head.weight) for head in heads if isinstance(head, nn.Module) and hasattr(head, "weight")}

    def is_output_head(self, entry: ParamInfo) -> bool:
        """Whether it is the weight that makes a model's logits."""
        return id(entry.param) in self._heads

    def find(self, param: object) -> ParamInfo | None:
        """The parameter's entry, by identity; None where it is none of the root's parameters, or an adapter of ours."""
        entry = self._params.get(id(param))
        return None if entry is None or is_adapter(entry) else entry

    def find_codes(self, tensor: object) -> ParamInfo | None:
        """The 4-bit parameter whose codes this tensor is, by identity: what a QLoRAExperts reads; or None."""
        return self._codes.get(id(tensor))

    def all(self) -> list[ParamInfo]:
        """Every parameter of the root, in module order."""
        return list(self._params.values())

    def decline_reason(self, entry: ParamInfo) -> str | None:
        """Why this weight is no target (for a linear whose weight it is), or None if it is one."""
        param, config = entry.param, self.config
        if self.is_foreign and isinstance(param, QuantizedTensor):
            return "a PEFT model's weights in 4 bits stay as they are"
        if self.is_foreign and not self.quantizes():
            kind = "PEFT" if self.is_peft else "bitsandbytes"
            return f"a {kind} model's dense weights stay as they are (quantize={config.quantize!r})"
        if self.is_foreign and (reason := self._foreign_reason(entry)):
            return reason
        if param.dim() == 3 and any(runs_own_experts(module) for _, module, _ in entry.owners):
            return "its module runs its experts in a way of its own"
        if param.dim() != (3 if entry.is_experts else 2):
            return f"its weight has {param.dim()} dimensions"
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its weight is {param.dtype}"
        if self.saved_in_full(entry):
            return "modules_to_save trains it in full"
        other = [owner for owner in entry.owners if isinstance(owner[1], (nn.Embedding, nn.EmbeddingBag))]
        if other:
            return f"its weight is tied to the embedding {other[0][0]!r}"
        if (reason := self._unselected_reason(entry)) is not None:
            return reason
        if self._complete:
            return "prepare() left it as it is: its example_inputs find linears that are no modules"
        return None

    def _unselected_reason(self, entry: ParamInfo) -> str | None:
        """Why the configuration does not select this weight, or None if it does."""
        name, config = entry.site.name if entry.site is not None else entry.name, self.config
        if config.is_excluded(name, is_output_head=self.is_output_head(entry)):
            return "it is the output head" if config.exclude_modules is None else "exclude_modules names it"
        if not config.is_target(name):
            return "target_modules does not name it"
        if config.target_modules == "all-linear" and any(owner in self._routers for owner, _, _ in entry.owners):
            return "it routes tokens to experts (name it in target_modules to adapt it)"
        return None

    def selects(self, entry: ParamInfo) -> bool:
        """Whether an adapter of ours goes beside this weight: not to every one that was loaded in 4 bits."""
        return not self.is_foreign and self._unselected_reason(entry) is None

    def is_held(self, entry: ParamInfo) -> bool:
        """Whether it is a matrix that `QLoRAQuantizationConfig` loaded in 4 bits: read as codes, target or not."""
        matrix = isinstance(entry.param, QuantizedTensor) and entry.param.dim() == 2
        return matrix and entry.site is None and not self.saved_in_full(entry)

    def _foreign_reason(self, entry: ParamInfo) -> str | None:
        """Why a weight of another tool's model is not under a LoRA layer that can have it in 4 bits, or None."""
        name = entry.name
        if entry.param.requires_grad:
            return "it trains (requires_grad)"
        if name in self.peft_layers:
            layer: Any = self.peft_layers[name]
            if layer.merged:  # in 4 bits it could not be taken out again
                return "its adapter is merged into it (unmerge_adapter() first)"
            return variant_of(layer, layer.lora_A) or None
        if name in self.tuners:
            return f"its adapter is PEFT's {self.tuners[name]}, no LoRA"
        parts = name.split(".")
        inside = next((i for i in range(len(parts)) if ".".join(parts[:i]) in self.tuners), None)
        if inside is None:
            return "modules_to_save trains a copy of it" if "original_module" in parts else "PEFT gave it no adapter"
        return "PEFT's target_parameters adapts it" if parts[inside] == "base_layer" else "it is an adapter's own"

    def saved_in_full(self, entry: ParamInfo) -> bool:
        """Whether `modules_to_save` names a module that holds this parameter, directly or further down (PEFT's rule)."""
        for module_name, _, _ in entry.owners:
            parts = module_name.split(".")
            prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
            if any(names_module(self.config.modules_to_save, prefix) for prefix in prefixes):
                return True
        return False

    def quantizes(self) -> bool:
        """Whether targets are quantized at all (`quantize`; "auto" leaves the dense weights of a foreign model)."""
        return bool(self.config.quantize) if self.config.quantize != "auto" else not self.is_foreign

    def quantizes_weight(self, entry: ParamInfo) -> bool:
        """Whether this target's weight is quantized: not where `dense_modules` names it."""
        return self.quantizes() and not self.config.stays_dense(entry.name)

    def quantize(self, entry: ParamInfo, *, fan_in_fan_out: bool, as_module: bool) -> AdapterSite:
        """Dense parameter -> QuantizedTensor in every owner, which get their new class; idempotent.

        `as_module`: every use of the parameter is its owner's own forward, which the new class replaces.
        """
        if entry.site is not None:
            return entry.site
        param = entry.param
        start = self._spectral_start(entry, fan_in_fan_out)
        if start is not None:
            self._replace(entry, nn.Parameter(start.base, requires_grad=False))
        elif self.quantizes_weight(entry) and not isinstance(param, QuantizedTensor):
            transposed = fan_in_fan_out and not entry.is_experts
            self._replace(entry, nn.Parameter(self._quantized(entry, param.data, transposed), requires_grad=False))
        dtype = self.config.compute_dtype if isinstance(entry.param, QuantizedTensor) else param.dtype
        dropout = 0.0 if entry.is_experts else self.config.lora_dropout
        info = AdapterInfo(entry.name, dtype, fan_in_fan_out, dropout)
        if start is not None:
            info.start["default"] = (start.a, start.b)
        new_class = experts_class if entry.is_experts else linear_class if as_module else parameter_class
        return attach([(module, key) for _, module, key in entry.owners], info, new_class)

    def _quantized(self, entry: ParamInfo, weight: Tensor, transposed: bool) -> Tensor:
        try:
            return quantize_4bit(
                weight,
                quant_type=self.config.quant_type,
                block_size=self.config.block_size,
                double_quant=self.config.double_quant,
                transposed=transposed,
                per_expert=weight.dim() == 3,
            )
        except InvalidWeightError as error:
            raise InvalidWeightError(f"{entry.name}: {error}") from None

    def _spectral_start(self, entry: ParamInfo, fan_in_fan_out: bool) -> SpectralStart | None:
        """The base and the adapter that PiSSA, OLoRA or LoftQ make of a weight; None where they have no say."""
        param, rank = entry.param, self.config.rank_for(entry.name)
        if not is_spectral(self.config.init_lora_weights) or self.is_foreign or rank == 0 or param.is_meta:
            return None

        def quantize(weight: Tensor) -> Tensor:
            return self._quantized(entry, weight, fan_in_fan_out and not entry.is_experts)

        maker = quantize if self.quantizes_weight(entry) else None
        return start_from_weight(entry.name, param, self.config, maker, transposed=fan_in_fan_out)

    def _replace(self, entry: ParamInfo, new: nn.Parameter) -> None:
        if pager_of(entry.param) is not None and not self._warned:
            self._warned = True
            warnings.warn(STALE_OPTIMIZER, UserWarning, stacklevel=2)
        for _, module, key in entry.owners:
            module._parameters[key] = new
        self._params[id(new)] = entry

    def add_adapter(self, site: AdapterSite) -> None:
        """Register the "default" adapter with the rank, alpha and seed that the configuration gives; idempotent."""
        rank = self.config.rank_for(site.name)
        if rank == 0 or site.adapters:
            return
        if rank > max(site.in_features, site.out_features):
            raise ConfigError(
                f"r={rank} is larger than both dimensions of {site.name} ({site.out_features} x {site.in_features}): "
                f"choose a rank of at most {max(site.in_features, site.out_features)}, or a rank_pattern for it."
            )
        scaling = self.config.scaling_for(site.name)
        alpha = scaling * (rank**0.5 if self.config.use_rslora else rank)
        add_adapter_to_site(site, "default", rank, alpha, scaling, self.config)

    def freeze(self) -> None:
        """Only adapters and modules_to_save train. A model of PEFT's or bitsandbytes' keeps what was decided there, and one
        that was edited before what was decided since."""
        if self._keeps_training():
            return
        for entry in self._params.values():
            if self.trains(entry):
                entry.param.requires_grad_(True)
            elif entry.param.requires_grad and not is_adapter(entry):
                entry.param.requires_grad_(False)

    def trains(self, entry: ParamInfo) -> bool:
        """Whether this parameter, no adapter of ours, trains after `freeze`."""
        return entry.param.requires_grad if self._keeps_training() else self.saved_in_full(entry)

    def _keeps_training(self) -> bool:
        return self.is_foreign or self._was_frozen

    def remember(self) -> PreparedState:
        """Leave the configuration on the root, unless it has one already, and on the adapted modules: a layer of the
        model that is compiled by itself finds it there."""
        forgo_fast_path(self.root)
        state = prepared_state(self.root)
        if state is None:
            state = PreparedState(self.config)
            self.root.__dict__["_qlora_state"] = state
        for entry in self._params.values():
            for _, module, _ in entry.owners if entry.site is not None else ():
                module.__dict__.setdefault("_qlora_state", state)
        self._keep_from_ddp()
        return state

    def _keep_from_ddp(self) -> None:
        """DDP sends every parameter from rank 0 when it is made, 4-bit ones as dense values, and would quantize what
        arrives again; every rank quantizes the same checkpoint to the same bytes, so they need not be sent at all."""
        names = {
            f"{module_name}.{key}".lstrip(".")
            for entry in self._params.values()
            if isinstance(entry.param, QuantizedTensor)
            for module_name, _, key in entry.owners
        }
        before = self.root.__dict__.get("_ddp_params_and_buffers_to_ignore", ())
        self.root.__dict__["_ddp_params_and_buffers_to_ignore"] = sorted({*before, *names})


def check_same_config(old: QLoRAConfig, new: QLoRAConfig) -> None:
    """Raises ModelStateError if `new` asks for another state than the one that the model already has."""
    ours, theirs = old.to_dict(), new.to_dict()
    for name, value in ours.items():
        if name not in COMPILE_ONLY and theirs[name] != value:
            raise ModelStateError(
                f"The model is already prepared with {name}={value!r} and cannot be prepared again with "
                f"{theirs[name]!r}: load the original model again, or leave the option out."
            )


def check_one_device(root: nn.Module) -> None:
    """Raises ModelStateError if the model's parameters are on several devices."""
    devices: dict[str, str] = {}
    for name, param in root.named_parameters():
        devices.setdefault(str(param.device), name)
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in sorted(devices.items()))
        raise ModelStateError(
            f"The model is on several devices ({where}): move it to one device first (without device_map, or with "
            "device_map={'': device}); several GPUs hold it together by FSDP2."
        )


def expert_entries(edits: ModelEdits) -> list[tuple[ParamInfo, bool]]:
    """(entry, is stored [E, in, out]) of every matrix of fused experts, in module order."""
    return [(entry, bool(entry.owners[0][1].is_transposed)) for entry in edits.all() if entry.is_experts]


def expert_targets(edits: ModelEdits) -> list[tuple[ParamInfo, bool]]:
    """Those of `expert_entries` that are still to be quantized."""
    found = [(entry, fan) for entry, fan in expert_entries(edits) if entry.site is None]
    return [(entry, fan) for entry, fan in found if edits.decline_reason(entry) is None]


def check_not_wrapped(root: nn.Module) -> None:
    """Raises ModelStateError if DDP or FSDP2 holds the parameters already, without the adapters that would be added."""
    parallel = nn.parallel.DistributedDataParallel
    active = torch.distributed.is_available() and parallel._get_active_ddp_module() is not None
    split = any(hasattr(param, "device_mesh") for param in root.parameters())
    if active or split or isinstance(root, parallel):
        wrapper = "fully_shard" if split else "DistributedDataParallel"
        raise ModelStateError(
            f"The model is in {wrapper} already, which would not know its adapters: call qlora_compile.prepare(model, "
            f"config) first, then {wrapper}."
        )


def linear_entries(edits: ModelEdits) -> list[tuple[ParamInfo, bool]]:
    """(entry, fan_in_fan_out) of every weight that its module alone says is a linear's, in module order."""
    found: list[tuple[ParamInfo, bool]] = []
    for entry in edits.all():
        owners: list[Any] = [module for _, module, key in entry.owners if is_linear_weight(module, key)]
        # one that something else holds too is listed where it is no target anyway, so that an error can name it
        if owners and (len(owners) == len(entry.owners) or edits.decline_reason(entry) is not None):
            found.append((entry, is_conv1d(owners[0])))
    return found
