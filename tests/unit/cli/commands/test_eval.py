import json
import math

import pytest
from rich.progress import Progress

from tokenmill.bench import evaluate
from tokenmill.cli.commands import eval as command
from tokenmill.cli.commands.eval import Evaluated, divergence
from tokenmill.cli.main import main
from tokenmill.quant.scheme import Rounding


@pytest.fixture
def model(llm):
    return Evaluated(llm, context=16, bar=Progress(disable=True))


def test_a_text_begins_with_the_token_that_begins_one_or_else_ends_one(llm, model):
    assert model.start_token == llm.tokenizer.eos_token_ids[-1]
    llm.tokenizer.special_tokens = {"bos_token": "^"}
    assert Evaluated(llm, context=16, bar=Progress(disable=True)).start_token == ord("^")


def test_a_model_answers_greedily_and_in_order(model, llm):
    conversations = [[{"role": "user", "content": str(number)}] for number in range(150)]
    tools = [[] for _ in conversations]
    tools[7] = [{"type": "function", "function": {"name": "f"}}]
    assert model.chat(conversations, tools, max_tokens=5) == ["Hello."] * 150
    asked = [text for text, _ in llm.asked]
    assert asked[0] == "user:0;"
    assert asked[149] == "user:149;"
    assert "'name': 'f'" in asked[7]
    assert all(params.greedy and params.max_tokens == 5 for _, params in llm.asked)


def test_log_probabilities_are_those_of_every_token_after_the_first(model):
    assert model.logprobs([[5, 6, 7], [5, 2]]) == [[-6.0, -7.0], [-2.0]]


def test_the_command_prints_the_evaluation_as_json(llm, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda _: llm)
    with pytest.raises(SystemExit) as left:
        main(["eval", "-n", "3", "--task", "add", "--task", "copy", "--files", "1", "--json"])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "demo"
    assert {kind: score["n"] for kind, score in told["tasks"].items()} == {"add": 3, "copy": 3}
    assert told["tasks"]["add"]["correct"] == 0
    assert told["compression"]["files"] == 1


def test_the_table_has_a_row_for_every_task(llm, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda _: llm)
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["eval", "-n", "1", "--files", "2"])
    shown = capsys.readouterr().out
    assert [kind for kind in evaluate.KINDS if kind not in shown] == []
    assert "bits per byte" in shown


def test_how_a_model_is_rounded_is_told(llm, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(command, "load", lambda config: loaded.append(config.model.rounding) or llm)
    monkeypatch.setenv("COLUMNS", "120")
    ask = ["eval", "--quantize", "int4", "--quantize-head", "int4", "--activations", "bf16", "-n", "1", "--files", "1"]
    with pytest.raises(SystemExit):
        main([*ask, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [told[name] for name in ("quantize", "quantize_head", "activations")] == ["int4", "int4", "bf16"]
    assert loaded == [Rounding("int4", "int4", "bf16"), Rounding()]
    with pytest.raises(SystemExit):
        main(ask)
    assert "demo in int4, int4 head, bf16 activations" in capsys.readouterr().out


def test_a_misspelt_task_is_told_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda _: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as left:
        main(["eval", "--task", "ad"])
    assert left.value.code == 2
    assert "Did you mean 'add'?" in capsys.readouterr().err


def test_a_quantized_model_is_compared_with_the_model_as_it_is(llm, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(command, "load", lambda config: loaded.append(config.model.quantize) or llm)
    ask = ["eval", "--quantize", "int8", "-n", "2", "--task", "add", "--files", "2"]
    with pytest.raises(SystemExit):
        main([*ask, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert loaded == ["int8", "none"]
    assert told["quantize"] == "int8"
    assert told["against"]["model"] == "demo"
    assert told["compression"] == told["against"]["compression"]
    assert told["kl_nats"] == told["relative_loss"] == 0.0
    with pytest.raises(SystemExit):
        main(ask)
    shown = capsys.readouterr().out
    assert "demo in int8" in shown
    assert "+0.00% bits per byte, KL divergence 0.0000 nats" in shown


def test_a_quantized_cache_is_compared_with_one_of_the_model_s_type(llm, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(command, "load", lambda config: loaded.append(config.cache.kv_dtype) or llm)
    ask = ["eval", "--kv-dtype", "int8", "-n", "2", "--task", "add", "--files", "2"]
    with pytest.raises(SystemExit):
        main([*ask, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert loaded == ["int8", "auto"]
    assert (told["kv_dtype"], told["relative_loss"]) == ("int8", 0.0)
    with pytest.raises(SystemExit):
        main(ask)
    assert "demo, KV in int8" in capsys.readouterr().out


def test_a_model_is_compared_with_the_one_it_was_made_from(llm, monkeypatch, capsys):
    def other(config):
        loaded.append(config.model.model)
        if config.model.model == "demo":
            monkeypatch.setattr(Evaluated, "logprobs", lambda _, windows: [[-2.0] * (len(ids) - 1) for ids in windows])
        else:
            monkeypatch.setattr(Evaluated, "logprobs", lambda _, windows: [[-3.0] * (len(ids) - 1) for ids in windows])
        return llm

    loaded = []
    monkeypatch.setattr(command, "load", other)
    ask = ["eval", "--model", "made", "--against", "demo", "-n", "1", "--task", "add", "--files", "1", "--json"]
    with pytest.raises(SystemExit):
        main(ask)
    told = json.loads(capsys.readouterr().out)
    assert loaded == ["made", "demo"]
    assert (told["model"], told["against"]["model"]) == ("made", "demo")
    assert told["relative_loss"] == pytest.approx(0.5)


def test_divergence_is_that_of_the_known_distributions():
    p, q = (
        {1: math.log(0.5), 2: math.log(0.3), 3: math.log(0.2)},
        {1: math.log(0.2), 2: math.log(0.7), 3: math.log(0.1)},
    )
    exact = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.7) + 0.2 * math.log(2)
    assert divergence([p, p], [q, p]) == pytest.approx(exact / 2)


def test_tokens_that_one_side_does_not_know_count_as_one():
    p, q = {1: math.log(0.5), 2: math.log(0.3)}, {1: math.log(0.2), 3: math.log(0.7)}
    assert divergence([p], [q]) == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8))
