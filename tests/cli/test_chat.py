"""`octavo chat`: turns, commands, interrupts, and a history that fits the context."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import ChatTemplateError, ClosedError, NotTextError


def contents(cli: Any) -> list[list[str]]:
    """What each request was asked: the contents of its messages, without the answers."""
    return [
        [turn["content"] for turn in turns if turn["role"] != "assistant"] for _, turns, _ in cli.llm.asked
    ]


def test_several_turns_from_a_pipe(cli):
    done = cli("chat", "--system", "Be brief.", stdin=b"hello\n\nand then?\n")
    assert (done.code, done.out) == (0, "The sky is blue.\nThe sky is blue.\n")
    assert [line.partition(", ")[0] for line in done.err_lines] == ["fake", *["3 prompt + 4 new tokens"] * 2]
    assert contents(cli) == [["Be brief.", "hello"], ["Be brief.", "hello", "and then?"]]
    assert cli.llm.asked[1][1][2] == {"role": "assistant", "content": "The sky is blue."}
    assert cli.llm.closed == 1


def test_a_prompt_on_a_terminal(cli):
    done = cli("chat", stdin=b"hello\n/exit\nnot read\n", terminal=True)
    assert done.code == 0
    assert done.out == "> The sky is blue.\n> "
    assert contents(cli) == [["hello"]]


def test_commands(cli):
    lines = [
        "a",
        "/reset",
        "b",
        "/system Be kind.",
        "c",
        "/system",
        "d",
        "/help",
        "/nonsense",
        " /as text",
        "/exit",
        "e",
    ]
    done = cli("chat", stdin="\n".join(lines).encode())
    assert done.code == 0
    assert contents(cli) == [
        ["a"],
        ["b"],
        ["Be kind.", "b", "c"],
        ["b", "c", "d"],
        ["b", "c", "d", " /as text"],
    ]
    assert "/nonsense is not a command" in done.err
    assert "/reset        forget the conversation" in done.err_lines


def test_ctrl_c_stops_the_answer_and_not_the_chat(cli):
    cli.llm.interrupt_after = 3
    done = cli("chat", stdin=b"a\nb\n")
    assert (done.code, done.out) == (0, "The sky\nThe sky\n")
    assert cli.llm.asked[1][1] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "The sky"},
        {"role": "user", "content": "b"},
    ]


def test_ctrl_c_before_an_answer_forgets_the_question(cli):
    cli.llm.interrupt_after = 0
    cli("chat", stdin=b"a\nb\n")
    assert contents(cli) == [["a"], ["b"]]


def test_the_oldest_turns_go_with_a_notice(cli):
    cli.llm.context_tokens = 32
    done = cli("chat", "--system", "one two three", stdin=b"\n".join(b"%d word word" % i for i in range(5)))
    assert done.code == 0
    for _, turns, _ in cli.llm.asked:
        assert cli.llm.count_chat_tokens(turns) + 32 // 4 <= 32
        assert [turn["role"] for turn in turns][:2] == ["system", "user"]
    assert contents(cli)[-1] == ["one two three", "2 word word", "3 word word", "4 word word"]
    assert "the oldest 2 messages are forgotten: the context is 32 tokens" in done.err_lines


def test_a_message_that_is_too_long_is_refused_and_forgotten(cli):
    done = cli("chat", stdin=b"a\n" + b"word " * 65 + b"\nb\n")
    assert done.code == 0
    assert done.err_lines[2:4] == ["error: too long", "  fix: less"]
    assert contents(cli)[2] == ["a", "b"]


def test_a_message_refused_while_it_is_counted_is_forgotten(cli, monkeypatch):
    """What a terminal sends in another encoding arrives as half surrogates."""
    count = cli.llm.count_chat_tokens

    def checked(messages):
        if "?" in messages[-1]["content"]:
            raise NotTextError("no text", remedy="Convert it.")
        return count(messages)

    monkeypatch.setattr(cli.llm, "count_chat_tokens", checked)
    done = cli("chat", stdin=b"a\n?\nb\n")
    assert done.code == 0
    assert done.err_lines[2:4] == ["error: no text", "  fix: Convert it."]
    assert contents(cli) == [["a"], ["a", "b"]]


def test_a_pipe_that_is_not_text_ends_the_chat(cli):
    done = cli("chat", stdin=b"caf\xe9\n")
    assert (done.code, done.out, len(done.err_lines)) == (7, "", 3)
    assert "offset 3" in done.err_lines[1]
    assert "UTF-8" in done.err_lines[2]


def test_other_errors_end_the_chat(cli):
    cli.llm.errors.append(ClosedError("closed", remedy="open"))
    done = cli("chat", stdin=b"a\nb\n")
    assert (done.code, done.err_lines[1:]) == (1, ["error: closed", "  fix: open"])


def test_a_base_model_is_refused(cli):
    cli.llm.has_chat_template = False
    done = cli("chat", stdin=b"a\n")
    assert (done.code, done.out, len(done.err_lines)) == (ChatTemplateError.exit_code, "", 2)
    assert "octavo generate" in done.err_lines[1]


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_blank_lines_are_not_sent(cli, line):
    assert cli("chat", stdin=line.encode() + b"\n").code == 0
    assert not cli.llm.asked


def test_logprobs_have_no_place_in_a_chat(cli):
    done = cli("chat", "--logprobs", "1", stdin=b"hello")
    assert (done.code, done.out) == (2, "")
    assert "--logprobs goes with --json" in done.err_lines[0]
