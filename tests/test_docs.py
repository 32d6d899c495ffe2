"""Every Python block of README and docs runs, in order, in a folder that holds a small model; what they list exists.

The lowering is "eager" here, as it is the documents' code that is tested and Inductor would take minutes.
A block right after the line `<!-- not run: reason -->` is only compiled.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from qlora_compile.cli_app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- not run: .*? -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder_of_the_reader(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `./model`, where "inductor" means "eager"."""
    from qlora_compile import config

    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    original = config.QLoRAConfig.__post_init__

    def with_a_quick_lowering(self: Any) -> None:
        original(self)
        object.__setattr__(self, "lowering", "eager" if self.lowering == "inductor" else self.lowering)

    monkeypatch.setattr(config.QLoRAConfig, "__post_init__", with_a_quick_lowering)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run_in_order(document: Path, folder_of_the_reader: Path) -> None:
    text = document.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": document.stem}
    for block in BLOCK.finditer(text):
        # Padded with blank lines, so that a traceback shows the document's own line numbers.
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(document), "exec")
        if block["skip"] is None:
            exec(code, namespace)


def test_there_are_blocks_to_run() -> None:
    """The pattern above finds what the documents hold."""
    for document in (ROOT / "README.md", ROOT / "docs" / "guide.md"):
        text = document.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == text.count("```python\n") > 0


# What the documents list: options, fields, links

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTION_TABLES = {"finetune": "finetune.md", "combine": "adapters.md", "export": "export.md", "convert": "export.md"}
OPTION_ROW = re.compile(r"^\| `(--[a-z0-9-]+)` \| (.*?) \| .+ \|$", re.MULTILINE)
# of torchrun, pip, accelerate and benchmarks/scaling.py
OTHER_TOOLS = {"--nproc-per-node", "--index-url", "--cpu", "--multi_gpu", "--write"}


def _section(document: str, heading: str) -> str:
    """The text under a heading, up to the next one of its kind or above."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    level = heading.split(" ")[0]
    start = text.index(f"\n{heading}\n") + 1
    after = re.compile(rf"^#{{1,{len(level)}}} ", re.MULTILINE).search(text, start + len(heading))
    return text[start : after.start() if after else None]


def _names(text: str) -> set[str]:
    """Options of the command line in a text, without their opposites."""
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]*)", text))


@pytest.mark.parametrize(("command", "document"), OPTION_TABLES.items())
def test_tables_of_options_are_the_command_lines(command: str, document: str) -> None:
    heading = "## Options" if command == "finetune" else f"### Options of {command}"
    listed = dict(OPTION_ROW.findall(_section(document, heading)))
    there = {option.opts[0]: option for option in COMMANDS[command].params}
    assert sorted(listed) == sorted(there)
    for name, option in there.items():
        if option.required or listed[name] == "required":
            assert option.required and listed[name] == "required", name
        elif option.default is not None:
            shown = {True: "on", False: "off"}.get(option.default, str(option.default)) if option.is_flag else None
            assert listed[name] == (shown or str(option.default)), name


def test_options_in_documents_exist() -> None:
    groups = [command.commands.values() for command in COMMANDS.values() if hasattr(command, "commands")]
    commands = [*COMMANDS.values(), *(command for group in groups for command in group)]
    known = {name for each in commands for option in each.params for name in (*option.opts, *option.secondary_opts)}
    known |= {"--help", "--version"} | OTHER_TOOLS
    for document in DOCUMENTS:
        assert _names(document.read_text(encoding="utf-8")) <= known, document


def test_the_guide_lists_every_field_of_the_configuration() -> None:
    from qlora_compile import QLoRAConfig

    rows = re.findall(r"^\| (`.*?) \|", _section("guide.md", "## Choosing layers, ranks and bits"), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(QLoRAConfig))


def test_what_finetune_cannot_set_is_named() -> None:
    from qlora_compile import QLoRAConfig, cli_finetune

    ways = {*cli_finetune.QLORA_OPTIONS, *cli_finetune.ADAPTER_FIELDS.values(), "target_modules", "exclude_modules"}
    ways |= {"init_lora_weights", "modules_to_save", "rank_pattern", "alpha_pattern"}
    sentence = re.search(
        r"leaves these at their defaults:(.*?)\. In Python", _section("finetune.md", "## In Python"), re.S
    )
    assert sentence is not None
    fields = {field.name for field in dataclasses.fields(QLoRAConfig)}
    assert set(re.findall(r"`(\w+)`", sentence[1])) == fields - ways


def test_what_a_resumed_run_may_change_is_listed() -> None:
    from qlora_compile.runtime.run_folder import FREE, FREE_QLORA

    sentence = re.search(r"These may change:(.*?)\.\n", _section("finetune.md", "## Going on with a run"), re.S)
    assert sentence is not None
    options = {option.name.removesuffix("_"): option.opts[0] for option in COMMANDS["finetune"].params}
    free = {options[name] for name in (FREE | FREE_QLORA) & options.keys()} - {"--resume"}
    assert _names(sentence[1]) == free


def test_headings_that_documents_link_to_exist() -> None:
    def anchors(path: Path) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for document in (*DOCUMENTS, ROOT / "CONTRIBUTING.md"):
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
            path = (document.parent / target) if target else document
            assert anchor in anchors(path), f"{document} links to {target}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in text]
    assert missing == []
