import json

import pytest

from tokenmill.cli.commands import chat as command
from tokenmill.cli.commands.chat import Chat
from tokenmill.cli.main import main
from tokenmill.errors import RequestError
from tokenmill.types import SamplingParams


@pytest.fixture
def told():
    return []


@pytest.fixture
def chat(llm, told):
    return Chat(llm, SamplingParams(), "Be nice.", told.append, told.append)


def test_every_turn_is_asked_after_all_the_turns_before_it(chat, llm):
    assert chat.say("one") is True
    assert chat.say("two") is True
    assert [text for text, _ in llm.asked] == [
        "system:Be nice.;user:one;",
        "system:Be nice.;user:one;assistant:Hello.;user:two;",
    ]


def test_the_answer_streams_and_its_figures_follow(chat, told):
    chat.say("one")
    assert told[:3] == ["Hel", "lo.", "\n"]
    assert "6 tokens" in told[3]


def test_an_empty_line_asks_nothing(chat, llm):
    assert chat.say("   ") is True
    assert llm.asked == []


def test_reset_forgets_the_turns_and_keeps_the_system_message(chat):
    chat.say("one")
    chat.say("/reset")
    assert chat.messages == [{"role": "system", "content": "Be nice."}]


def test_system_sets_the_message_and_starts_over(chat):
    chat.say("one")
    chat.say("/system Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.say("/system")
    assert chat.messages == []


def test_save_writes_the_conversation(chat, tmp_path):
    chat.say("grüß dich")
    file = tmp_path / "saved.json"
    chat.say(f"/save {file}")
    assert json.loads(file.read_text()) == chat.messages
    assert "grüß" in file.read_text()


@pytest.mark.parametrize("where", ["", "/no/such/folder/file"])
def test_a_failed_save_is_told_and_the_chat_goes_on(chat, told, where):
    assert chat.say(f"/save {where}") is True
    assert "Saved" not in told[-1]
    assert told


def test_stats_add_up_all_answers(chat, told):
    chat.say("/stats")
    assert told[-1] == "No answer yet."
    chat.say("one")
    chat.say("two")
    chat.say("/stats")
    assert "2 answers, 12 tokens" in told[-1]
    assert "6 of" in told[-1]


def test_help_lists_every_command_and_a_wrong_one_leads_to_it(chat, told):
    chat.say("/help")
    listed = [line.split()[0] for line in told]
    assert listed == ["/reset", "/system", "/save", "/stats", "/help", "/exit"]
    chat.say("/hlep")
    assert [line.split()[0] for line in told[7:]] == listed


def test_exit_leaves(chat):
    assert chat.say("/exit") is False


def test_a_refused_turn_is_told_and_not_kept(chat, llm, told):
    llm.error = RequestError("prompt_too_long", "Too long.")
    assert chat.say("one") is True
    assert told[-1] == "error[prompt_too_long]: Too long."
    assert chat.turns == []


def test_an_interrupted_answer_is_kept_as_far_as_it_went(chat, llm):
    llm.error = KeyboardInterrupt()
    assert chat.say("one") is True
    assert chat.turns[-1] == {"role": "assistant", "content": "Hel"}


def test_the_command_reads_lines_until_the_end_of_input(llm, monkeypatch, capsys):
    lines = iter(["one", "two"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(command, "load", lambda _: llm)
    monkeypatch.setattr(command, "_reader", lambda: read)
    with pytest.raises(SystemExit) as left:
        main(["chat", "--system", "S"])
    assert left.value.code == 0
    assert capsys.readouterr().out == "Hello.\nHello.\n"
    assert llm.asked[-1][0] == "system:S;user:one;assistant:Hello.;user:two;"
