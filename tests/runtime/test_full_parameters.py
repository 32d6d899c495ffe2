"""What adapters of stock peft trained in full, on a model in memory: the same logits when loaded, saved and exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import AdapterMismatchError
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.full_parameters import loaded_in_full

from .stock_peft import in_peft, logits, stock

transformers = pytest.importorskip("transformers")

MakeModel = Callable[..., torch.nn.Module]
UNTIED = {"num_hidden_layers": 2, "tie_word_embeddings": False}
BIASED = UNTIED | {"attention_bias": True, "mlp_bias": True}


def prepared(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    settings: dict[str, Any] = {"r": 2, "target_modules": ("q_proj", "v_proj")}
    settings |= {"quantize": False, "compute_dtype": "float32"}
    return qc.prepare(model, settings | options).eval()


KINDS = {
    "bias of all": (BIASED, {"bias": "all"}, (), "all"),
    "bias of adapted layers": (BIASED, {"bias": "lora_only"}, (), "lora_only"),
    "modules named here too": (BIASED, {"modules_to_save": ["lm_head", "norm"]}, ("lm_head", "norm"), "none"),
    "modules named there only": (UNTIED, {"modules_to_save": ["lm_head", "norm"]}, (), "none"),
    "modules and biases": (BIASED, {"modules_to_save": ["down_proj"], "bias": "lora_only"}, ("norm",), "lora_only"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_again_and_exported(tmp_path: Path, tiny_llama: MakeModel, kind: str) -> None:
    sizes, options, named, bias = KINDS[kind]
    want = stock(tiny_llama(**sizes), tmp_path / "theirs", **options)
    tiny_llama(**sizes).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = prepared(tiny_llama(**sizes), modules_to_save=named)
    qc.load_adapter(model, tmp_path / "theirs", "x")
    qc.set_adapters(model, "x")
    # fp32 throughout, sums in another order.
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(model), want, **close)
    qc.save_adapter(model, tmp_path / "ours", "x")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["bias"] == bias
    torch.testing.assert_close(in_peft(tiny_llama(**sizes), tmp_path / "ours"), want, **close)
    copy.deepcopy(model).save_pretrained(tmp_path / "folder")  # type: ignore[operator]
    torch.testing.assert_close(in_peft(tiny_llama(**sizes), tmp_path / "folder" / "x"), want, **close)
    assert set(loaded_in_full(model)) <= set(open_checkpoint(tmp_path / "folder" / "model.safetensors").specs)
    qc.export(model, tmp_path / "out", base=tmp_path / "base", verify=True)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), want, **close)
    # It counts for the model's other adapter too.
    qc.set_adapters(model, "default")
    qc.save_adapter(model, tmp_path / "default", "default")
    torch.testing.assert_close(in_peft(tiny_llama(**sizes), tmp_path / "default"), logits(model), **close)
    assert (logits(model) - logits(tiny_llama(**sizes).eval())).abs().max() > 1e-2


def test_a_layer_that_another_adapter_adapts(tmp_path: Path, tiny_llama: MakeModel) -> None:
    """The files of that one have the weight under the name that peft's wrapper gives it."""
    stock(tiny_llama(**UNTIED), tmp_path / "theirs", modules_to_save=["o_proj"])
    model = prepared(tiny_llama(**UNTIED), target_modules=("o_proj", "q_proj", "v_proj"), init_lora_weights=False)
    with pytest.raises(AdapterMismatchError, match=r"needs another .*o_proj\.weight.* than adapter 'default'"):
        qc.load_adapter(model, tmp_path / "theirs", "x")
    model = prepared(tiny_llama(**UNTIED), target_modules=("o_proj", "q_proj", "v_proj"))
    qc.load_adapter(model, tmp_path / "theirs", "x")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.1)
    qc.save_adapter(model, tmp_path / "default")
    qc.set_adapters(model, "default")
    got = in_peft(tiny_llama(**UNTIED), tmp_path / "default")
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-5)


def test_biases_of_experts_are_no_modules(tmp_path: Path) -> None:
    """GPT-OSS's are parameters beside the experts' matrices, which an adapter wraps in two layers."""
    config = transformers.GptOssConfig(
        hidden_size=48, intermediate_size=76, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=14, vocab_size=101, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, pad_token_id=0,
    )  # fmt: skip

    def build() -> Any:
        torch.manual_seed(3)
        return transformers.GptOssForCausalLM(config).float().eval()

    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    for name, options in (("linears", {}), ("experts", experts)):
        want = stock(build(), tmp_path / name, bias="all", target_modules=["q_proj"], **options)
        model = prepared(build(), target_modules=("q_proj",))
        if options:
            model = prepared(build(), target_modules=("q_proj", "gate_up_proj", "experts.down_proj"))
        qc.load_adapter(model, tmp_path / name, "x")
        qc.set_adapters(model, "x")
        # PEFT adds B A to the experts' weights, we to the result.
        torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=2e-5)
        qc.save_adapter(model, tmp_path / "ours", "x")
        torch.testing.assert_close(in_peft(build(), tmp_path / "ours"), want, rtol=1e-3, atol=2e-5)


