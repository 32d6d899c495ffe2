"""Does the exported checkpoint compute what base + adapters compute? Both through plain transformers, in fp32."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, MissingDependencyError
from ..positions import most_positions
from ..tensor import QuantizedTensor
from .export_nf4 import LinearWeight
from .fold_plan import FoldPlan, WeightedAdapter
from .formats.peft_files import LoraLayer
from .models import load_weights
from .quantized_base import QuantizedBase
from .quantized_source import is_quantized_folder

# Tokens that are compared: (batch, length). Neither is a size that kernels like.
IDS_SHAPE = (3, 37)


@dataclass(frozen=True)
class VerifyResult:
    """Logits of the export against base + adapters.

    `relative` is |difference| / |reference| in 2-norms over all logits, `tolerance` what it may be, `effect` the same
    quotient for base + adapters against the base alone (None where the base alone is not at hand), `argmax_agreement`
    the fraction of positions with the same most likely token. `quantization`, of a 4-bit export, is the quotient for
    base + adapters in 4 bits (the reference then) against base + adapters.
    """

    max_abs: float
    relative: float
    tolerance: float
    argmax_agreement: float
    effect: float | None
    reference: str
    quantization: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        text = (
            f"Verified against {self.reference}: relative difference of the logits {self.relative:.1e} "
            f"(allowed {self.tolerance:.1e}), largest {self.max_abs:.1e}, "
            f"same most likely token at {self.argmax_agreement:.1%} of positions."
        )
        if self.effect is not None and self.effect <= self.tolerance:
            text += f" The adapters change the logits by {self.effect:.1e} only: rounding could hide them here."
        if self.quantization is not None:
            text += f" The 4 bits change them by {self.quantization:.1e}."
        return text


@dataclass(frozen=True)
class FourBit:
    """The weights of an export that are in 4 bits, and how they were quantized."""

    linears: tuple[LinearWeight, ...]
    quantized: QuantizedBase


def verify_folder(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapters: Sequence[WeightedAdapter],
    eps: float,
    *,
    plan: FoldPlan | None = None,
    quantized: QuantizedBase | None = None,
    four_bit: FourBit | None = None,
    seed: int = 0,
) -> VerifyResult:
    """Compare `folder` with the folder `base` + adapters (stock peft applies a single one of weight 1, if installed).

    `plan` and `quantized` say which of the base's weights are replaced by their 4-bit values first; `eps` is that of
    the type which the export was rounded to. With `four_bit`, base + adapters is quantized as the export was.
    Raises CheckpointError where the logits differ by more than that explains.
    """
    model = load_plain(base)
    ids = _random_ids(model, seed)
    if plan is not None and quantized is not None:
        _requantize(model, plan, quantized)
    alone = _logits(model, ids) if adapters else None
    layers = sum(1 for module in model.modules() if isinstance(module, nn.Linear))
    if plan is not None and plan.untie:  # what is added to one of the two must not change the other
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone())
    model, applied_by = _apply(model, adapters, merge=four_bit is not None)
    reference, what, lost = _logits(model, ids), f"base + adapters by {applied_by}", None
    if four_bit is not None:
        exact = reference
        _to_four_bits(model, four_bit)
        reference, what = _logits(model, ids), f"{what}, quantized to {four_bit.quantized.quant_type}"
        lost = _apart(reference, exact)
        # bitsandbytes' files hold values of 16 bits, whatever the sum was made in.
        eps = max(eps, torch.finfo(torch.bfloat16).eps)
    tolerance = max(_tolerance(eps, layers), _noise(model, ids, reference, seed))
    del model
    result = _compare(folder, ids, reference, alone, tolerance, what)
    return replace(result, quantization=lost)


def verify_model(folder: str | os.PathLike[str], model: nn.Module, eps: float, *, seed: int = 0) -> VerifyResult:
    """Compare `folder` with a model in memory, called as it is (its own compute dtype). Raises CheckpointError."""
    ids = _random_ids(model, seed).to(next(model.parameters()).device)
    was_training = model.training
    reference = _logits(model.eval(), ids)
    model.train(was_training)
    layers = sum(1 for module in model.modules() if isinstance(module, nn.Linear))
    coarsest = max(eps, *(torch.finfo(d).eps for d in (next(model.parameters()).dtype, torch.bfloat16)))
    # Twice: here the activations are rounded as well.
    return _compare(folder, ids, reference, None, 2 * _tolerance(coarsest, layers), "the model in memory")


def load_plain(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a folder or .gguf file in fp32, by the class that its config names.

    Raises CheckpointError, MissingDependencyError.
    """
    if Path(folder).suffix.lower() == ".gguf":
        return load_weights(Path(folder), torch.float32)
    four_bit = is_quantized_folder(Path(folder))
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        raise MissingDependencyError("transformers", "transformers", "Verifying an export") from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0], transformers.AutoModel)
        options = _four_bit_options() if four_bit else {}
        model, info = cls.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {folder}: {first}") from error
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise CheckpointError(f"{folder} and its config do not agree: {wrong[0]} is missing or not expected.")
    return (_dense(model) if four_bit else model).eval()


