"""Entries of a configuration that name nothing are told, each with why; `prepare` and the backend say the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import ConfigError, NoTargetError

pytest.importorskip("transformers")
BASE = {"r": 3, "lowering": "eager"}
IDS = torch.arange(22).reshape(2, 11)

CHOICES = {
    "a typing error": (
        {"target_modules": ["q_proj", "v_porj"]},
        r"'v_porj', .*no linear layer .*did you mean 'v_proj'",
    ),
    "a tied head": (
        {"target_modules": ["q_proj", "lm_head"]},
        r"'lm_head', where no adapter goes: .*tied to the embedding",
    ),
    "a rank": ({"rank_pattern": {"dwon_proj": 2}}, r"rank_pattern names 'dwon_proj', .*did you mean 'down_proj'"),
    "an alpha": ({"alpha_pattern": {"norm": 2}}, r"alpha_pattern names 'norm', where .*has 1 dimensions"),
    "an exclusion": (
        {"exclude_modules": ["self_attn"]},
        r"exclude_modules names 'self_attn', which is no linear layer",
    ),
    "dense": (
        {"target_modules": ["q_proj"], "dense_modules": ["v_proj"]},
        r"'v_proj', where .*v_proj stays as it is \(target_modules does not name it\)",
    ),
    "a dense expression": ({"dense_modules": "q_proj"}, r"dense_modules names 'q_proj', which is no linear layer"),
}


def by_prepare(model: Any, options: dict[str, Any]) -> None:
    qc.prepare(model, options)


def by_tracing(model: Any, options: dict[str, Any]) -> None:
    qc.prepare(model, options, example_inputs={"input_ids": IDS})


def by_the_backend(model: Any, options: dict[str, Any]) -> None:
    torch.compile(model, backend="qlora", options=options)(input_ids=IDS)


def told(door: Callable[..., None], model: Any, options: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        door(model, BASE | options)
    return [str(w.message) for w in found if "has no effect" in str(w.message)]


@pytest.mark.parametrize(("options", "words"), CHOICES.values(), ids=CHOICES)
def test_an_entry_without_effect_is_told(tiny_llama: Callable[..., Any], options: dict[str, Any], words: str) -> None:
    (said,) = told(by_prepare, tiny_llama(num_hidden_layers=1), options)
    assert re.search(words, said)


@pytest.mark.parametrize("door", [by_tracing, by_the_backend])
def test_the_other_doors_say_the_same(tiny_llama: Callable[..., Any], door: Callable[..., None]) -> None:
    options = {"target_modules": ["q_proj", "v_porj"], "rank_pattern": {"up_proj": 2}}
    said = told(by_prepare, tiny_llama(num_hidden_layers=1), options)
    assert len(said) == 2 and "v_porj" in said[0] and "target_modules does not name it" in said[1]
    assert told(door, tiny_llama(num_hidden_layers=1), options) == said


def test_entries_with_an_effect_are_not_told(tiny_llama: Callable[..., Any]) -> None:
    options = {
        "target_modules": ["q_proj", "layers.0.mlp.down_proj"],
        "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"down_proj": 2},
        "exclude_modules": ["v_proj", "lm_head"],
        "dense_modules": ["q_proj"],
        "modules_to_save": ["norm"],
    }
    assert told(by_prepare, tiny_llama(num_hidden_layers=1), options) == []


@pytest.mark.parametrize("door", [by_prepare, by_tracing, by_the_backend])
def test_a_module_to_save_that_is_none_is_refused(tiny_llama: Callable[..., Any], door: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save names 'scores', but LlamaForCausalLM has no such module"):
        door(tiny_llama(num_hidden_layers=1), BASE | {"modules_to_save": ["scores"]})


def test_a_name_as_a_regular_expression_gets_a_hint(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(NoTargetError, match=r"target_modules='q_proj' .*did you mean \['q_proj'\]\?"):
        qc.prepare(tiny_llama(num_hidden_layers=1), BASE | {"target_modules": "q_proj"})


def test_configurations_of_others_are_refused_with_the_way_out(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"got list: write QLoRAConfig\(r=16\)"):
        qc.prepare(tiny_llama(num_hidden_layers=1), [("r", 3)])
    peft = pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"got LoraConfig: .*get_peft_model"):
        qc.prepare(tiny_llama(num_hidden_layers=1), peft.LoraConfig(r=3))
