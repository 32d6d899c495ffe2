"""Training files -> records: `.txt` (a file is a document), `.jsonl` ("text", "messages" or "prompt"+"completion")."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Record:
    """One document. `where` is "file" or "file:line", for messages. Exactly one of the three kinds is filled."""

    where: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None


def read_records(path: Path) -> list[Record]:
    """Every document of a file or of a folder (searched in depth, in sorted order). Texts of white space are left out.

    Raises DataError, with file and line, for what is missing, unreadable, empty or of another shape.
    """
    records = [record for file in _data_files(path) for record in _read_file(file)]
    if not records:
        raise DataError(f"{path} holds no text to train on: every document is blank.")
    return records


def _data_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"The folder {path} holds no .txt or .jsonl file.")
        return files
    if not path.exists():
        raise DataError(f"There is no data file or folder {path}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is not a data file: .txt and .jsonl files, or a folder of them, can be read.")
    return [path]


def _read_file(file: Path) -> Iterator[Record]:
    try:
        # utf-8-sig: an editor's byte order mark is not part of the text.
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise DataError(f"{file} is empty.")
    if file.suffix.lower() == ".txt":
        yield Record(where=str(file), text=content)
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            record = _parse_line(line, f"{file}:{number}")
            if record.text is None or record.text.strip():
                yield record


def _parse_line(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # "Invalid control character at"
        raise DataError(f"{where}: this line is not JSON ({what} at column {error.colno}).") from None
    except RecursionError:
        raise DataError(f"{where}: this line's JSON is nested too deeply.") from None
    except ValueError:  # the only other one: Python converts no longer text to an integer
        most = sys.get_int_max_str_digits()
        raise DataError(
            f"{where}: this line holds an integer of more than {most} digits: write it as a string."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a line must be a JSON object, this one is a {type(value).__name__}.")
    if "messages" in value:
        return Record(where=where, messages=_check_messages(value["messages"], where))
    if "prompt" in value and "completion" in value:
        for name in ("prompt", "completion"):
            _check_string(value[name], name, where)
        if not value["completion"].strip():
            raise DataError(f'{where}: "completion" is empty, so there is nothing to learn.')
        return Record(where=where, prompt=value["prompt"], completion=value["completion"])
    if "text" in value:
        _check_string(value["text"], "text", where)
        return Record(where=where, text=value["text"])
    found = ", ".join(sorted(map(str, value))) or "none"
    raise DataError(f'{where}: a line needs "text", "messages", or "prompt" and "completion"; its keys are: {found}.')


def _check_messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" must be a list of messages.')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f'{where}: each message must be an object with "role" and "content".')
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f'{where}: no message has the role "assistant", so there is nothing to learn.')
    return tuple(messages)


def _check_string(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f'{where}: "{name}" must be a string, it is a {type(value).__name__}.')
