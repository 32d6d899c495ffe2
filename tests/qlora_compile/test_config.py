"""QLoRAConfig: every value is checked, options round-trip, and name patterns mean what PEFT's mean."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_compile import QLoRAConfig
from qlora_compile.config import COMPUTE_DTYPES, parse_dtype
from qlora_compile.errors import ConfigError, QLoRACompileError, UnknownOptionError

# Names of the shapes that real models have: nested, numbered, with shared endings.
NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.seq_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.mlp.experts.3.down_proj",
    "transformer.h.0.attn.c_attn",
    "lm_head",
]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": -1}, "r must be a rank of 0"),
        ({"r": 2.0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a finite number"),
        ({"lora_alpha": "32"}, "lora_alpha must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a probability"),
        ({"lora_dropout": -0.1}, "lora_dropout must be"),
        ({"lora_dropout": math.nan}, "lora_dropout must be"),
        ({"use_rslora": 1}, "use_rslora must be True or False"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"rank_pattern": {"q_proj": -2}}, "rank_pattern['q_proj'] must be"),
        ({"rank_pattern": {"q_proj": 1.0}}, "rank_pattern['q_proj'] must be"),
        ({"rank_pattern": {"(q_proj": 4}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj'] must be"),
        ({"alpha_pattern": {"[": 4.0}}, "not a regular expression"),
        ({"target_modules": "(q_proj"}, "target_modules holds '(q_proj', which is not a regular expression"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": ""}, "target_modules must be"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be a list of module names"),
        ({"target_modules": ["q_proj", ""]}, "target_modules must be a list of module names"),
        ({"target_modules": 7}, "target_modules must be a list of module names"),
        ({"exclude_modules": "*"}, "exclude_modules holds '*'"),
        ({"exclude_modules": [None]}, "exclude_modules must be"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"quantize": "yes"}, "quantize must be one of"),
        ({"quant_type": "int4"}, "quant_type must be one of nf4, fp4"),
        ({"block_size": 48}, "block_size must be one of 32, 64"),
        ({"block_size": "64"}, "block_size must be one of"),
        ({"double_quant": None}, "double_quant must be True or False"),
        ({"keep_logits": "no"}, "keep_logits must be True or False"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of"),
        ({"compute_dtype": torch.float64}, "compute_dtype must be one of"),
        ({"adapter_dtype": None}, "adapter_dtype must be one of"),
        ({"activation_budget": 1.01}, "activation_budget must be a fraction"),
        ({"activation_budget": -0.5}, "activation_budget must be a fraction"),
        ({"outline_layers": "maybe"}, "outline_layers must be one of 'auto', True, False"),
        ({"lowering": "onnx"}, "lowering must be one of inductor"),
        ({"dump_dir": 3}, "dump_dir must be"),
        ({"rank_pattern": 3}, "rank_pattern must be"),
    ],
)
def test_bad_value_is_one_sentence_that_names_it(options: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QLoRAConfig.from_options(options)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".")
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, (ValueError, QLoRACompileError))


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(QLoRAConfig)))
def test_every_field_refuses_a_value_of_no_use(name: str) -> None:
    """A field that is added without a check fails here: no field takes an arbitrary object."""
    with pytest.raises(ConfigError, match=name):
        QLoRAConfig.from_options({name: object()})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lora_alfa", "lora_alpha"), ("blocksize", "block_size"), ("target_module", "target_modules"), ("rank", None)],
)
def test_unknown_option_suggests_the_nearest(wrong: str, right: str | None) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        QLoRAConfig.from_options({"r": 4, wrong: 1})
    message = str(caught.value)
    assert repr(wrong) in message
    if right is not None:
        assert f"did you mean {right!r}?" in message


def test_unknown_option_that_is_near_to_none_lists_all() -> None:
    with pytest.raises(UnknownOptionError, match=r"known: .*lora_alpha.*target_modules"):
        QLoRAConfig.from_options({"zzzzzz": 1})


def test_from_options_takes_nothing_a_mapping_or_a_config() -> None:
    config = QLoRAConfig(r=3)
    assert QLoRAConfig.from_options(config) is config
    assert QLoRAConfig.from_options(None) == QLoRAConfig.from_options({}) == QLoRAConfig()
    assert QLoRAConfig.from_options({"r": 3}) == config


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QLoRAConfig().r = 3  # type: ignore[misc]


def test_equal_choices_are_equal_configs() -> None:
    """A list, a set and a tuple of targets are one choice; their order is not a choice (the files stay the same)."""
    a = QLoRAConfig(target_modules=["v_proj", "q_proj"], compute_dtype="bf16")  # type: ignore[arg-type]
    b = QLoRAConfig(target_modules={"q_proj", "v_proj"}, compute_dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert a == b
    assert a.target_modules == ("q_proj", "v_proj")


def test_a_mapping_is_copied() -> None:
    pattern = {"q_proj": 3}
    config = QLoRAConfig(rank_pattern=pattern)
    pattern["q_proj"] = 5
    assert config.rank_for("q_proj") == 3


CONFIGS = st.builds(
    QLoRAConfig,
    r=st.integers(0, 512),
    lora_alpha=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-4, 4096),
    lora_dropout=st.floats(0, 0.99),
    use_rslora=st.booleans(),
    init_lora_weights=st.sampled_from([True, False, "gaussian", "pissa", "pissa_niter_4", "olora"]),
    target_modules=st.just("all-linear") | st.lists(st.sampled_from(NAMES), min_size=1),
    exclude_modules=st.none() | st.lists(st.sampled_from(NAMES)) | st.just(r".*mlp.*"),
    quantize=st.sampled_from(["auto", True, False]),
    seed=st.integers(0, 2**63 - 1),
    rank_pattern=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 64)),
    alpha_pattern=st.dictionaries(st.sampled_from(NAMES), st.floats(-8, 8)),
    modules_to_save=st.none() | st.lists(st.sampled_from(NAMES)),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 4096]),
    double_quant=st.booleans(),
    compute_dtype=st.sampled_from([*COMPUTE_DTYPES, *COMPUTE_DTYPES.values()]),
    activation_budget=st.floats(0, 1),
    outline_layers=st.sampled_from(["auto", True, False]),
    lowering=st.sampled_from(["inductor", "aot_eager", "eager"]),
)


@given(CONFIGS)
def test_to_dict_is_json_and_round_trips(config: QLoRAConfig) -> None:
    assert QLoRAConfig.from_options(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_parse_dtype(value: torch.dtype | str, dtype: torch.dtype) -> None:
    assert parse_dtype(value) is dtype


def test_scaling_is_alpha_over_r_or_its_root_with_the_module_s_own_numbers() -> None:
    options = {"r": 8, "lora_alpha": 12, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 10, "mlp": 7}}
    plain, rslora = QLoRAConfig(**options), QLoRAConfig(**options, use_rslora=True)  # type: ignore[arg-type]
    assert plain.scaling_for("a.q_proj") == 1.5
    assert plain.scaling_for("a.v_proj") == 2.5
    assert rslora.scaling_for("a.q_proj") == 12 / math.sqrt(8)
    assert rslora.scaling_for("a.v_proj") == 5.0
    assert plain.scaling_for("a.mlp") == 7 / 8


def test_rank_zero_has_no_scaling() -> None:
    config = QLoRAConfig(r=8, rank_pattern={"v_proj": 0})
    assert config.rank_for("layers.0.v_proj") == 0
    assert config.scaling_for("layers.0.v_proj") == 0.0


PATTERNS = [
    {"q_proj": 3},
    {"self_attn.q_proj": 3, "q_proj": 5},
    {"q_proj": 5, "self_attn.q_proj": 3},
    {r"layers\.1\..*": 3},
    {r"layers.1": 3},
    {r".*layers\.(0|11)\..*q_proj": 7},
    {"proj": 2},
    {"down_proj|lm_head": 9},
    {"model.layers.1.mlp.down_proj": 4},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_hit_what_peft_s_hit(pattern: dict[str, int]) -> None:
    peft_utils = pytest.importorskip("peft.utils.other")
    ours = QLoRAConfig(r=16, lora_alpha=32, rank_pattern=pattern, alpha_pattern=pattern)
    for name in NAMES:
        theirs = pattern.get(peft_utils.get_pattern_key(pattern.keys(), name), 16)
        assert ours.rank_for(name) == theirs, name
        alpha = pattern.get(peft_utils.get_pattern_key(pattern.keys(), name), 32)
        assert ours.scaling_for(name) == alpha / theirs, name


TARGETS = [
    ["q_proj"],
    ["self_attn.q_proj", "down_proj"],
    ["proj"],
    ["model.layers.1.mlp.down_proj", "lm_head"],
    "q_proj",
    r".*\.q_proj",
    r"model\.layers\.1\..*",
    r".*(q_proj|c_attn)",
]


@pytest.mark.parametrize("exclude", [None, ["layers.1.self_attn.q_proj"], ["lm_head"], r".*\.1\..*"], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_are_those_of_peft(target: str | list[str], exclude: str | list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(target_modules=target, exclude_modules=exclude)
    ours = QLoRAConfig(target_modules=target, exclude_modules=exclude)  # type: ignore[arg-type]
    hits = [name for name in NAMES if check_target_module_exists(theirs, name)]
    assert [name for name in NAMES if ours.is_target(name) and not ours.is_excluded(name)] == hits


def test_output_head_is_excluded_unless_asked_for() -> None:
    assert QLoRAConfig().is_excluded("lm_head", is_output_head=True)
    assert not QLoRAConfig().is_excluded("model.q_proj", is_output_head=False)
    assert not QLoRAConfig(exclude_modules=()).is_excluded("lm_head", is_output_head=True)
    assert not QLoRAConfig(target_modules=("lm_head",)).is_excluded("lm_head", is_output_head=True)
    assert QLoRAConfig(exclude_modules=("mlp",)).is_excluded("layers.0.mlp")


def test_all_linear_targets_every_name() -> None:
    assert all(QLoRAConfig().is_target(name) for name in NAMES)
