"""The error classes: one family, exit codes for the command line, and messages that name the way out."""

from __future__ import annotations

import inspect
import pickle

import pytest

from qlora_compile import errors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_class_is_of_the_family_documented_and_ends_with_1_or_2(cls: type[errors.QLoRACompileError]) -> None:
    assert issubclass(cls, errors.QLoRACompileError)
    assert cls.__doc__
    assert cls.exit_code in (1, 2)


def test_wrong_use_ends_with_2_and_a_failed_run_with_1() -> None:
    for cls in (errors.ConfigError, errors.UnknownOptionError, errors.NoTargetError, errors.DataError):
        assert cls.exit_code == 2
    for cls in (errors.CheckpointError, errors.NonFiniteError, errors.KernelError, errors.MissingDependencyError):
        assert cls.exit_code == 1


def test_unknown_option_names_the_nearest_or_lists_what_there_is() -> None:
    assert str(errors.UnknownOptionError("ranks", ["rank", "alpha"])) == "Unknown option 'ranks': did you mean 'rank'?"
    message = str(errors.UnknownOptionError("zzz", ["rank", "alpha"], what="pass"))
    assert message == "Unknown pass 'zzz': known: alpha, rank."


def test_missing_dependency_says_how_to_install_it() -> None:
    message = str(errors.MissingDependencyError("gguf", "gguf", "Reading a GGUF file"))
    assert "pip install 'qlora-compile[gguf]'" in message and "from a clone: pip install -e '.[gguf]'" in message
    assert message.startswith("Reading a GGUF file")


def test_an_ordinary_error_crosses_a_process_border() -> None:
    """A data loader's worker process raises through pickle."""
    again = pickle.loads(pickle.dumps(errors.DataError("train.jsonl:3: not JSON.")))
    assert isinstance(again, errors.DataError) and str(again) == "train.jsonl:3: not JSON."
