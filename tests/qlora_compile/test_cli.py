"""The command line: options map to configurations, errors are one sentence with an exit code, answers are readable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile import cli, cli_app, cli_doctor
from qlora_compile.errors import CheckpointError, ConfigError

COMMANDS = ("finetune", "export", "combine", "inspect", "estimate", "doctor")
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards mix a jug of bad liquor\n\n"


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on standard error; standard output stays empty."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return path


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    example = getattr(cli_app, command).__doc__.split("Example: qlora-compile ")[1].split()
    assert f"Example: qlora-compile {command}" in words
    assert example[0] == command
    assert all(option in words for option in example if option.startswith("--"))


def test_help_of_all_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qlora-compile 0.")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("finetune --modell a", "No such option '--modell': did you mean '--model'?"),
        ("finetune --model a --data b", "Missing option '--out'"),
        ("finetune --model a --data b --out c --r many", "'--r'"),
        ("finetune --model a --data b --out c --r -3", "r must be a rank of 0"),
        ("finetune --model a --data b --out c --r 0", "no adapters to train"),
        ("finetune --model a --data b --out c --target-modules (q_proj", "not a regular expression"),
        ("finetune --model a --data b --out c --schedule step", "schedule must be one of cosine"),
        ("finetune --model a --data b --out c --steps 3 --epochs 2", "--steps and --epochs"),
        ("finetune --model a --data b --out c --rank-pattern q_proj", "--rank-pattern takes NAME=NUMBER, got 'q_proj'"),
        ("finetune --model a --data b --out c --rank-pattern q_proj=x", "--rank-pattern takes NAME=NUMBER"),
        ("finetune --model a --data b --out c --quant-type int4", "quant_type must be one of nf4, fp4"),
        ("finetune --model a --data b --out c --compute-dtype int8", "compute_dtype must be one of"),
        ("finetun", "Did you mean 'finetune'?"),
        ("export --base a --adapter b", "Missing option '--out'"),
        ("export --base a --adapter b=x --out c", "--adapter takes NAME=NUMBER"),
        ("export --base a --adapter b=1 --adapter b=2 --out c", "--adapter names 'b' twice"),
        ("inspect --model a --block-size 48", "block_size must be one of"),
        ("doctor --jsn", "did you mean '--json'?"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(
    line: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    assert words in _error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert "finetune" in printed.out + printed.err and "error" not in printed.err


# Errors of a run


@pytest.mark.parametrize(
    ("raised", "exit_code", "sentence"),
    [
        (CheckpointError("The adapter 'x'\nis truncated."), 1, "The adapter 'x' is truncated."),
        (ConfigError("r must be 1."), 2, "r must be 1."),
        (OSError(28, "No space left on device", "out/adapter"), 1, "No space left on device: out/adapter"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory; a smaller --batch or --seq-len needs less."),
        (KeyboardInterrupt(), 1, "interrupted."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_of_a_run_are_one_sentence(
    raised: BaseException,
    exit_code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_doctor, "examine", _raiser(raised))
    assert cli.main(["doctor"]) == exit_code
    assert sentence in _error(capsys)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_doctor, "examine", _raiser(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def _raiser(error: BaseException) -> Any:
    def examine() -> None:
        raise error

    return examine


def test_the_installed_script_ends_with_the_exit_code() -> None:
    script = Path(sys.executable).with_name("qlora-compile")
    assert script.exists()
    run = subprocess.run([script, "export", "--bse", "x"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "error: No such option '--bse': did you mean '--base'?\n"


# Whole commands, on a tiny model


def test_doctor_as_json_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backend_registered"] is True
    assert set(found["kernels"]["cpu"]) == {"quantize_4bit", "dequantize_4bit"}
    chosen = found["chosen"]["cpu"]
    assert set(chosen) == set(cli_doctor.TYPICAL)
    assert chosen["its backward"].split()[0] in ("library_gemm", "fp32_gemm", "fused_fp32")
    assert cli.main(["doctor"]) == code
    assert f"torch {torch.__version__}" in " ".join(capsys.readouterr().out.split())


def test_doctor_names_what_is_too_old() -> None:
    assert cli_doctor._too_old({"transformers": "5.3.0", "torch": "2.13.0+cpu", "triton": None, "gguf": "0.19.0"}) == [
        "transformers 5.3.0 was not tried, transformers>=5.23 is needed: some of it may not work. "
        "pip install 'transformers>=5.23'."
    ]


def test_doctor_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_compile.runtime import kernels

    monkeypatch.setattr(cli_doctor, "_compiler", lambda: None)
    monkeypatch.setattr(cli_doctor, "_version", lambda package: None)
    monkeypatch.setattr(kernels, "find", lambda op, kind: None)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "install g++ or clang++" in printed
    assert "pip install 'qlora-compile[gguf]'" in printed
    assert "plain torch" in printed


def test_inspect_as_json_and_as_text(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"inspect --model {tiny_checkpoint} --target-modules q_proj,down_proj --r 5"
    assert cli.main([*line.split(), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["linears"]) == 3 * 2  # layers times targets
    assert {linear["rank"]["default"] for linear in answer["linears"]} == {5}
    assert {one["name"]: one["rewrites"] for one in answer["passes"]}["quantize_weights"] == 6
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0…2 ×3" in printed and "self_attn.q_proj" in printed


def test_inspect_without_a_target_lists_what_there_is(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", "--model", str(tiny_checkpoint), "--target-modules", "c_attn"]) == 2
    assert "q_proj" in _error(capsys)


def test_finetune_then_export(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    options = "--steps 3 --seq-len 24 --batch 2 --r 3 --lr 1e-2 --no-compile --json"
    line = f"finetune --model {tiny_checkpoint} --data {data} --eval-data {data} --out {run} {options}"
    assert cli.main(line.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == 3 and len(answer["losses"]) == 3
    assert answer["perplexity"] < answer["perplexity_quantized"]
    assert Path(answer["adapter"]) == run / "adapter"
    assert {"adapter", "metrics.jsonl", "run.json"} <= {path.name for path in run.iterdir()}

    line = f"export --base {tiny_checkpoint} --adapter {run}/adapter=1.0 --out {merged} --verify --report --json"
    assert cli.main(line.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["folded"] == len(answer["layers"]) == 3 * 7  # layers times linears of each
    assert answer["verification"] is not None

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(merged).config.vocab_size == 211


def test_finetune_prints_a_table_for_people(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        f"finetune --model {tiny_checkpoint} --data {data} --out {tmp_path / 'run'} --steps 2 --seq-len 16 --no-compile"
    )
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr()
    assert "at first" in printed.out and str(tmp_path / "run" / "adapter") in printed.out
    assert "perplexity" not in printed.out  # without --eval-data there is none to show
    assert "step 2/2" in printed.err  # progress is not part of the answer


@pytest.mark.parametrize("missing", ["model", "data"])
def test_missing_input_is_one_sentence_and_leaves_nothing(
    missing: str, tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"model": tiny_checkpoint, "data": data} | {missing: tmp_path / "nowhere"}
    line = f"finetune --model {paths['model']} --data {paths['data']} --out {tmp_path / 'run'} --no-compile"
    assert cli.main(line.split()) in (1, 2)
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert "nowhere" in printed.err.splitlines()[-1] and printed.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_export_into_a_full_folder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert cli.main(["export", "--base", str(tiny_checkpoint), "--adapter", "none", "--out", str(tmp_path)]) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = f"finetune --model {tiny_checkpoint} --data {data} --out {run} --steps 4000 --seq-len 16 --no-compile"
    command = [sys.executable, "-m", "qlora_compile.cli", *line.split(), "--save-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_a_step(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and str(run / "checkpoints") in last

    done = [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()][-1]
    capsys.readouterr()
    assert cli.main([*line.replace("4000", str(done + 2)).split(), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == done + 2


def _wait_for_a_step(metrics: Path, process: subprocess.Popen[str]) -> None:
    """Until the first line of the log: the model is loaded and a step is done. At most two minutes."""
    for _ in range(1200):
        if metrics.exists() and metrics.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    raise AssertionError("no step was logged in two minutes")


def test_what_takes_long_is_shown_on_a_terminal_and_nowhere_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_compile.cli_common import waiting

    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
        with waiting("tracing"):
            print("an answer")
        out, err = capsys.readouterr()
        assert out == "an answer\n" and ("tracing" in err) == terminal
        assert ("\x1b[?25h" in err) == terminal  # the cursor is back
