"""Files -> records -> tokens -> packed blocks, and the order in which a run takes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelOffsets
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qlora_compile.errors import DataError
from qlora_compile.runtime.data import IGNORE, BlockOrder, load_data, pack
from qlora_compile.runtime.data_files import Record, read_records
from qlora_compile.runtime.models import load_tokenizer
from qlora_compile.runtime.templates import Tokens, render_chat, tokenize

CHAT = (
    {"role": "user", "content": "the lazy dog"},
    {"role": "assistant", "content": "the quick fox"},
    {"role": "user", "content": "seven wizards"},
    {"role": "assistant", "content": "a jug of liquor"},
)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Gives the tokenizer another chat template until the test ends."""
    return lambda chat_template: monkeypatch.setattr(tokenizer, "chat_template", chat_template)


def learned_text(tokens: Tokens, tokenizer: Any) -> str:
    return tokenizer.decode([i for i, learn in zip(tokens.ids, tokens.learn) if learn])


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class TestReading:
    def test_a_text_file_is_one_document(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "one", "", "two")
        assert read_records(file) == [Record(where=str(file), text="one\n\ntwo\n")]

    def test_a_folder_is_read_in_sorted_order_and_in_depth(self, tmp_path: Path) -> None:
        (tmp_path / "z").mkdir()
        write(tmp_path / "b.jsonl", {"text": "second"}, "", {"text": "  "}, {"text": "third"})
        write(tmp_path / "a.txt", "first")
        write(tmp_path / "z" / "c.TXT", "fourth")
        write(tmp_path / "notes.md", "not data")
        texts = [(record.text or "").strip() for record in read_records(tmp_path)]
        assert texts == ["first", "second", "third", "fourth"]

    def test_hidden_files_are_left_out_and_links_followed_once(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "data" / ".git").mkdir(parents=True)
        write(tmp_path / "elsewhere" / "b.txt", "linked")
        write(tmp_path / "data" / "a.txt", "plain")
        write(tmp_path / "data" / ".a.txt", "hidden")
        write(tmp_path / "data" / ".git" / "c.txt", "hidden, too")
        (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "data" / "link2").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
        assert [record.text for record in read_records(tmp_path / "data")] == ["plain\n", "linked\n"]

    def test_a_byte_order_mark_is_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n')
        assert [record.text for record in read_records(tmp_path / "a.jsonl")] == ["x"]

    def test_other_line_ends_inside_a_string_do_not_split_it(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
        assert [record.text for record in read_records(file)] == ["a\u2028b"]

    def test_messages_win_over_prompt_and_text(self, tmp_path: Path) -> None:
        line = {"text": "t", "prompt": "p", "completion": "c"}
        both = write(tmp_path / "a.jsonl", line | {"messages": list(CHAT)}, line)
        first, second = read_records(both)
        assert first.messages == CHAT and first.text is None
        assert (second.prompt, second.completion, second.text) == ("p", "c", None)

    def test_parts_of_text_are_joined_and_tools_are_kept(self, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "the lazy "}, {"type": "text", "text": "dog"}]
        called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
        tools = [{"type": "function", "function": {"name": "f"}}]
        line = {"messages": [{"role": "user", "content": parts}, called], "tools": tools}
        (record,) = read_records(write(tmp_path / "a.jsonl", line))
        calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]  # OpenAI's format has JSON in a string
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        assert record.messages == ({"role": "user", "content": "the lazy dog"}, answer)
        assert record.tools == tuple(tools)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"messages": [*CHAT, {"role": "user", "content": 5}]}, '"content" of a message must be a string'),
            ({"messages": [{"role": "user", "content": None}, *CHAT]}, '"content" of a message must be a string'),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *CHAT]}, "must be a string or a list of"),
            ({"messages": list(CHAT), "tools": "f"}, '"tools" must be a list of objects'),
            ({"messages": [*CHAT, {"role": "assistant", "tool_calls": "f"}]}, '"tool_calls" must be a list of objects'),
            ("{broken", "not JSON"),
            ('{"text": "a\tb"}', r"Invalid control character at column \d"),
            ("[" * 100_000, "not JSON|nested too deeply"),
            ([1], "must be a JSON object, this one is a list"),
            ({"txt": "x"}, "its keys are: txt"),
            ({"prompt": "x"}, "its keys are: prompt"),
            ({"text": 3}, '"text" must be a string, it is a int'),
            ({"prompt": "x", "completion": " \n"}, '"completion" is empty'),
            ({"messages": []}, "must be a list of messages"),
            ({"messages": [{"role": "user"}]}, 'with "role" and "content"'),
            ({"messages": [{"role": "user", "content": "x"}]}, 'no message has the role "assistant"'),
            pytest.param(
                '{"text": "x", "id": ' + "1" * 5000 + "}",
                "integer of more than 4300 digits: write it as a string",
                id="long integer",
            ),
        ],
    )
    def test_a_bad_line_is_named_with_file_and_number(self, tmp_path: Path, line: Any, message: str) -> None:
        file = write(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
        with pytest.raises(DataError, match=rf"a\.jsonl:3: .*({message})"):
            read_records(file)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b" \n\t", "a.txt is empty"),
            ("a.jsonl", b"", "a.jsonl is empty"),
            ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
            ("a.csv", b"x", "is not a data file"),
            ("a.jsonl", b'{"text": " "}\n', "every document is blank"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_records(tmp_path / name)

    def test_missing_file_and_folder_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no data file or folder"):
            read_records(tmp_path / "nothing.txt")
        with pytest.raises(DataError, match=r"no \.txt or \.jsonl file"):
            read_records(tmp_path)

    @settings(max_examples=60, deadline=None)
    @given(content=st.binary(max_size=80))
    def test_any_bytes_give_records_or_a_data_error(
        self, content: bytes, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        file = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
        file.write_bytes(content)
        try:
            assert read_records(file)
        except DataError as error:
            assert "a.jsonl" in str(error)


class TestTemplates:
    def test_a_text_is_learned_whole_and_ends_with_eos(self, tokenizer: Any) -> None:
        (tokens,) = tokenize(Record("f", text="the lazy dog"), tokenizer)
        assert tokens.ids[-1] == tokenizer.eos_token_id and all(tokens.learn)
        assert tokens.ids[:-1] == tokenizer("the lazy dog")["input_ids"]

    def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(self, tokenizer: Any) -> None:
        (tokens,) = tokenize(Record("f", prompt="the lazy dog", completion=" jumps over"), tokenizer)
        assert learned_text(tokens, tokenizer) == "jumps over<eos>"
        assert tokens.learn == sorted(tokens.learn)

    def test_a_token_across_the_border_is_learned(self, tokenizer: Any) -> None:
        # " the" is one token here; cut inside it, its end belongs to the completion.
        (tokens,) = tokenize(Record("f", prompt="over t", completion="he"), tokenizer)
        assert "he" in learned_text(tokens, tokenizer)

    def test_only_the_assistants_turns_of_a_chat_are_learned(self, tokenizer: Any) -> None:
        ((text, spans),) = render_chat(CHAT, tokenizer, "f:1")
        assert [text[a:b] for a, b in spans] == ["the quick fox <eos>\n", "a jug of liquor <eos>\n"]
        (tokens,) = tokenize(Record("f:1", messages=CHAT), tokenizer)
        learned = learned_text(tokens, tokenizer)
        assert "quick fox" in learned and "jug of liquor" in learned
        assert "lazy" not in learned and "wizards" not in learned and learned.count("<eos>") == 2
        # The template wrote the last end itself: no second one is added.
        assert tokens.ids.count(tokenizer.eos_token_id) == 4

    @pytest.mark.parametrize(
        "line",
        [
            {"text": "a \ud83d b"},
            {"prompt": "the lazy \ud83d", "completion": "\ude00 dog"},
            {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "the dog"}]},
        ],
    )
    def test_half_of_a_character_is_named_with_file_and_line(self, tokenizer: Any, tmp_path: Path, line: Any) -> None:
        file = write(tmp_path / "a.jsonl", {"text": "fine \U0001f600"}, line)
        with pytest.raises(DataError, match=r"a\.jsonl:2: \\ud83d is only half of a character"):
            load_data(file, tokenizer, seq_len=8)

    def test_an_end_that_the_tokenizer_writes_is_learned_where_what_it_ends_is(self, tokenizer: Any) -> None:
        adding = copy.deepcopy(tokenizer)
        eos = (tokenizer.eos_token, tokenizer.eos_token_id)
        adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
        for kind in ({"text": "the lazy dog"}, {"prompt": "the lazy dog", "completion": " jumps over"}):
            (tokens,) = tokenize(Record("f", **kind), adding)
            assert tokens == tokenize(Record("f", **kind), tokenizer)[0] and tokens.learn[-1]

    def test_white_space_that_ends_a_completion_is_learned(self) -> None:
        # This kind reports no characters for it: (n, n), where n is the end of the text.
        backend = Tokenizer(WordLevel({"Ġ": 0, "a": 1, "<eos>": 2, "Ċ": 3}))
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        backend.post_processor = ByteLevelOffsets(trim_offsets=True)
        own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
        (tokens,) = tokenize(Record("f", prompt="a\n", completion="a "), own)
        assert tokens == Tokens([1, 3, 1, 0, 2], [False, False, True, True, True])

    def test_what_a_template_writes_before_a_first_turn_is_not_learned(self, tokenizer: Any, template: Any) -> None:
        template("system: be brief <eos>\n" + tokenizer.chat_template)
        turns = ({"role": "assistant", "content": "a jug"}, *CHAT)
        ((text, spans),) = render_chat(turns, tokenizer, "f:1")
        assert [text[a:b] for a, b in spans][:2] == ["a jug <eos>\n", "the quick fox <eos>\n"]

    def test_tools_reach_the_template(self, tokenizer: Any, template: Any) -> None:
        template("{% for tool in tools %}{{ tool.function.name }} <eos>{% endfor %}" + tokenizer.chat_template)
        tools = ({"type": "function", "function": {"name": "quartz"}},)
        ((text, spans),) = render_chat(CHAT, tokenizer, "f:1", tools)
        assert text.startswith("quartz <eos>") and text[slice(*spans[0])] == "the quick fox <eos>\n"

    def test_tools_and_calls_that_a_template_leaves_out(self, tokenizer: Any) -> None:
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "quartz"}}]}
        with pytest.raises(DataError, match=r'f:3: .*does not write the "tool_calls" of message 2'):
            tokenize(Record("f:3", messages=(CHAT[0], call)), tokenizer)
        with pytest.raises(DataError, match=r'f:3: .*does not write "tools"'):
            tokenize(Record("f:3", messages=CHAT, tools=({"function": {"name": "quartz"}},)), tokenizer)

    def test_turns_that_a_template_rewrites_later_are_documents_of_their_own(
        self, tokenizer: Any, template: Any
    ) -> None:
        # Like reasoning models' templates: an assistant's turn looks different once it is not the last.
        template(
            "{% for m in messages %}{{ m['role'] }}: "
            "{% if m['role'] == 'assistant' and not loop.last %}(cut) {% endif %}"
            "{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
        texts = render_chat(CHAT, tokenizer, "f:7")
        assert [[text[a:b] for a, b in spans] for text, spans in texts] == [
            ["the quick fox<eos>"],
            ["a jug of liquor<eos>"],
        ]
        assert texts[1][0].startswith("user: the lazy dog<eos>assistant: (cut) the quick fox<eos>user: seven")
        first, second = tokenize(Record("f:7", messages=CHAT), tokenizer)
        assert "jug of liquor" in learned_text(second, tokenizer) and "fox" not in learned_text(second, tokenizer)
        assert [first] == tokenize(Record("f:7", messages=CHAT[:2]), tokenizer)

    def test_a_turn_that_does_not_begin_with_its_prompt(self, tokenizer: Any, template: Any) -> None:
        template("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}x{% endif %}")
        with pytest.raises(DataError, match=r"f:7: what .* writes for message 2 does not begin with the prompt for it"):
            tokenize(Record("f:7", messages=CHAT), tokenizer)

    @pytest.mark.parametrize(
        ("chat_template", "message"),
        [
            ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
            ("{{ 1 // 0 }}", "refuses these messages: integer division or modulo by zero"),
            ({"a": "x", "b": "y"}, "refuses these messages: .*multiple chat templates"),
            (None, "has no chat template"),
        ],
    )
    def test_a_template_that_fails_and_none_at_all(
        self, tokenizer: Any, template: Any, chat_template: Any, message: str
    ) -> None:
        template(chat_template)
        with pytest.raises(DataError, match=rf"f:2: .*{message}"):
            tokenize(Record("f:2", messages=CHAT), tokenizer)


class TestPacking:
    def test_documents_lie_end_to_end_and_the_last_block_is_padded(self) -> None:
        documents = [Tokens([5, 6, 7, 2], [True] * 4), Tokens([8, 9, 2], [False, True, True])]
        packed = pack(documents, seq_len=5, pad=2)
        assert packed.input_ids.tolist() == [[5, 6, 7, 2, 8], [9, 2, 2, 2, 2]]
        assert packed.labels.tolist() == [[5, 6, 7, 2, IGNORE], [9, 2, IGNORE, IGNORE, IGNORE]]
        assert packed.loss_tokens == 4  # the first label of each block has nothing before it

    def test_blocks_without_a_token_to_learn_are_left_out(self) -> None:
        documents = [Tokens([5] * 6, [False] * 6), Tokens([7, 2], [True, True]), Tokens([4], [True])]
        packed = pack(documents, seq_len=4, pad=2)
        # The first block is all prompt, and the one token of the last has nothing before it to be predicted from.
        assert packed.input_ids.tolist() == [[5, 5, 7, 2]]

    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
        seq_len=st.integers(2, 7),
        seed=st.integers(0, 9),
    )
    def test_no_token_to_learn_is_lost_or_doubled(self, lengths: list[int], seq_len: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        flags = [(torch.rand(n, generator=draw) < 0.6).tolist() for n in lengths]
        stream = iter(range(1, 1000))
        documents = [Tokens([next(stream) for _ in learn], learn) for learn in flags]
        packed = pack(documents, seq_len, pad=0)
        ids = [i for document in documents for i in document.ids]
        learned = [i for document in documents for i, learn in zip(document.ids, document.learn) if learn]
        # Tokens are 1, 2, ... in order, so token i lies at place (i - 1) % seq_len of its block.
        countable = [i for i in learned if (i - 1) % seq_len != 0]
        assert [i for i in packed.labels[:, 1:].flatten().tolist() if i != IGNORE] == countable
        assert packed.loss_tokens == len(countable) and packed.input_ids.shape[1] == seq_len
        kept = packed.labels != IGNORE
        assert torch.equal(packed.labels[kept], packed.input_ids[kept])
        assert len(packed) <= -(-len(ids) // seq_len)

    def test_data_without_a_token_to_learn_is_refused(self, tokenizer: Any, tmp_path: Path) -> None:
        class NoTokens:
            eos_token_id = None

            def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
                return {"input_ids": []}

        file = write(tmp_path / "a.txt", "x")
        with pytest.raises(DataError, match="no token to learn"):
            load_data(file, NoTokens(), seq_len=8)

    def test_a_short_text_still_gives_one_full_block(self, tokenizer: Any, tmp_path: Path) -> None:
        packed = load_data(write(tmp_path / "a.txt", "the lazy dog"), tokenizer, seq_len=64)
        assert packed.input_ids.shape == (1, 64)
        assert packed.loss_tokens == len(tokenizer("the lazy dog\n")["input_ids"])

    def test_the_fingerprint_follows_tokens_labels_and_shape(self) -> None:
        base = pack([Tokens([1, 2, 3, 4], [True] * 4)], 2, pad=0)
        others = [
            pack([Tokens([1, 2, 3, 5], [True] * 4)], 2, pad=0),
            pack([Tokens([1, 2, 3, 4], [False, True, True, True])], 2, pad=0),
            pack([Tokens([1, 2, 3, 4], [True] * 4)], 4, pad=0),
        ]
        again = pack([Tokens([1, 2], [True] * 2), Tokens([3, 4], [True] * 2)], 2, pad=0)
        assert again.fingerprint == base.fingerprint
        assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4

    def test_a_token_without_an_embedding_is_refused(self) -> None:
        packed = pack([Tokens([1, 210, 3], [True] * 3)], 3, pad=0)
        packed.check_vocabulary(211)
        with pytest.raises(DataError, match="token 210, but the model has 210"):
            packed.check_vocabulary(210)


class TestOrder:
    def test_each_epoch_is_another_permutation_of_all_blocks(self) -> None:
        order = BlockOrder(13, seed=3)
        epochs = [order.take(13) for _ in range(3)]
        assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3

    def test_batches_run_across_the_end_of_an_epoch(self) -> None:
        whole = BlockOrder(5, seed=0).take(15)
        order = BlockOrder(5, seed=0)
        assert [order.take(3) for _ in range(5)] == [whole[i : i + 3] for i in range(0, 15, 3)]

    @pytest.mark.parametrize("position", [0, 4, 5, 7, 12])
    def test_it_goes_on_from_its_position(self, position: int) -> None:
        whole = BlockOrder(5, seed=1).take(20)
        assert BlockOrder(5, seed=1, position=position).take(8) == whole[position : position + 8]

    def test_seed_and_epoch_do_not_share_permutations(self) -> None:
        orders = {seed: BlockOrder(50, seed).take(100) for seed in range(3)}
        halves = {tuple(order[i : i + 50]) for order in orders.values() for i in (0, 50)}
        assert len(halves) == 6