def _four_bit_options() -> dict[str, Any]:
    """Stock bitsandbytes reads a 4-bit folder with other code than ours; without it ours does."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return {"device_map": "cpu"}
    from .transformers_quantizer import QLoRAQuantizationConfig

    return {"quantization_config": QLoRAQuantizationConfig()}


def _dense(model: nn.Module) -> nn.Module:
    """4-bit linears -> linears in fp32 with the same values: then no kernel rounds what flows through them."""
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor):
            module.weight = nn.Parameter(weight.dequantize().float(), requires_grad=False)
        elif type(module).__name__ == "Linear4bit":
            import bitsandbytes

            assert isinstance(weight, torch.Tensor) and isinstance(module, nn.Linear)
            state = weight.quant_state  # type: ignore[attr-defined]
            values = bitsandbytes.functional.dequantize_4bit(weight.data, state).float()
            linear = nn.Linear(*values.shape[::-1], bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(values, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return nn.Module.float(model)  # transformers' own refuses a model that was quantized


def _to_four_bits(model: nn.Module, four_bit: FourBit) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for linear in four_bit.linears:
            weight = parameters[linear.name].data
            weight.copy_(four_bit.quantized.quantize(weight, transposed=linear.is_conv1d).dequantize())


def _compare(
    folder: str | os.PathLike[str],
    ids: torch.Tensor,
    reference: torch.Tensor,
    alone: torch.Tensor | None,
    tolerance: float,
    what: str,
) -> VerifyResult:
    got = _logits(load_plain(folder), ids.cpu())
    if got.shape != reference.shape:
        raise CheckpointError(f"{folder} gives logits {list(got.shape)}, {what} {list(reference.shape)}.")
    result = VerifyResult(
        max_abs=float((got - reference).abs().max()),
        relative=_apart(got, reference),
        tolerance=tolerance,
        argmax_agreement=float((got.argmax(-1) == reference.argmax(-1)).double().mean()),
        effect=None if alone is None else _apart(alone, reference),
        reference=what,
    )
    if not result.relative <= tolerance:  # also true for NaN
        raise CheckpointError(
            f"The export does not compute what {what} computes: its logits differ by {result.relative:.1e} "
            f"(allowed {tolerance:.1e}); it was not written."
        )
    return result


def _apart(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """|difference| / |reference| in 2-norms."""
    return float((logits - reference).norm()) / max(float(reference.norm()), 1e-30)


def _tolerance(eps: float, layers: int) -> float:
    """What rounding with this epsilon may do to the logits, relative, in 2-norms.

    Measured on SmolLM2-135M (210 linear layers, all folded): 0.9 eps for bfloat16, 1.1 eps for float16, and 3e-6 of
    fp32's own noise. 4 eps leaves room for other models; independent roundings grow with the root of their number.
    """
    return (1e-5 + 4 * eps) * max(1.0, layers / 210) ** 0.5


def _noise(model: nn.Module, ids: torch.Tensor, reference: torch.Tensor, seed: int) -> float:
    """What fp32 itself may do to the logits of this model, relative, in 2-norms: large where strong adapters make its
    softmax sharp. Measured by one more pass in which every layer's result is off by up to 2 units of 2^-24.

    Eight times that: two paths differ by sums of two roundings, of a few units each, in their own order of summing.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        units = torch.rand(out.shape, generator=generator).to(out.device).mul_(4).sub_(2)
        return out + out * units.mul_(2**-24)

    handles = [m.register_forward_hook(disturb) for m in model.modules() if next(m.children(), None) is None]
    disturbed = _logits(model, ids)
    for handle in handles:
        handle.remove()
    return 8 * _apart(disturbed, reference)


