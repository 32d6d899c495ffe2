"""Records -> tokens with the mask of those to learn: all of a text, the completion only of a chat or a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import DataError
from .data_files import Record

Span = tuple[int, int]


class Tokens(NamedTuple):
    """One document. `learn[i]` tells whether token i counts in the loss."""

    ids: list[int]
    learn: list[bool]


def tokenize(record: Record, tokenizer: Any) -> Tokens:
    """Record -> Tokens, ended by the tokenizer's end-of-sequence token. Raises DataError with file and line.

    A text that ends with that token already (white space aside), as most chat templates' do, keeps its own ending.
    """
    if record.messages is not None:
        text, spans = render_chat(record.messages, tokenizer, record.where)
        # The template writes the special tokens itself.
        tokens = _tokenize_spans(text, spans, tokenizer, record.where, add_special_tokens=False)
    elif record.prompt is not None and record.completion is not None:
        text = record.prompt + record.completion
        spans = [(len(record.prompt), len(text))]
        tokens = _tokenize_spans(text, spans, tokenizer, record.where, add_special_tokens=True)
    else:
        text = record.text or ""
        _check_characters(text, record.where)
        ids = tokenizer(text, verbose=False)["input_ids"]
        tokens = Tokens(ids, [True] * len(ids))
    return _end(tokens, text, tokenizer)


def _end(tokens: Tokens, text: str, tokenizer: Any) -> Tokens:
    """The end is learned exactly where the token before it is, so that the model learns to stop."""
    eos = tokenizer.eos_token_id
    if eos is None or not tokens.ids or tokens.ids[-1] == eos or text.rstrip().endswith(tokenizer.eos_token):
        return tokens
    return Tokens([*tokens.ids, eos], [*tokens.learn, tokens.learn[-1]])


def render_chat(messages: Sequence[dict[str, Any]], tokenizer: Any, where: str) -> tuple[str, list[Span]]:
    """Messages -> the chat template's text and the character span of each assistant's turn, its ending included.

    A turn starts where the prompt for it ends: the messages before it, rendered with the generation prompt. Each
    rendering must be a prefix of the whole, which templates that rewrite earlier turns break: DataError.
    """
    if not tokenizer.chat_template:
        raise DataError(f'{where}: the model\'s tokenizer has no chat template: use "prompt" and "completion".')
    text = _render(messages, tokenizer, where, generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(messages[:i], tokenizer, where, generation_prompt=True) if i else ""
            through = _render(messages[: i + 1], tokenizer, where, generation_prompt=False)
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns (message {i + 1}), so the assistant's words "
                    f"cannot be located: give one assistant turn a line, as the last message."
                )
            spans.append((len(before), len(through)))
    return text, spans


def _render(messages: Sequence[dict[str, Any]], tokenizer: Any, where: str, *, generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{where}: the model's chat template refuses these messages: {error}.") from error
    return str(rendered)


def _tokenize_spans(
    text: str, spans: Sequence[Span], tokenizer: Any, where: str, *, add_special_tokens: bool
) -> Tokens:
    """A token is learned where it holds at least one character of a span, so none of a completion is lost."""
    if not tokenizer.is_fast:
        raise DataError(f"{where}: this needs a tokenizer that reports offsets: the model must have a tokenizer.json.")
    _check_characters(text, where)
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    learn = [any(start < last and end > first for first, last in spans) for start, end in offsets]
    return Tokens(list(encoding["input_ids"]), learn)


def _check_characters(text: str, where: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where}: {half} is only half of a character: complete the pair or remove it.") from None
