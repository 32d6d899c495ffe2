"""Experts that a checkpoint holds apart -> one 4-bit parameter, with one expert dense in memory at a time.

    experts.0.w1, experts.0.w3, experts.1.w1, ...  ->  experts.gate_up_proj, QuantizedTensor [E, 2I, H]

transformers reads all of a layer's experts, stacks and joins them, and quantizes the result: two dense copies of the
largest parameter of the model at once. Here its own operations run on each expert alone and what comes out is quantized
before the next one is read.
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    log_conversion_errors,
)

from ..errors import CheckpointError


def by_expert(converter: Any) -> Any:
    """transformers' converter, or where it puts experts together one that quantizes them one by one."""
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
    """Reads, joins and quantizes one expert after the other; what is not quantized goes transformers' way."""

    __slots__ = ()

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        operation, readers = self.quantization_operation, self.collected_tensors
        if operation is None or not all(callable(read) for reads in readers.values() for read in reads):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)  # type: ignore[no-any-return]
        with log_conversion_errors(layer_name, loading_info, (len(readers), layer_name), operation):
            counts = {pattern: len(reads) for pattern, reads in readers.items()}
            if len(set(counts.values())) != 1:
                raise CheckpointError(f"{layer_name} needs as many tensors of each kind, the checkpoint has {counts}.")
            experts = (self._expert(index, layer_name, model, config) for index in range(max(counts.values())))
            return operation.quantize_experts(layer_name, experts)  # type: ignore[no-any-return]

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
