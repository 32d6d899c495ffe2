"""QLoRAQuantizationConfig on mixtures of experts: each fused parameter becomes 4-bit as it is read."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

import qlora_compile as qc
from qlora_compile.modules import adapter_sites

transformers = pytest.importorskip("transformers")

# bitsandbytes wants its N a multiple of 32 on such CPUs
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_local_experts": 3}


def test_experts_are_streamed_into_4_bits_as_prepare_makes_them(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    plain = transformers.AutoModelForCausalLM.from_config(config).float()
    plain.save_pretrained(tmp_path / "base")
    quantization = qc.QLoRAQuantizationConfig(block_size=32, compute_dtype="float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=quantization
    )
    options = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3}
    weight = loaded.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert isinstance(weight, qc.QuantizedTensor) and weight.per_expert
    ids = torch.randint(3, 99, (2, 11))
    with torch.no_grad():
        before = loaded(input_ids=ids).logits
    loaded.save_pretrained(tmp_path / "saved")  # linears as bitsandbytes writes them, experts dense
    own, theirs = (dict(qc.prepare(model, options).named_parameters()) for model in (plain, loaded))
    assert own.keys() == theirs.keys()
    for key, parameter in own.items():
        assert torch.equal(parameter, theirs[key])
    assert sum(site.experts is not None for site in adapter_sites(loaded).values()) == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, before, atol=2e-5, rtol=1e-3)

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, before, atol=2e-2, rtol=2e-2)


class _Dense:
    """Bytes of the checkpoint's tensors that were read and are still there, and the most that there were."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.freed, tensor.nbytes)
        return tensor

    def freed(self, count: int) -> None:
        self.now -= count


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_one_expert_at_a_time_is_dense(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    experts = {"num_local_experts": 16, "num_experts": 16, "moe_intermediate_size": 64}
    config = transformers.AutoConfig.for_model(kind, **SIZES | {"vocab_size": 8} | experts)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    dense, read = _Dense(), core_model_loading._materialize_copy
    monkeypatch.setattr(core_model_loading, "_materialize_copy", lambda *args: dense.read(read(*args)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=qc.QLoRAQuantizationConfig()
    )
    weight = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert isinstance(weight, qc.QuantizedTensor) and weight.shape[0] == 16
    kept = sum(p.nbytes for p in model.parameters() if not isinstance(p, qc.QuantizedTensor))
    assert dense.peak <= kept + 2 * weight.numel() // 16 * 4
    assert weight.numel() * 4 > kept + 2 * weight.numel() // 16 * 4  # or this test could not fail


def test_a_checkpoint_without_an_expert_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[next(key for key in tensors if "layers.1" in key and "experts.2" in key and "w1" in key)]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="automatic conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qc.QLoRAQuantizationConfig())