class TestTied:
    @pytest.mark.parametrize("named", [(), ("lm_head",)])
    @pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
    def test_one_parameter_cannot_hold_two_values(
        self, tmp_path: Path, tiny_llama: MakeModel, saved: list[str], named: tuple[str, ...]
    ) -> None:
        stock(tiny_llama(), tmp_path / "theirs", modules_to_save=saved)
        model = prepared(tiny_llama(), modules_to_save=named)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(AdapterMismatchError, match=r"to differ from .*they are one parameter in the model"):
            qc.load_adapter(model, tmp_path / "theirs", "x")
        assert before.keys() == model.state_dict().keys() and loaded_in_full(model) == {}
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_both_trained_alike_are_loaded_and_saved(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        """`ensure_weight_tying`: one value for both in peft's files, as in ours."""
        options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        want = stock(tiny_llama(), tmp_path / "theirs", **options)
        model = prepared(tiny_llama())
        qc.load_adapter(model, tmp_path / "theirs", "x")
        qc.set_adapters(model, "x")
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
        qc.save_adapter(model, tmp_path / "ours", "x")
        torch.testing.assert_close(in_peft(tiny_llama(), tmp_path / "ours"), want, rtol=1e-4, atol=1e-5)
        qc.load_adapter(prepared(tiny_llama(), modules_to_save=("lm_head",)), tmp_path / "ours", "x")

    def test_the_way_out_is_two_parameters(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        """As docs/adapters.md says it."""
        want = stock(tiny_llama(), tmp_path / "theirs", modules_to_save=["lm_head"])
        tiny_llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
        plain: Any = tiny_llama()
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
        plain.config.tie_word_embeddings = False
        model = prepared(plain)
        qc.load_adapter(model, tmp_path / "theirs", "x")
        qc.set_adapters(model, "x")
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
        qc.save_adapter(model, tmp_path / "ours", "x")
        torch.testing.assert_close(in_peft(tiny_llama(), tmp_path / "ours"), want, rtol=1e-4, atol=1e-5)
        for name, base in (("folded", {"base": tmp_path / "base"}), ("alone", {})):
            qc.export(model, tmp_path / name, verify=True, **base)
            exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
            torch.testing.assert_close(logits(exported), want, rtol=1e-4, atol=1e-5)


class TestSeveral:
    def folders(self, tmp_path: Path, tiny_llama: MakeModel) -> list[Path]:
        """Two with heads of their own and one without."""
        for seed in (0, 1):
            stock(tiny_llama(**UNTIED), tmp_path / f"head{seed}", seed, modules_to_save=["lm_head"])
        stock(tiny_llama(**UNTIED), tmp_path / "plain", 2)
        return [tmp_path / name for name in ("head0", "head1", "plain")]

    @pytest.mark.parametrize("order", [(0, 1), (0, 2), (2, 0)])
    @pytest.mark.parametrize("named", [(), ("lm_head",)])
    def test_one_that_needs_other_values_is_refused(
        self, tmp_path: Path, tiny_llama: MakeModel, order: tuple[int, int], named: tuple[str, ...]
    ) -> None:
        folders = self.folders(tmp_path, tiny_llama)
        model = prepared(tiny_llama(**UNTIED), modules_to_save=named)
        qc.load_adapter(model, folders[order[0]], "a")
        qc.set_adapters(model, "a")
        before, keys = logits(model), set(model.state_dict())
        with pytest.raises(AdapterMismatchError, match=r"needs another lm_head.weight than adapter 'a'"):
            qc.load_adapter(model, folders[order[1]], "b")
        assert torch.equal(logits(model), before) and set(model.state_dict()) == keys
        torch.testing.assert_close(before, in_peft(tiny_llama(**UNTIED), folders[order[0]]), rtol=1e-4, atol=1e-5)

    def test_the_same_values_again_and_others_for_the_only_one(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        one, other, _ = self.folders(tmp_path, tiny_llama)
        model = prepared(tiny_llama(**UNTIED))
        qc.load_adapter(model, one, "a")
        qc.load_adapter(model, other, "a")
        assert loaded_in_full(model) == {"lm_head.weight": "a"}
        qc.save_adapter(model, tmp_path / "again", "a")
        qc.load_adapter(model, tmp_path / "again", "b")
        qc.set_adapters(model, "b")
        want = in_peft(tiny_llama(**UNTIED), other)
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)

    def test_what_the_model_trained_counts(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        one, *_ = self.folders(tmp_path, tiny_llama)
        model = prepared(tiny_llama(**UNTIED), modules_to_save=("lm_head",))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        with pytest.raises(AdapterMismatchError, match="than adapter 'default'"):
            qc.load_adapter(model, one, "b")
