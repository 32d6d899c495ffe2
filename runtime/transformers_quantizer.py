"""transformers' quantizer: `from_pretrained(path, quantization_config=QLoRAQuantizationConfig(...))`.

Each linear's weight becomes a `QuantizedTensor` as its shard delivers it; nothing dense outlives its tensor. On disk the
model is bitsandbytes' (`save_pretrained` writes the tensors and the config that stock transformers + bitsandbytes load),
and a folder that bitsandbytes wrote is read as it is, code by code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import QLoRAConfig, parse_dtype
from ..errors import ConfigError, InvalidWeightError, MissingDependencyError, ModelStateError
from ..experts import expert_parameters
from ..modules import adapter_parameters
from ..param_info import router_names
from ..tensor import QuantizedTensor, quantize_4bit
from .formats.bnb_files import PARTS, pack_weight, quantization_config, unpack_weight

try:
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:
    raise MissingDependencyError("transformers", "transformers", "QLoRAQuantizationConfig") from None

METHOD = "qlora"


@register_quantization_config(METHOD)
class QLoRAQuantizationConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes: `quant_type`, `block_size` and `double_quant` as in `QLoRAConfig`.

    `compute_dtype` is noted in the saved config for bitsandbytes. `skip_modules` stay dense (None: the output head and
    what is tied to it). Raises ConfigError.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str = torch.bfloat16,
        skip_modules: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        QLoRAConfig.from_options(
            {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant} | unknown
        )
        if unknown:
            raise ConfigError(
                f"QLoRAQuantizationConfig has no option {next(iter(unknown))!r}: it belongs to QLoRAConfig."
            )
        self.quant_method = METHOD
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.compute_dtype = parse_dtype(compute_dtype, "compute_dtype")
        self.skip_modules = None if skip_modules is None else sorted(skip_modules)

    @classmethod
    def from_bitsandbytes(cls, config: Mapping[str, Any]) -> QLoRAQuantizationConfig:
        """What a pre-quantized folder's config.json says. Raises ConfigError for anything but bitsandbytes' 4 bits."""
        check_bitsandbytes(config)
        skip = config.get("llm_int8_skip_modules")
        return cls(
            config.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=config.get("bnb_4bit_compute_dtype") or torch.float32,
            skip_modules=None if skip is None else list(skip),
        )

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: bitsandbytes' words, so that stock transformers loads the folder."""
        out = quantization_config(self.quant_type, self.double_quant, self.skip_modules or (), self.compute_dtype)
        return out | ({"llm_int8_skip_modules": None} if self.skip_modules is None else {})


def check_bitsandbytes(config: Mapping[str, Any]) -> None:
    """Raises ConfigError unless this `quantization_config` of a config.json is bitsandbytes' 4 bits."""
    method = config.get("quant_method", "bitsandbytes" if config.get("load_in_4bit") else None)
    if method != "bitsandbytes" or not config.get("load_in_4bit", config.get("_load_in_4bit")):
        bits = " in 8 bits" if config.get("load_in_8bit") else ""
        raise ConfigError(f"The model is already quantized by {method}{bits}; only bitsandbytes' 4 bits are read here.")


def _check_device_map(device_map: Any) -> None:
    """Raises ModelStateError for a map to several devices, or to the disk."""
    devices = sorted({str(device) for device in device_map.values()}) if isinstance(device_map, Mapping) else []
    if len(devices) > 1 or "disk" in devices:
        raise ModelStateError(
            f"device_map spreads the model over {', '.join(devices)}: one compiled graph serves one device, so leave it out "
            "or give {'': device}; several GPUs hold a model together by FSDP2."
        )


