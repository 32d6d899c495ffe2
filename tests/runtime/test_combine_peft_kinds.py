"""Adapters that stock peft made with each of its ways to say where they sit: it loads the combination without a loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import AdapterMismatchError, CheckpointError
from qlora_compile.runtime.combine_folders import combine_folders
from qlora_compile.runtime.formats.peft_files import PREFIX, read_adapter, write_adapter

from .stock_peft import in_peft, logits, stock

transformers = pytest.importorskip("transformers")

MakeModel = Callable[..., torch.nn.Module]
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "some layers": (False, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "all but": (False, {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    "regex": (False, {"target_modules": r".*layers\.[02]\..*(q|down)_proj"}),
    "embedding": (False, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding, tied": (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "head, tied": (True, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "parameters": (False, {"target_modules": [], "target_parameters": ["q_proj.weight", "mlp.down_proj.weight"]}),
    "parameters and modules": (
        False,
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"], "rank_pattern": {"q_proj.weight": 2}},
    ),
}


def saved(model: torch.nn.Module, out: Path, seed: int, **options: Any) -> Path:
    stock(model, out, seed, **options)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_computes_the_combination(tmp_path: Path, tiny_llama: MakeModel, kind: str) -> None:
    tied, options = KINDS[kind]
    sizes = {"tie_word_embeddings": tied}
    one, other = (saved(tiny_llama(**sizes), tmp_path / f"ad{seed}", seed, **options) for seed in (0, 1))
    want = in_peft(tiny_llama(**sizes), one)
    combine_folders({str(one): 1.0}, tmp_path / "same")
    close = {"rtol": 1e-4, "atol": 1e-5}  # fp32, sums in another order
    torch.testing.assert_close(in_peft(tiny_llama(**sizes), tmp_path / "same"), want, **close)
    assert (want - logits(tiny_llama(**sizes).eval())).abs().max() > 1e-2

    tiny_llama(**sizes).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    weights = {str(one): 0.7, str(other): -0.2}
    combine_folders(weights, tmp_path / "both")
    qc.export(tmp_path / "base", tmp_path / "folded", weights, verify=True)
    folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(in_peft(tiny_llama(**sizes), tmp_path / "both"), logits(folded), **close)


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[float, float]]] = {
    "a bias, and a layer around it": (
        {"target_modules": ["q_proj"], "bias": "all"}, {"target_modules": ["k_proj", "v_proj"]}, (1, 0.5),
    ),
    "biases of each": (
        {"target_modules": ["q_proj"], "bias": "all"}, {"target_modules": ["k_proj"], "bias": "lora_only"}, (0.7, 0.3),
    ),
    "a module, and a layer around it": (
        {"target_modules": ["q_proj"], "modules_to_save": ["o_proj", "norm"]}, {"target_modules": ["o_proj"]}, (1, -0.5),
    ),
    "a head, and a layer with its base": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, (0.7, -0.2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_full_parameters_inside_of_layers(tmp_path: Path, tiny_llama: MakeModel, kind: str) -> None:
    *options, factors = PAIRS[kind]
    sizes: dict[str, Any] = {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 2}
    folders = [saved(tiny_llama(**sizes), tmp_path / f"ad{i}", i, **given) for i, given in enumerate(options)]
    tiny_llama(**sizes).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    weights = dict(zip(map(str, folders), factors, strict=True))
    if kind == "biases of each":  # k_proj's are in both, the others in one: their weights do not add up
        with pytest.raises(CheckpointError, match=r"bias was trained in full and its weights do not add up to 1"):
            combine_folders(weights, tmp_path / "out")
        files = read_adapter(folders[0])
        kept = {key: tensor for key, tensor in files.tensors.items() if "lora_" in key or ".k_proj." in key}
        write_adapter(folders[0], files.config, kept)
    combine_folders(weights, tmp_path / "out")
    qc.export(tmp_path / "base", tmp_path / "folded", weights, verify=True)
    folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    got = in_peft(tiny_llama(**sizes), tmp_path / "out")
    torch.testing.assert_close(got, logits(folded), rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_another_base_beside_an_adapter_is_refused(tmp_path: Path, tiny_llama: MakeModel) -> None:
    """peft saves an embedding that has an adapter with it; it is not trained, and must be the same for all."""
    options = {"target_modules": ["q_proj", "embed_tokens"]}
    untied = {"tie_word_embeddings": False}
    one = saved(tiny_llama(**untied), tmp_path / "one", 0, **options)
    other = saved(tiny_llama(**untied, seed=5), tmp_path / "other", 1, **options)
    with pytest.raises(AdapterMismatchError, match=r"on different bases: .*embed_tokens\.base_layer\.weight differs"):
        combine_folders({str(one): 0.7, str(other): 0.3}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_as_parameter_and_as_module_is_refused(tmp_path: Path, tiny_llama: MakeModel) -> None:
    one = saved(tiny_llama(), tmp_path / "one", 0, target_modules=["q_proj"])
    other = saved(tiny_llama(), tmp_path / "other", 1, target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(AdapterMismatchError, match="q_proj is adapted as a module and by target_parameters"):
        combine_folders({str(one): 0.7, str(other): 0.3}, tmp_path / "out")


def test_names_of_parameters_are_checked(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}q_proj.lora_A.weight": torch.ones(3, 7), f"{PREFIX}q_proj.lora_B.weight": torch.ones(5, 3)}
    for number, bad in enumerate(([3], "q_proj.weight", {"q_proj.weight": 1})):
        config = {"peft_type": "LORA", "r": 3, "target_parameters": bad}
        folder = write_adapter(tmp_path / str(number), json.loads(json.dumps(config)), tensors)
        with pytest.raises(CheckpointError, match=r"target_parameters is .*, not a list of names"):
            read_adapter(folder)
