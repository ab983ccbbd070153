import io
import json

import pytest

from tokenmill.cli.commands import run as command
from tokenmill.cli.main import main
from tokenmill.types import FinishReason


@pytest.fixture
def ask(llm, monkeypatch, capsys):
    """Runs ``tokenmill run`` with a fake model and gives exit code, stdout and stderr."""
    configs = []
    monkeypatch.setattr(command, "load", lambda config: configs.append(config) or llm)

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["run", *arguments])
        shown = capsys.readouterr()
        return left.value.code, shown.out, shown.err

    call.configs = configs
    return call


def test_the_answer_goes_to_stdout_through_the_chat_template(ask, llm):
    assert ask("What?", "--system", "Be brief.") == (0, "Hello.\n", "")
    assert llm.asked[0][0] == "system:Be brief.;user:What?;"


def test_a_raw_prompt_is_continued_as_it_stands(ask, llm):
    assert ask("Once upon", "--raw")[:2] == (0, "Hello.\n")
    assert llm.asked[0][0] == "Once upon"


def test_a_dash_reads_the_prompt_from_stdin(ask, llm, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert ask("-", "--raw")[0] == 0
    assert llm.asked[0][0] == "from a pipe"


def test_flags_reach_the_model_and_the_sampling(ask, llm):
    code, _, _ = ask(
        "x", "--model", "some/model", "--temperature", "0.7", "--max-tokens", "9", "--stop", "a", "--seed", "4"
    )
    params = llm.asked[0][1]
    assert code == 0
    assert ask.configs[0].model.model == "some/model"
    assert (params.temperature, params.max_tokens, params.stop, params.seed) == (0.7, 9, ["a"], 4)


def test_by_default_the_answer_is_greedy_and_as_long_as_it_wants(ask, llm):
    ask("x")
    assert llm.asked[0][1].greedy
    assert llm.asked[0][1].max_tokens is None


def test_json_has_the_answer_and_its_figures(ask):
    code, out, _ = ask("x", "--raw", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["text"], told["finish_reason"]) == ("Hello.", "stop")
    assert (told["prompt_tokens"], told["cached_tokens"], told["completion_tokens"]) == (1, 3, 6)


def test_a_value_out_of_range_is_told_before_the_model_is_loaded(ask):
    code, out, err = ask("x", "--temperature", "-1")
    assert (code, out, ask.configs) == (2, "", [])
    assert err.startswith("error[invalid_parameter]: temperature")


def test_an_interrupted_answer_exits_with_130(ask, llm):
    llm.error = KeyboardInterrupt()
    assert ask("x")[:2] == (130, "Hel\n")


def test_an_answer_that_the_engine_could_not_end_is_a_failure(ask, llm):
    llm.reason = FinishReason.ERROR
    code, _, err = ask("x")
    assert code == 1
    assert err.startswith("error[engine_failed]")
