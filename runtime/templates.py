"""Records -> tokens with the mask of those to learn: all of a text, the completion only of a chat or a prompt."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import DataError
from .data_files import Record

Span = tuple[int, int]


class Tokens(NamedTuple):
    """One document. `learn[i]` tells whether token i counts in the loss."""

    ids: list[int]
    learn: list[bool]


def tokenize(record: Record, tokenizer: Any) -> list[Tokens]:
    """Record -> Tokens, each ended by the tokenizer's end-of-sequence token. Raises DataError with file and line.

    A text that ends with that token already (white space aside), as most chat templates' do, keeps its own ending. One
    record is one document, but for a chat whose template rewrites earlier turns: see `render_chat`.
    """
    if record.messages is not None:
        texts = render_chat(record.messages, tokenizer, record.where, record.tools)
        # The template writes the special tokens itself.
        found = [
            (text, _tokenize_spans(text, spans, tokenizer, record.where, add_special_tokens=False))
            for text, spans in texts
        ]
    elif record.prompt is not None and record.completion is not None:
        text = record.prompt + record.completion
        spans = [(len(record.prompt), len(text))]
        found = [(text, _tokenize_spans(text, spans, tokenizer, record.where, add_special_tokens=True))]
    else:
        text = record.text or ""
        _check_characters(text, record.where)
        ids = tokenizer(text, verbose=False)["input_ids"]
        found = [(text, Tokens(ids, [True] * len(ids)))]
    return [_end(tokens, text, tokenizer) for text, tokens in found]


def _end(tokens: Tokens, text: str, tokenizer: Any) -> Tokens:
    """The end is learned exactly where the token before it is, so that the model learns to stop."""
    eos, (ids, learn) = tokenizer.eos_token_id, tokens
    if eos is None or not ids or text.rstrip().endswith(tokenizer.eos_token):
        return tokens
    if ids[-1] == eos:  # the tokenizer's own doing, so that it has no place in the text
        ids, learn = ids[:-1], learn[:-1]
    return Tokens([*ids, eos], [*learn, learn[-1] if learn else False])


def render_chat(
    messages: Sequence[dict[str, Any]], tokenizer: Any, where: str, tools: Sequence[dict[str, Any]] | None = None
) -> list[tuple[str, list[Span]]]:
    """Messages -> the chat template's text and the character span of each assistant's turn, its ending included.

    A turn starts where the prompt for it ends: the messages before it, rendered with the generation prompt. Where a
    rendering is no prefix of the whole, the template rewrites earlier turns (Qwen3's leaves out what was thought there),
    and each turn becomes a text of its own after the messages before it, as the model will be asked for it. Raises
    DataError where a turn does not begin with the prompt for it, and where the template writes no tools or no calls.
    """
    if not tokenizer.chat_template:
        raise DataError(f'{where}: the model\'s tokenizer has no chat template: use "prompt" and "completion".')
    render = functools.partial(_render, tokenizer=tokenizer, where=where, tools=tools)
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            through = render(messages[: i + 1])
            before = render(messages[:i], generation_prompt=True) if i else _before_first(message, through, render)
            if not through.startswith(before):
                raise DataError(
                    f"{where}: what the chat template writes for message {i + 1} does not begin with the prompt for it, "
                    f'so the assistant\'s words cannot be located: use "prompt" and "completion".'
                )
            if message.get("tool_calls"):
                without = {key: value for key, value in message.items() if key != "tool_calls"}
                if render([*messages[:i], without | {"content": message["content"] or ""}]) == through:
                    raise DataError(
                        f'{where}: the model\'s chat template does not write the "tool_calls" of message {i + 1}.'
                    )
            turns.append((through, (len(before), len(through))))
    text = render(messages)
    if tools and text == render(messages, tools=()):
        raise DataError(f'{where}: the model\'s chat template does not write "tools".')
    if all(text.startswith(through) for through, _ in turns):
        return [(text, [span for _, span in turns])]
    return [(through, [span]) for through, span in turns]


def _before_first(message: dict[str, Any], through: str, render: Callable[..., str]) -> str:
    """What a template writes before an assistant's turn that comes first: what another turn there has, too."""
    content = str(message.get("content") or "").lstrip()
    other = render([message | {"content": "b" if content.startswith("a") else "a"}])
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(through, other))
    return "".join(character for character, _ in same)


def _render(
    messages: Sequence[dict[str, Any]],
    *,
    tokenizer: Any,
    where: str,
    tools: Sequence[dict[str, Any]] | None,
    generation_prompt: bool = False,
) -> str:
    from jinja2.exceptions import TemplateError

    # What a program in a template can raise, and transformers on what it is given.
    errors = (TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RecursionError)
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except errors as error:
        line = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"{where}: the model's chat template refuses these messages: {line}.") from error
    return str(rendered)


def _tokenize_spans(
    text: str, spans: Sequence[Span], tokenizer: Any, where: str, *, add_special_tokens: bool
) -> Tokens:
    """A token is learned where it holds at least one character of a span, so none of a completion is lost.

    Some tokenizers report no characters for a token of white space: it ends where they do.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{where}: this needs a tokenizer that reports offsets: the model must have a tokenizer.json.")
    _check_characters(text, where)
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    learn = [
        any(end > first and (start < last or start == end == last) for first, last in spans) for start, end in offsets
    ]
    return Tokens(list(encoding["input_ids"]), learn)


def _check_characters(text: str, where: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where}: {half} is only half of a character: complete the pair or remove it.") from None
