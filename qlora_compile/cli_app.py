"""The commands of `qlora-compile`. They import torch only when they run, so that `--help` answers at once."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from . import __version__
from .cli_combine import combine
from .cli_convert import convert
from .cli_doctor import doctor
from .cli_estimate import estimate
from .cli_export import export
from .cli_finetune import finetune
from .cli_inspect import inspect
from .cli_runs import runs_app
from .errors import QLoRACompileError

EXIT_FAILED = 1
TYPER_INTERRUPTED = 130  # what typer returns for Ctrl-C

app = typer.Typer(name="qlora-compile", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (finetune, export, combine, convert, inspect, estimate, doctor):
    app.command()(command)
app.add_typer(runs_app)


def _print_version(value: bool) -> None:
    if value:
        print(f"qlora-compile {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with QLoRA: 4-bit base weights, trained adapters, one ordinary checkpoint.

    Each command has an example: `qlora-compile finetune --help`.
    """


def run(args: Sequence[str]) -> tuple[int, str]:
    """Run one command line -> its exit code and, after an error of ours or of the command line, a sentence.

    Raises KeyboardInterrupt, and other exceptions, which are bugs.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and lines of tables may have what an old terminal does not
            stream.reconfigure(errors="replace")
    try:
        code = app(args=list(args), prog_name="qlora-compile", standalone_mode=False)
    except QLoRACompileError as error:
        return error.exit_code, str(error)
    except TyperException as error:
        return error.exit_code, _usage_message(error)
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        return EXIT_FAILED, f"{error.strerror or error}{named}"
    except typer.Abort:
        raise KeyboardInterrupt from None
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return EXIT_FAILED, f"out of memory; a smaller --batch or --seq-len needs less. ({error})"
    if code == TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return (code if isinstance(code, int) else 0), ""


def _usage_message(error: TyperException) -> str:
    """One sentence, with the nearest option where one was mistyped; empty where the help was printed instead."""
    nearest = getattr(error, "possibilities", None)
    if nearest:
        return f"No such option {getattr(error, 'option_name', '')!r}: did you mean {nearest[0]!r}?"
    return error.format_message()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