def _random_ids(model: nn.Module, seed: int) -> torch.Tensor:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        raise CheckpointError("Only models with token embeddings can be verified.")
    shape = (IDS_SHAPE[0], min(IDS_SHAPE[1], most_positions(model) or IDS_SHAPE[1]))
    return torch.randint(embedding.num_embeddings, shape, generator=torch.Generator().manual_seed(seed))


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=ids)
    values = (out.logits if hasattr(out, "logits") else out.last_hidden_state).float().cpu()
    # What all logits of a position share changes no probability, but would hide differences in a quotient of norms.
    return values - values.mean(dim=-1, keepdim=True)


def _requantize(model: nn.Module, plan: FoldPlan, quantized: QuantizedBase) -> None:
    parameters = dict(model.named_parameters())
    done = set[str]()  # of fused experts several tensors are one parameter
    for target in plan.targets.values():
        if target.requantize and target.parameter not in done:
            done.add(target.parameter)
            weight = parameters[target.parameter].data
            # The 4-bit values come from the weight as it was stored; fp32 holds every 16-bit value exactly.
            stored = weight.to(quantized.dtype or target.dtype or weight.dtype)
            weight.copy_(quantized.round_trip(stored, transposed=target.transposed))


def _apply(model: nn.Module, adapters: Sequence[WeightedAdapter], *, merge: bool) -> tuple[nn.Module, str]:
    """Base -> base + adapters, and who applied them: stock peft reads the files with other code than ours.

    With `merge` they are added to the weights.
    """
    folder = adapters[0].folder if len(adapters) == 1 and adapters[0].weight == 1 else None
    if folder is not None and (folder / "adapter_model.safetensors").is_file():
        try:
            import peft
        except ImportError:
            pass
        else:
            adapted = peft.PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
            return (adapted.merge_and_unload() if merge else adapted).eval(), "stock peft"
    if any(layer.magnitude is not None for adapter in adapters for layer in adapter.files.layers().values()):
        raise MissingDependencyError("peft", "test", "Verifying the export of a DoRA adapter")
    _replace_full(model, adapters)
    for adapter in adapters:
        for path, layer in adapter.files.layers().items():
            if layer.parameter:
                _add_to_parameter(model, path, layer, adapter.weight)
            elif merge:
                _add_to_weight(model.get_submodule(path), layer, adapter.weight)
            else:
                model.get_submodule(path).register_forward_hook(_low_rank_hook(layer, adapter.weight))
    return model, "fp32 sums" if merge else "fp32 hooks"


def _add_to_weight(module: nn.Module, layer: LoraLayer, weight: float) -> None:
    """Embeddings and Conv1D hold [in, out]."""
    delta = layer.scaling * weight * (layer.b.float() @ layer.a.float())
    with torch.no_grad():
        module.get_parameter("weight").add_(delta if isinstance(module, nn.Linear) else delta.t())
        if layer.bias is not None:
            module.get_parameter("bias").add_(layer.scaling * weight * layer.bias.float())


def _add_to_parameter(model: nn.Module, parameter: str, layer: LoraLayer, weight: float) -> None:
    module = model.get_submodule(parameter.rpartition(".")[0])
    delta = layer.scaling * weight * (layer.b.float() @ layer.a.float())
    with torch.no_grad():
        model.get_parameter(parameter).add_(delta.mT if getattr(module, "is_transposed", False) else delta)


def _replace_full(model: nn.Module, adapters: Sequence[WeightedAdapter]) -> None:
    """Put what adapters trained in full into new parameters, which thereby are tied to no other."""
    trained: dict[str, list[tuple[float, torch.Tensor]]] = {}
    for adapter in adapters:
        for name, tensor in adapter.files.full_parameters().items():
            trained.setdefault(name, []).append((adapter.full_weight, tensor.float()))
    for name, parts in trained.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
        value = (1 - sum(weight for weight, _ in parts)) * old.detach() + sum(w * tensor for w, tensor in parts)
        setattr(owner, leaf, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)


def _low_rank_hook(layer: LoraLayer, weight: float) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    a, b, scale = layer.a.float(), layer.b.float(), layer.scaling * weight

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        low = nn.functional.embedding(args[0], a.t()) if layer.embedding else args[0] @ a.t()
        return output + scale * (low @ b.t() if layer.bias is None else low @ b.t() + layer.bias.float())

    return hook
