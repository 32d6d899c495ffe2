"""`qlora-compile inspect` on a configuration alone: stages, differences, modules and every file format."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import networkx as nx
import pytest

import qlora_compile as qc
from qlora_compile import cli
from qlora_compile.cli_inspect import _kernel_source, config_report, rendered
from qlora_compile.errors import UnknownOptionError
from qlora_compile.report import CompileReport
from qlora_compile.runtime.kernels import source_name


@pytest.fixture(scope="module")
def config_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json alone, of a model with six layers: no weight stands beside it."""
    folder = tmp_path_factory.mktemp("config")
    path = shutil.copy(tiny_checkpoint / "config.json", folder / "config.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_hidden_layers": 6}))
    return path


@pytest.fixture(scope="module")
def report(config_file: Path) -> CompileReport:
    """One trace for all that only renders it."""
    return config_report(config_file, qc.QLoRAConfig(r=3), 1, 24)


def _run(capsys: pytest.CaptureFixture[str], *line: object) -> str:
    assert cli.main(["inspect", *map(str, line), "--seq-len", "24", "--r", "3"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_config_alone_as_text_and_as_stages(
    report: CompileReport, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _run(capsys, config_file)
    assert "model.layers.0…5 ×6" in text and "traced 3 of 6 layers of model.layers" in text
    assert "q_proj + k_proj + v_proj" in text and "one training step" in text
    diff = rendered(report, "text", None, ("input", "group_linears"), None, wide=True)
    (row,) = [line for line in diff.splitlines() if "model.layers.*.mlp.gate_proj" in line]
    assert "- linear ×6" in row and "+ qlora.lora_linear ×6" in diff
    assert len(diff.splitlines()) < 60  # by module, not by node
    stage = rendered(report, "text", "backward", None, "mlp", wide=True)
    assert "model.layers.0…5 ×6.mlp" in stage and "self_attn" not in stage


def test_formats(report: CompileReport, config_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "graphs" / "g"
    assert _run(capsys, config_file, "--stage", "group_linears", "--format", "svg", "--out", out) == ""
    kinds = ("graphml", "dot", "json", "svg", "python")
    found = {kind: rendered(report, kind, "group_linears", None, None, wide=True) for kind in kinds}
    assert out.read_text() == found["svg"]
    graph = nx.parse_graphml(found["graphml"])
    assert nx.is_directed_acyclic_graph(graph)
    ops = [fields for _, fields in graph.nodes(data=True) if fields["target"] == "qlora.lora_linear"]
    assert len(ops) == 3 * 4
    last = report.to_networkx("lower_kernels").nodes(data=True)
    kernels = {fields["kernel"] for _, fields in last if fields["target"] == "qlora.lora_linear"}
    assert kernels and all(re.fullmatch(r"\w+gemm, backward \w+gemm", name) for name in kernels)
    assert nx.node_link_graph(json.loads(found["json"]), edges="edges").edges == graph.edges
    assert (
        found["dot"].startswith('digraph "group_linears" {') and found["dot"].count(" -> ") == graph.number_of_edges()
    )
    assert ElementTree.fromstring(found["svg"]).tag.endswith("svg")
    ast.parse(found["python"])
    assert found["python"].count("qlora.lora_linear.default(") == 3 * 4


@pytest.mark.parametrize(
    ("stage", "diff", "module", "words"),
    [
        ("group_linear", None, None, "Unknown stage 'group_linear': did you mean 'group_linears'?"),
        (None, ("input", "fuse_lora"), None, "Unknown stage 'fuse_lora': did you mean 'fuse_lora_linear'?"),
        ("input", None, "model.layers.1.mpl", "Unknown module 'model.layers.1.mpl': did you mean"),
        (None, None, "model.layers.1.mpl", "Unknown module 'model.layers.1.mpl': did you mean"),
        (None, None, "down_porj", "Unknown module 'down_porj': did you mean 'down_proj'?"),
        (None, None, "zzz", "known: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."),
    ],
)
def test_unknown_names_name_the_nearest(
    report: CompileReport, stage: str | None, diff: tuple[str, str] | None, module: str | None, words: str
) -> None:
    with pytest.raises(UnknownOptionError) as error:
        rendered(report, "text", stage, diff, module, wide=True)
    assert words in str(error.value) and error.value.exit_code == 2


def test_json_goes_where_out_says(config_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _run(capsys, config_file, "--json", "--out", tmp_path / "report.json") == ""
    written, printed = (tmp_path / "report.json").read_text(), _run(capsys, config_file, "--json")
    assert json.loads(written)["linears"] == json.loads(printed)["linears"] != []


def test_a_terminal_without_the_characters_gets_others(config_file: Path) -> None:
    line = [sys.executable, "-m", "qlora_compile.cli", "inspect", str(config_file), "--seq-len", "24"]
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert b"q_proj + k_proj + v_proj" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--format svgg", "Unknown format 'svgg': did you mean 'svg'?"),
        ("--format html", "--format html needs --out FILE."),
        ("--stage backwards", "Unknown stage 'backwards': did you mean 'backward'?"),  # before anything is traced
        ("--diff inptu forward", "Unknown stage 'inptu': did you mean 'input'?"),
        ("--model other", "Name one model"),
        ("--batch 0", "batch must be from 1 to 1048576, got 0."),
        ("--seq-len 99999999999999999999", "seq_len must be from 1 to 16777216, got 99999999999999999999."),
        ("--json --format svg", "--json is the whole report as one JSON object"),
        ("--json --stage input", "--json is the whole report as one JSON object"),
        ("--kernel dequantize_4bit --stage input", "--kernel prints one source as it is"),
        ("--kernel dequantize_4bit --format json", "--kernel prints one source as it is"),
        ("--numerics --stage input", "--numerics is about the whole model: leave --stage out."),
        ("--format html --out x --diff input forward --module mlp", "whole model: leave --diff and --module out."),
        ("--run somewhere", "--run and --export are for --format html."),
        ("--optimizer-budget 1GiB", "--optimizer-budget and --step-in-backward are for --optimizer paged_adamw."),
        ("--optimizer paged_adm", "Unknown paged optimizer 'paged_adm': did you mean 'paged_adamw'?"),
        ("--optimizer paged_adamw --optimizer-budget 1KiB", "the least that works is one page of 4096 bytes"),
    ],
)
def test_wrong_use(config_file: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(config_file), *options.split()]) == 2
    assert words in capsys.readouterr().err


def test_what_is_no_model_and_what_cannot_be_written(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llamma"}')
    assert cli.main(["inspect", str(tmp_path / "config.json")]) == 1
    assert "The configuration of" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "There is no model folder or .gguf file" in capsys.readouterr().err
    assert cli.main(["inspect", str(config_file), "--seq-len", "24", "--out", str(config_file / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_which_kernel_runs_a_layers_backward_and_its_source(
    report: CompileReport, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = rendered(report, "text", None, None, "down_proj", wide=True)
    assert "*.mlp.down_proj ×6" in text and "lora_linear_backward" in text and "gate_proj" not in text
    if "dequantize_4bit" not in report.kernels:
        return  # no compiler here
    (path,) = re.findall(r"^source of dequantize_4bit: (.*)$", text, re.MULTILINE)
    assert _run(capsys, config_file, "--kernel", "dequantize_4bit") == Path(path).read_text()
    for part in {
        part for choice in report.choices for part in choice.parts if source_name(part, report.device) != part
    }:
        assert source_name(part, report.device) in _kernel_source(report, part)  # several in one file: each by its name
    assert cli.main(["inspect", str(config_file), "--kernel", "dequantise"]) == 2
    assert "did you mean 'dequantize_4bit'?" in capsys.readouterr().err
    backward = report.to_networkx("backward").nodes(data=True)
    found = {f["kernel"] for _, f in backward if f["target"] == "qlora.lora_linear_backward"}
    assert found and all(name.endswith("gemm") for name in found)
