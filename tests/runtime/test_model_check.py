"""Models that do not predict the next token are refused before a run begins, and so are sequences beyond their positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from qlora_compile.errors import ConfigError
from qlora_compile.positions import most_positions
from qlora_compile.runtime.model_check import check_model_reads

SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}
SPECIAL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MPT = {"d_model": 48, "n_heads": 3, "n_layers": 2, "max_seq_len": 32}
BART = {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 80}


def model(config: type[t.PreTrainedConfig], **options: Any) -> Any:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config(**SPECIAL | options)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (t.LlamaConfig, SIZES),
        (t.BertConfig, SIZES | {"is_decoder": True}),
        (t.MixtralConfig, SIZES | {"num_key_value_heads": 3, "num_local_experts": 4, "output_router_logits": True}),
        (t.MambaConfig, {"hidden_size": 48, "num_hidden_layers": 2}),
        (t.MptConfig, MPT),
    ],
)
def test_models_that_predict_the_next_token_pass(
    config: type[t.PreTrainedConfig], options: dict[str, Any], dtype: torch.dtype
) -> None:
    found = model(config, **options).to(dtype)
    check_model_reads(found, 16)
    check_model_reads(found, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [t.BertConfig, t.RobertaConfig])
def test_a_model_that_sees_what_it_is_to_predict(config: type[t.PreTrainedConfig], dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"sees the tokens that it is to predict.*is_decoder"):
        check_model_reads(model(config, **SIZES).to(dtype), 16)


def test_a_model_whose_labels_are_of_the_same_token() -> None:
    with pytest.raises(ConfigError, match="labels of BartForCausalLM are those of the same token"):
        check_model_reads(model(t.BartConfig, is_encoder_decoder=False, is_decoder=True, **BART), 16)


def test_a_loss_that_routers_add_is_no_sign() -> None:
    options = SIZES | {
        "num_key_value_heads": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
    }
    for seed in range(8):
        torch.manual_seed(seed)
        config = t.OlmoeConfig(**SPECIAL | options, output_router_logits=True)
        check_model_reads(t.AutoModelForCausalLM.from_config(config).eval(), 16)


@pytest.mark.parametrize(
    ("config", "options", "most"),
    [
        (t.LlamaConfig, SIZES | {"max_position_embeddings": 64}, 64),
        (t.GPT2Config, {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 24}, 24),
        (t.MptConfig, MPT, 32),
        (t.RobertaConfig, SIZES | {"max_position_embeddings": 40, "is_decoder": True, "pad_token_id": 1}, 38),
        (t.BertConfig, SIZES | {"max_position_embeddings": 40, "is_decoder": True}, 40),
        (t.XLNetConfig, {"d_model": 48, "n_layer": 2, "n_head": 3, "d_inner": 80}, None),
        (t.MambaConfig, {"hidden_size": 48, "num_hidden_layers": 2}, None),
    ],
)
def test_how_many_positions_a_model_has(
    config: type[t.PreTrainedConfig], options: dict[str, Any], most: int | None
) -> None:
    found = model(config, **options)
    assert most_positions(found) == most
    if most is not None:
        found(input_ids=torch.ones(1, most, dtype=torch.long) + 1)  # the longest sequence is one that it takes
        with pytest.raises(
            ConfigError, match=rf"seq_len is {most + 1}, .* at most {most} tokens: give --seq-len {most}"
        ):
            check_model_reads(found, most + 1)


def test_positions_of_a_model_that_reads_images_too() -> None:
    text = SIZES | SPECIAL | {"max_position_embeddings": 64, "num_key_value_heads": 3, "head_dim": 16}
    vision = SIZES | {"image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        found = t.AutoModelForCausalLM.from_config(t.Gemma3Config(text_config=text, vision_config=vision))
    assert most_positions(found) == 64
