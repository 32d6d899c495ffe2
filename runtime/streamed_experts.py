"""Experts that a checkpoint holds apart -> one parameter, with one expert dense in memory at a time.

    experts.0.w1, experts.0.w3, experts.1.w1, ...  ->  experts.gate_up_proj, MappedExperts [E, 2I, H]

transformers reads all of a layer's experts, stacks and joins them: the whole model in memory, since what is joined is no
mapped file any more. Here its own operations run on each expert alone, when its matrix is asked for. The quantizer of
`QLoRAQuantizationConfig` asks at once, and what comes out is quantized before the next one is read; `MapExpertsConfig`
leaves the parameter as it is, for `prepare`.
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    log_conversion_errors,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from ..experts import expert_parameters
from .mapped_experts import MappedExperts

METHOD = "qlora_map_experts"


def by_expert(converter: Any) -> Any:
    """transformers' converter, or where it puts experts together one that reads them one by one."""
    if type(converter) is not WeightConverter or not _keeps_experts_apart(converter):
        return converter
    sources, targets = list(converter._original_source_patterns), list(converter._original_target_patterns)
    own = ExpertConverter(sources, targets, list(converter.operations), converter.force_cpu)
    own.scope_prefix, own.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return own


def _keeps_experts_apart(converter: WeightConverter) -> bool:
    """Whether the first dimension counts experts, and the operations do to each what they do to all."""
    first, *others = converter.operations
    if type(first) is not MergeModulelist or first.dim != 0 or len(converter.target_patterns) != 1:
        return False
    return all(type(op) is Concatenate and op.dim > 0 for op in others)


class ExpertConverter(WeightConverter):  # type: ignore[misc]
    """Leaves experts in the file for the quantizer's operation; what that does not take goes transformers' way."""

    __slots__ = ()

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        operation, readers = self.quantization_operation, self.collected_tensors
        if operation is None or not all(callable(read) for reads in readers.values() for read in reads):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)  # type: ignore[no-any-return]
        with log_conversion_errors(layer_name, loading_info, (len(readers), layer_name), operation):
            return operation.take(layer_name, self._mapped(layer_name, model, config))  # type: ignore[no-any-return]

    def _mapped(self, layer_name: str, model: Any, config: Any) -> MappedExperts:
        """Raises CheckpointError for experts that are not of the number and shape that the model has."""
        counts = {pattern: len(reads) for pattern, reads in self.collected_tensors.items()}
        experts, *shape = model.get_parameter(layer_name).shape
        if set(counts.values()) != {experts}:
            raise CheckpointError(f"{layer_name} needs {experts} tensors of each kind, the checkpoint has {counts}.")

        def read(index: int) -> Any:
            matrix = self._expert(index, layer_name, model, config)
            if list(matrix.shape) != shape:
                raise CheckpointError(f"{layer_name} has experts {shape}, the checkpoint one {list(matrix.shape)}.")
            return matrix

        return MappedExperts((experts, shape[0], shape[1]), read(0).dtype, read)

    def _expert(self, index: int, layer_name: str, model: Any, config: Any) -> Any:
        """One expert's matrix [a, b], by transformers' own operations on lists of one."""
        parts: dict[str, Any] = {pattern: [reads[index]()] for pattern, reads in self.collected_tensors.items()}
        for op in self.operations:
            parts = op.convert(
                parts,
                source_patterns=self.source_patterns,
                target_patterns=self.target_patterns,
                full_layer_name=layer_name,
                model=model,
                config=config,
            )
        (joined,) = parts.values()
        return joined[0]


@register_quantization_config(METHOD)
class MapExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`from_pretrained(quantization_config=...)` gives the dense model as ever, but experts that the checkpoint holds
    apart are MappedExperts. (Only a quantizer may change how transformers converts; nothing is quantized.)"""

    def __init__(self) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class _MapExperts(HfQuantizer):  # type: ignore[misc]
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        modules = model.named_modules()
        self._experts = {f"{name}.{key}" for name, module in modules for key in expert_parameters(module)}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._experts

    def get_quantize_ops(self) -> ConversionOps:
        return _LeaveMapped()

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return [by_expert(converter) for converter in weight_conversions]

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _LeaveMapped(ConversionOps):  # type: ignore[misc]
    def take(self, name: str, experts: MappedExperts) -> dict[str, Any]:
        return {name: experts}

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict
