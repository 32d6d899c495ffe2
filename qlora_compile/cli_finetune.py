"""`qlora-compile finetune`: options -> `FinetuneConfig` -> a trained adapter and one answer on standard output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import import_torch, modules_option, pairs_option, print_json, print_table
from .errors import ConfigError

if TYPE_CHECKING:
    from .runtime.finetune import FinetuneResult
    from .runtime.finetune_config import FinetuneConfig


def _adapter(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Adapters")


def _quantization(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Quantization and compilation")


def _length(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Length and batches")


def _rate(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Optimizer")


def _run(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Evaluation and checkpoints")


MODULES = "names or suffixes with commas, or a regular expression"
# Option -> field of QLoRAConfig, where the names differ.
ADAPTER_FIELDS = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
QLORA_OPTIONS = (
    "r",
    "use_rslora",
    "quant_type",
    "block_size",
    "double_quant",
    "dense_modules",
    "compute_dtype",
    "lowering",
    "seed",
    "activation_budget",
    "keep_logits",
)


def finetune(
    model: Annotated[Path, typer.Option(help="Hugging Face folder, or a GGUF file.")],
    data: Annotated[Path, typer.Option(help=".txt or .jsonl (text, messages, prompt + completion), or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the results: new or empty; with --resume a run's.")],
    eval_data: Annotated[Path | None, _run("Held-out data: perplexity before and after.")] = None,
    r: Annotated[int, _adapter("Rank of the adapters.")] = 16,
    alpha: Annotated[float, _adapter("Scaling is alpha / r.")] = 32,
    dropout: Annotated[float, _adapter("Dropout before lora_A.")] = 0.0,
    use_rslora: Annotated[bool, _adapter("Scale by alpha / sqrt(r).")] = False,
    target_modules: Annotated[str, _adapter(f"Layers to train: all-linear, {MODULES}.")] = "all-linear",
    exclude_modules: Annotated[str | None, _adapter(f"Layers to leave as they are: {MODULES}.")] = None,
    modules_to_save: Annotated[str | None, _adapter("Modules to train in full: names with commas.")] = None,
    init: Annotated[str, _adapter("Start: default, gaussian, pissa, pissa_niter_N, olora, loftq.")] = "default",
    rank_pattern: Annotated[list[str] | None, _adapter("NAME=R, a rank of its own; repeatable.")] = None,
    alpha_pattern: Annotated[list[str] | None, _adapter("NAME=ALPHA, an alpha of its own; repeatable.")] = None,
    quant_type: Annotated[str, _quantization("nf4 or fp4.")] = "nf4",
    block_size: Annotated[int, _quantization("Weights per scale, 32 to 4096.")] = 64,
    double_quant: Annotated[bool, _quantization("Quantize the scales too.")] = True,
    dense_layers: Annotated[
        str | None, _quantization(f"Layers whose weight stays dense: auto (with --bits), {MODULES}.")
    ] = None,
    bits: Annotated[float | None, _quantization("With --dense-layers auto: bits a weight in all.")] = None,
    compute_dtype: Annotated[str, _quantization("bfloat16, float16 or float32.")] = "bfloat16",
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the training step.")] = True,
    lowering: Annotated[str, _quantization("inductor, aot_eager or eager.")] = "inductor",
    activation_budget: Annotated[float, _quantization("Share of activations to keep; less recomputes.")] = 1.0,
    keep_logits: Annotated[bool, _quantization("Hold all logits instead of chunks of them in the loss.")] = False,
    steps: Annotated[int | None, _length("Optimizer steps; not with --epochs.")] = None,
    epochs: Annotated[float | None, _length("Passes over the data (1 if neither is given).")] = None,
    batch: Annotated[int, _length("Sequences per micro-batch.")] = 1,
    grad_accum: Annotated[int, _length("Micro-batches per step.")] = 1,
    seq_len: Annotated[int, _length("Tokens per sequence.")] = 512,
    lr: Annotated[float, _rate("Highest learning rate.")] = 2e-4,
    schedule: Annotated[str, _rate("cosine, linear or constant.")] = "cosine",
    warmup: Annotated[float, _rate("Steps, or below 1 a fraction of all steps.")] = 0.03,
    weight_decay: Annotated[float, _rate("Weight decay of what is trained.")] = 0.0,
    max_grad_norm: Annotated[float, _rate("Clip the gradient norm; 0: off.")] = 0.3,
    optimizer: Annotated[str, _rate("adamw, paged_adamw, paged_adamw8bit or paged_lion.")] = "adamw",
    optimizer_budget: Annotated[
        str | None, _rate("Most optimizer state on the device, as 2GiB; all if not given.")
    ] = None,
    optimizer_folder: Annotated[Path | None, _rate("Keep the rest in a file here, not in RAM.")] = None,
    step_in_backward: Annotated[
        bool, _rate("Paged ones: update in the backward pass; with --max-grad-norm 0.")
    ] = False,
    memory_budget: Annotated[
        str | None, _length("Most device memory of a step, as 16GiB: what does not fit is split.")
    ] = None,
    seed: Annotated[int, _rate("Adapters, data order and dropout.")] = 0,
    eval_every: Annotated[int, _run("Steps between evaluations; 0: before and after only.")] = 0,
    eval_batches: Annotated[int | None, _run("Evaluate on so many batches only.")] = None,
    save_every: Annotated[int, _run("Steps between checkpoints; 0: only when interrupted.")] = 100,
    keep_last: Annotated[int, _run("Checkpoints to keep.")] = 2,
    resume: Annotated[bool, _run("Go on from the newest checkpoint in --out.")] = False,
    resume_from: Annotated[Path | None, _run("Go on from this checkpoint folder.")] = None,
    tensorboard: Annotated[Path | None, _run("Write TensorBoard's files into a folder of this one.")] = None,
    posthog: Annotated[
        str | None, _run("Address of a PostHog server to tell of start, evaluations, end (key: POSTHOG_API_KEY).")
    ] = None,
    dtype: Annotated[str | None, _quantization("Of the dense parts (as --compute-dtype if not given).")] = None,
    device: Annotated[str | None, _quantization("cpu or cuda (CUDA where there is one if not given).")] = None,
    fsdp: Annotated[bool, _run("Under torchrun: split the weights too, not the data alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train adapters on a 4-bit base model; writes OUT/adapter, OUT/metrics.jsonl, OUT/run.json, OUT/checkpoints.

    Example: qlora-compile finetune --model ./SmolLM2-135M --data speeches.txt --out run --steps 200 --batch 2

    On several GPUs: torchrun --nproc-per-node 8 -m -- qlora_compile.cli finetune --fsdp ...
    """
    options = dict(locals())
    import_torch()
    config = finetune_config(options)
    from .runtime.finetune import finetune as run
    from .runtime.host_memory import keep_freed_memory

    keep_freed_memory()
    result = run(config)
    if os.environ.get("RANK", "0") != "0":
        return  # of the processes of one run, the first answers
    if as_json:
        print_json(result.to_dict())
    else:
        print_table(_rows(result))


def _rows(result: FinetuneResult) -> list[tuple[str, object]]:
    """What a person wants to know after a run; the rest is in run.json."""
    losses = [loss for loss in result.losses if loss is not None]
    perplexities = {
        "dense model": result.perplexity_dense,
        "4-bit model": result.perplexity_quantized,
        "4-bit model with adapters": result.perplexity,
    }
    return [
        ("steps", result.steps),
        ("skipped steps", result.skipped_steps or None),
        ("loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last" if losses else None),
        *((f"perplexity, {name}", value and f"{value:.2f}") for name, value in perplexities.items()),
        ("tokens/s", f"{result.tokens_per_s:.0f}"),
        ("seconds", f"{result.seconds:.0f}"),
        ("adapter", result.adapter),
    ]


def finetune_config(options: dict[str, Any]) -> FinetuneConfig:
    """The command's parameters by name -> FinetuneConfig. Raises ConfigError."""
    from .config import QLoRAConfig
    from .runtime.finetune_config import FinetuneConfig

    options = dict(options)
    del options["as_json"]
    options["dense_bits"], options["dense_modules"] = dense_options(options.pop("dense_layers"), options.pop("bits"))
    qlora = {name: options.pop(name) for name in QLORA_OPTIONS}
    qlora |= {field: options.pop(name) for name, field in ADAPTER_FIELDS.items()}
    for name in ("target_modules", "exclude_modules"):
        text = options.pop(name)
        qlora[name] = None if text is None else modules_option(text)
    init = options.pop("init")
    qlora["init_lora_weights"] = True if init == "default" else init
    names = options.pop("modules_to_save")
    qlora["modules_to_save"] = tuple(name for name in (names or "").split(",") if name)
    qlora["rank_pattern"] = pairs_option("--rank-pattern", options.pop("rank_pattern") or (), int)
    qlora["alpha_pattern"] = pairs_option("--alpha-pattern", options.pop("alpha_pattern") or (), float)
    if options["steps"] is not None and options["epochs"] is not None:
        raise ConfigError("--steps and --epochs both set the length of the run: give one of them.")
    if options["epochs"] is None:
        del options["epochs"]
    options["compile"] = options.pop("compile_")
    options["resume"] = options.pop("resume_from") or options["resume"]
    return FinetuneConfig(**options, qlora=QLoRAConfig(**qlora), seed=qlora["seed"])


def dense_options(layers: str | None, bits: float | None) -> tuple[float | None, str | tuple[str, ...]]:
    """`--dense-layers` and `--bits` -> `dense_bits` and `dense_modules`. Raises ConfigError where one lacks the other."""
    if (layers == "auto") != (bits is not None):
        raise ConfigError("--dense-layers auto and --bits go together: the budget says how many layers stay dense.")
    return bits, () if layers in (None, "auto") else modules_option(str(layers))
