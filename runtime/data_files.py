"""Training files -> records: `.txt` (a file is a document), `.jsonl` ("text", "messages" or "prompt"+"completion")."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Record:
    """What one file or line holds; `where` is "file" or "file:line". Exactly one of the three kinds is filled.

    The content of a message is a string, or None beside "tool_calls". `tools`: those that a chat may call, as JSON
    schemas, None without.
    """

    where: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None


def read_records(path: Path) -> list[Record]:
    """Every document of a file, or of a folder: searched in depth, in sorted order, what is hidden (".git") left out.

    Texts of white space are left out, too.

    Raises DataError, with file and line, for what is missing, unreadable, empty or of another shape.
    """
    records = [record for file in _data_files(path) for record in _read_file(file)]
    if not records:
        raise DataError(f"{path} holds no text to train on: every document is blank.")
    return records


def _data_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(Path(folder, name) for folder, names in _visible(path) for name in names)
        files = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            raise DataError(f"The folder {path} holds no .txt or .jsonl file.")
        return files
    if not path.exists():
        raise DataError(f"There is no data file or folder {path}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is not a data file: .txt and .jsonl files, or a folder of them, can be read.")
    return [path]


def _visible(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders below `top`, links to folders followed, with the names of their files; hidden ones are left out."""
    seen: set[str] = set()  # a link may lead back, or to a neighbour
    for folder, folders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, [name for name in names if not name.startswith(".")]


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
        tools = _check_tools(value.get("tools"), where)
        return Record(where=where, messages=_check_messages(value["messages"], where), tools=tools)
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
    found = tuple(_check_message(message, where) for message in messages)
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(f'{where}: no message has the role "assistant", so there is nothing to learn.')
    return found


def _check_message(message: Any, where: str) -> dict[str, Any]:
    """As chat templates read it: content is a string, and the arguments of a call are an object."""
    called = message.get("tool_calls") if isinstance(message, dict) else None
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not ("content" in message or called)
    ):
        raise DataError(f'{where}: each message must be an object with "role" and "content".')
    content = _joined(message.get("content"))
    if not isinstance(content, str) and not (content is None and called):
        raise DataError(
            f'{where}: the "content" of a message must be a string or a list of {{"type": "text", "text": ...}}; '
            f'it may be null beside "tool_calls" only.'
        )
    found = message | {"content": content}
    if called:
        if not isinstance(called, list) or not all(isinstance(call, dict) for call in called):
            raise DataError(f'{where}: "tool_calls" must be a list of objects.')
        found["tool_calls"] = [_with_arguments(call) for call in called]
    return found


def _joined(content: Any) -> Any:
    """Parts of text (OpenAI's format) -> one string; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's format has the arguments as JSON in a string, which templates would write as one once more."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _check_tools(tools: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" must be a list of objects, each a JSON schema of a function.')
    return tuple(tools) or None


def _check_string(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f'{where}: "{name}" must be a string, it is a {type(value).__name__}.')