@register_quantizer(METHOD)
class QLoRAHfQuantizer(HfQuantizer):
    """Dense linears and experts -> QuantizedTensor while loading, or bitsandbytes' tensors -> the same, byte for byte."""

    quantization_config: QLoRAQuantizationConfig
    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": ["weight", *(f"weight.{part}" for part in PARTS)]}

    def __init__(self, quantization_config: QLoRAQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._targets: set[str] = set()

    @property
    def quantized_element_size(self) -> float:
        return 0.5

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks it of a quantized model without PEFT: ours trains the adapters that `prepare` adds."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        _check_device_map(kwargs.get("device_map"))
        skipped = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}
        routers = router_names(model)
        kept = sorted(name for name in linears if name in routers or not should_convert_module(name, skipped))
        self._targets = {f"{name}.weight" for name in linears if name not in kept}
        for name, module in model.named_modules():
            if should_convert_module(name, skipped):
                self._targets |= {f"{name}.{parameter}" for parameter in expert_parameters(module)}
        config.skip_modules = kept

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        from .streamed_experts import by_expert

        updated = super().update_weight_conversions(weight_conversions, *args, **kwargs)
        return updated if self.pre_quantized else [by_expert(converter) for converter in updated]

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Deserialize}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # `save_pretrained` gets packed tensors from us, so the reading must not be turned round a second time.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            c for c in conversions if not any(isinstance(op, _Deserialize) for op in getattr(c, "operations", ()))
        ]
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `save_pretrained` writes of a model without adapters (`saving` has those): bitsandbytes' tensors."""
        adapters = {id(parameter) for parameter in adapter_parameters(model)}
        state: dict[str, torch.Tensor] = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in adapters:
                continue
            if isinstance(tensor, QuantizedTensor) and tensor.per_expert:
                state[key] = tensor.dequantize()  # bitsandbytes has no experts in 4 bits
            elif isinstance(tensor, QuantizedTensor):
                state |= pack_weight(key, tensor, tensor.dtype)
            else:
                state[key] = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, QuantizedTensor):
                    dense = parameter.dequantize()
                    module._parameters[name] = nn.Parameter(dense.to(dtype or dense.dtype), requires_grad=False)
        return model


class _Quantize(ConversionOps):
    def __init__(self, hf_quantizer: QLoRAHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, nn.Parameter]:
        out = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            module, leaf = get_module_from_name(model, name)
            quantized = self._quantize(
                name, dense, transposed=isinstance(module, Conv1D), per_expert=leaf in expert_parameters(module)
            )
            out[name] = nn.Parameter(quantized, requires_grad=False)
        return out

    def take(self, name: str, experts: torch.Tensor) -> dict[str, nn.Parameter]:
        """The parameter `name` [E, a, b] of mapped experts, each quantized before the next one is read."""
        return {name: nn.Parameter(self._quantize(name, experts, per_expert=True), requires_grad=False)}

    def _quantize(self, name: str, dense: torch.Tensor, **layout: bool) -> QuantizedTensor:
        config = self.hf_quantizer.quantization_config
        try:
            return quantize_4bit(
                dense,
                quant_type=config.quant_type,
                block_size=config.block_size,
                double_quant=config.double_quant,
                **layout,
            )
        except InvalidWeightError as error:
            raise InvalidWeightError(f"{name}: {error}") from None


class _Deserialize(ConversionOps):
    def __init__(self, hf_quantizer: QLoRAHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        wanted = model.get_parameter_or_buffer(full_layer_name)
        if len(tensors) == 1:  # a weight that stayed dense
            return {name: t.to(wanted.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        module, leaf = get_module_from_name(model, full_layer_name)
        transposed = isinstance(module, Conv1D)
        quantized = unpack_weight(leaf, tensors, dtype=wanted.dtype, transposed=transposed)
        return {leaf: nn.Parameter(quantized, requires_grad=False)}


def _merge_configs(of_model: Any, given: Any) -> Any:
    """transformers refuses two classes of configuration for one model: a bitsandbytes folder read by us is no conflict."""
    if not isinstance(given, QLoRAQuantizationConfig):
        return _their_merge(of_model, given)
    return QLoRAQuantizationConfig.from_bitsandbytes(of_model if isinstance(of_model, dict) else of_model.to_dict())


# Its registry has no place for this; only calls with our class behave differently.
_their_merge = AutoHfQuantizer.merge_quantization_configs
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_configs)
