"""Answers follow their grammar, whatever else is asked for; what cannot be followed is refused with the reason."""

import asyncio
import json
import re
import threading
from concurrent.futures import Future
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.executor import LocalExecutor
from tokenmill.engine.grammar import Grammars
from tokenmill.errors import RequestError
from tokenmill.llm import LLM, AsyncLLM
from tokenmill.testing import FakeExecutor, fake_facts, random_model
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import EngineRequest, FinishReason, SamplingParams, StructuredOutput

SCHEMAS = json.loads((Path(__file__).parents[3] / "benchmarks" / "schemas.json").read_text())
EOS = 257
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def config(path, **sections) -> EngineConfig:
    return build(EngineConfig, {"model": {"model": str(path)}, **sections})


@pytest.fixture(scope="module")
def llm(tiny_model_path):
    return LLM(config=config(tiny_model_path))


@pytest.fixture(scope="module")
def demo():
    return LLM("demo")


def answer(llm, structured, **params):
    """One completion."""
    params = {"temperature": 1.5, "seed": 1, "max_tokens": 400, **params}
    return llm.generate("hello", SamplingParams(structured=structured, **params))[0].outputs[0]


def valid(text, schema) -> bool:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(json.loads(text))


# ---- each kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_regex_matches_the_whole_answer(llm, seed):
    found = answer(llm, StructuredOutput(regex=r"[A-Z][a-z]{2,5} (\d{2}|né)"), seed=seed)
    assert re.fullmatch(r"[A-Z][a-z]{2,5} (\d{2}|né)", found.text)
    assert found.finish_reason is FinishReason.STOP


def test_every_choice_can_be_chosen_and_nothing_else(llm):
    choices = ["yes", "no", 'a "quote"', "back\\slash", "tab\t", "日本", "a/b"]
    assert {answer(llm, StructuredOutput(choice=choices), seed=seed).text for seed in range(60)} == set(choices)


def test_json_object_is_an_object(demo):
    found = answer(demo, StructuredOutput(json_object=True), max_tokens=None)
    assert isinstance(json.loads(found.text), dict)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_holds(demo, temperature):
    found = answer(demo, StructuredOutput(json_schema=PERSON), temperature=temperature)
    assert valid(found.text, json.loads(PERSON))
    assert found.finish_reason is FinishReason.STOP


def test_a_lark_grammar_may_hold_json_and_special_tokens(llm):
    grammar = 'start: "n=" n <|im_start|> "!"\nn: %json {"type": "integer", "minimum": 10, "maximum": 99}'
    found = answer(llm, StructuredOutput(grammar=grammar), skip_special_tokens=False)
    assert re.fullmatch(r"n=[1-9]\d<\|im_start\|>!<\|im_end\|>", found.text)


def test_a_gbnf_grammar_is_taken_too(llm):
    grammar = 'root ::= item ("," item){1,2}\nitem ::= [a-c] "\\u00e9" | "\\\\u"  # a comment'
    found = answer(llm, StructuredOutput(grammar=grammar))
    assert re.fullmatch(r"([a-c]é|\\u)(,([a-c]é|\\u)){1,2}", found.text)


def test_every_schema_is_followed_at_a_high_temperature(demo):
    prompts = [[{"role": "user", "content": f"JSON, please ({number})"}] for number in range(5)]
    for name, schema in SCHEMAS.items():
        structured = StructuredOutput(json_schema=json.dumps(schema))
        params = SamplingParams(structured=structured, temperature=1.5, seed=7, max_tokens=None)
        for output in demo.chat(prompts, params):
            completion = output.outputs[0]
            assert completion.finish_reason is FinishReason.STOP, name
            assert valid(completion.text, schema), (name, completion.text)


def test_whitespace_between_tokens_is_bounded(llm):
    structured = StructuredOutput(json_schema='{"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}')
    # The model would rather write spaces and line ends than anything else.
    bias = dict.fromkeys(llm.tokenizer.encode(" \n\t"), 50.0)
    found = answer(llm, structured, logit_bias=bias, temperature=0.0)
    assert json.loads(found.text) == [1, 1]
    assert found.finish_reason is FinishReason.STOP


# ---- together with other parameters ------------------------------------------------------------------------------


def test_completions_differ_and_each_follows_the_grammar(llm):
    params = SamplingParams(structured=StructuredOutput(regex="[a-z]{8}"), n=4, seed=3, temperature=1.5, max_tokens=20)
    texts = [completion.text for completion in llm.generate("hello", params)[0].outputs]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
    assert len(set(texts)) == 4


def test_what_else_is_in_the_batch_does_not_change_the_answer(llm):
    grammars = [StructuredOutput(regex="[a-z]{9}"), None, StructuredOutput(json_schema=PERSON), None]
    params = [SamplingParams(structured=g, temperature=1.5, seed=5, max_tokens=60) for g in grammars]
    together = llm.generate(["hello"] * 4, params)
    alone = [llm.generate("hello", one)[0] for one in params]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_a_complete_answer_ends_although_end_of_text_is_ignored_or_not_due(llm):
    for params in ({"ignore_eos": True}, {"min_tokens": 50}, {"bad_words_ids": [[EOS]]}, {"logit_bias": {EOS: -100.0}}):
        found = answer(llm, StructuredOutput(regex="abc"), **params)
        assert (found.text, found.finish_reason) == ("abc", FinishReason.STOP), params


def test_min_tokens_makes_an_answer_longer_where_the_grammar_can_go_on(llm):
    found = answer(llm, StructuredOutput(regex="[ab]{1,200}"), min_tokens=40, logit_bias={EOS: 50.0})
    assert re.fullmatch("[ab]{40}", found.text)


def test_a_model_without_end_of_text_ends_where_the_grammar_does(tmp_path):
    folder = random_model(tmp_path / "endless")
    (folder / "generation_config.json").write_text("{}")
    found = answer(LLM(config=config(folder)), StructuredOutput(regex="ab{2,4}"))
    assert (found.text, found.finish_reason) == ("abbbb", FinishReason.STOP)


def test_logits_wider_than_the_vocabulary_are_masked(tmp_path):
    llm = LLM(config=config(random_model(tmp_path / "wide", vocab_size=333)))
    for seed in range(5):
        assert re.fullmatch("[^a]{9}", answer(llm, StructuredOutput(regex="[^a]{9}"), seed=seed).text)


def test_a_request_that_leaves_no_token_ends_with_the_reason_and_harms_nobody(llm):
    impossible = SamplingParams(structured=StructuredOutput(regex="abc"), allowed_token_ids=llm.tokenizer.encode("ac"))
    fine = SamplingParams(structured=StructuredOutput(regex="abc"))
    stuck, good = (output.outputs[0] for output in llm.generate(["hello"] * 2, [impossible, fine]))
    assert (stuck.finish_reason, stuck.error.code, stuck.text) == (FinishReason.ERROR, "grammar_dead_end", "a")
    assert (good.text, good.finish_reason) == ("abc", FinishReason.STOP)
    assert llm.engine.stats().blocks_used == 0


def test_bad_words_are_avoided_within_the_grammar(llm):
    structured = StructuredOutput(choice=["a", "b"])
    assert {answer(llm, structured, bad_words=["a"], seed=seed).text for seed in range(20)} == {"b"}


def test_max_tokens_cuts_an_answer(llm):
    found = answer(llm, StructuredOutput(regex="a{50}"), max_tokens=7)
    assert (found.text, found.finish_reason) == ("a" * 7, FinishReason.LENGTH)


def test_log_probabilities_are_those_of_the_model_not_of_the_grammar(llm):
    found = answer(llm, StructuredOutput(regex="xyz"), logprobs=1, temperature=0.0)
    assert any(entry.rank > 1 for entry in found.logprobs)
    assert all(entry.logprobs[0] < 0 for entry in found.logprobs)


# ---- refusals ----------------------------------------------------------------------------------------------------

DEEP = "(" * 40_000 + "a" + ")" * 40_000
RULES = "".join(f'r{i}: r{i + 1} "a" | "a"\n' for i in range(4000))
CHAIN = {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3500)} | {"a3500": {"const": 1}}}


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({"json_schema": '{"not": {}}'}, "unsupported_schema", "not"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "unsupported_schema", "uniqueItems"),
        ({"json_schema": '{"x-guidance": {"lenient": true}, "not": {}}'}, "unsupported_schema", "not"),
        ({"json_schema": '{"oneOf": [{"type": "integer"}, {"type": "number"}]}'}, "unsupported_schema", "oneOf"),
        ({"json_schema": '{"$ref": "http://example.com/schema"}'}, "unsupported_schema", "example.com"),
        ({"json_schema": '{"type": "string", "format": "poem"}'}, "unsupported_schema", "poem"),
        ({"json_schema": '{"type": "integer", "minimum": 3, "maximum": 2}'}, "unsupported_schema", "minimum"),
        ({"json_schema": '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'}, "unsupported_schema", "text"),
        ({"json_schema": "{"}, "unsupported_schema", "EOF"),
        ({"json_schema": "[]"}, "unsupported_schema", "object"),
        ({"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000}, "unsupported_schema", "Recursion"),
        ({"json_schema": json.dumps({"enum": [f"{i:030}" for i in range(8000)]})}, "unsupported_schema", "bytes"),
        ({"regex": "(a"}, "invalid_grammar", "unclosed"),
        ({"regex": r"[^\s\S]"}, "invalid_grammar", "no text"),
        ({"regex": r"a(?=b)"}, "invalid_grammar", "look"),
        ({"regex": DEEP}, "invalid_grammar", "nest"),
        ({"grammar": "start: missing"}, "invalid_grammar", "missing"),
        ({"grammar": "start: start"}, "invalid_grammar", "no text"),
        ({"grammar": "root ::= missing"}, "invalid_grammar", "missing"),
        ({"grammar": "root ::= " + DEEP}, "invalid_grammar", "recursion"),
        ({"grammar": "start: <|no_such_token|>"}, "invalid_grammar", "no_such_token"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_with_the_field_and_the_reason(llm, given, code, says):
    with pytest.raises(RequestError, match=f"(?s){says}") as caught:
        answer(llm, StructuredOutput(**given))
    assert (caught.value.code, caught.value.field) == (code, next(iter(given)))
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(json_schema=json.dumps({"$ref": "#/$defs/a0", **CHAIN})),
        StructuredOutput(grammar="start: r0\n" + RULES + 'r4000: "b"'),
        StructuredOutput(grammar="start: R0\n" + "".join(f'R{i}: "a" R{i + 1}\n' for i in range(5000)) + 'R5000: "b"'),
        StructuredOutput(regex="((a{1,1000}){1,1000}){1,1000}"),
        StructuredOutput(grammar='start: s\ns: s s | s s s | "a" | ""'),
        StructuredOutput(
            json_schema=json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2500)}})
        ),
    ],
    ids=["chain of $ref", "chain of rules", "chain of terminals", "nested repetition", "ambiguity", "properties"],
)
def test_a_hostile_grammar_is_refused_or_served_and_the_engine_goes_on(llm, structured):
    assert outcome(llm, structured) in ("stop", "length", "unsupported_schema", "invalid_grammar", "grammar_failed")
    assert answer(llm, StructuredOutput(regex="abc")).text == "abc"


def outcome(llm, structured) -> str:
    """How a request ends: its finish reason, or the code of its error."""
    try:
        found = answer(llm, structured, max_tokens=20)
    except RequestError as error:
        return error.code
    return found.error.code if found.error else found.finish_reason


def test_a_grammar_that_takes_too_much_work_midway_ends_its_request_alone(llm):
    # Behind the first letter wait more ways to go on than a row of the parser may hold.
    hard = StructuredOutput(grammar='start: "a" s\nr: "b"\ns: ' + "r? " * 10_000)
    easy = StructuredOutput(regex="abc")
    params = [SamplingParams(structured=structured, max_tokens=100) for structured in (hard, easy)]
    first, second = (output.outputs[0] for output in llm.generate(["hello"] * 2, params))
    assert (first.finish_reason, first.error.code) == (FinishReason.ERROR, "grammar_failed")
    assert second.text == "abc"


# ---- the mechanism -----------------------------------------------------------------------------------------------


def test_a_request_waits_for_its_grammar_and_others_go_on():
    class Slow(FakeExecutor):
        compiling: Future[None] = Future()

        def prepare(self, params):
            return self.compiling if params.structured else super().prepare(params)

    executor = Slow(fake_facts())
    engine = Engine(EngineConfig(), executor)
    grammar = StructuredOutput(regex="a")
    for name, structured in (("slow", grammar), ("fast", None)):
        params = SamplingParams(max_tokens=2, structured=structured)
        engine.add(EngineRequest(request_id=name, prompt_token_ids=[1, 2], params=params, arrival=0.0))
    ended = [output.request_id for _ in range(3) for output in engine.step() if output.finish_reason]
    assert ended == ["fast"]
    assert engine.stats().waiting_by_reason == {"grammar": 1}
    executor.compiling.set_result(None)
    ended = [output.request_id for _ in range(3) for output in engine.step() if output.finish_reason]
    assert ended == ["slow"]


def test_preemption_does_not_change_an_answer(tiny_model_path):
    structured = StructuredOutput(json_schema=PERSON)
    work = [SamplingParams(structured=structured, temperature=1.5, seed=seed, max_tokens=80) for seed in range(6)]

    def texts(**cache):
        model = {"model": str(tiny_model_path), "max_model_len": 96}
        llm = LLM(config=config(tiny_model_path, model=model, cache=cache))
        found = [output.outputs[0].text for output in llm.generate(["hello there, who are you?"] * 6, work)]
        return found, llm.engine.stats().preemptions

    calm, none = texts()
    layout = LLM(config=config(tiny_model_path)).engine.facts.layout
    tight, some = texts(memory_gib=18 * layout.block_bytes / 2**30, block_size=8)
    assert (none, some > 0) == (0, True)
    assert tight == calm


def test_a_request_keeps_no_matcher_once_it_has_ended(tiny_model_path):
    executor = LocalExecutor(config(tiny_model_path))
    engine = Engine(EngineConfig(), executor)
    masks = executor._runner._masks
    tokenizer = Tokenizer.load(tiny_model_path)

    def serve(name, structured):
        params = SamplingParams(structured=structured, max_tokens=5, ignore_eos=True)
        engine.add(EngineRequest(request_id=name, prompt_token_ids=[1, 2], params=params, arrival=0.0))
        tokens = []
        while engine.has_work:
            tokens += [token for output in engine.step() for token in output.token_ids]
        return tokenizer.decode(tokens)

    assert serve("a", StructuredOutput(regex="abcd")) == "abcd"
    assert masks._followers.keys() == {"a"}  # until the next step
    assert serve("a", StructuredOutput(regex="wxyz")) == "wxyz"  # the same name again
    serve("b", None)
    assert not masks._followers


def test_a_grammar_that_reaches_the_engine_unchecked_ends_its_request_with_the_reason(tiny_model_path):
    engine = Engine(EngineConfig(), LocalExecutor(config(tiny_model_path)))
    params = SamplingParams(structured=StructuredOutput(regex="(a"))
    engine.add(EngineRequest(request_id="a", prompt_token_ids=[1, 2], params=params, arrival=0.0))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (output,) = outputs
    assert (output.finish_reason, output.error.code) == (FinishReason.ERROR, "invalid_grammar")


def test_a_grammar_is_compiled_once_and_on_another_thread(tiny_model_path):
    grammars = Grammars(config(tiny_model_path))
    seen = []
    compile_ = grammars._compile
    grammars._compile = lambda structured: seen.append(threading.current_thread().name) or compile_(structured)
    first, second = (grammars.compile(StructuredOutput(regex="ab")) for _ in range(2))
    assert first.result() is second.result()
    assert [name.startswith("tokenmill-grammar") for name in seen] == [True]


async def test_an_engine_process_serves_and_refuses_grammars(tiny_model_path):
    llm = await AsyncLLM.start(config(tiny_model_path))

    async def text(structured, seed=0):
        params = SamplingParams(structured=structured, temperature=1.5, seed=seed, max_tokens=60)
        return [output async for output in llm.generate("hello", params)][-1].outputs[0].text

    try:
        found = await asyncio.gather(*(text(StructuredOutput(regex="[a-z]{5}"), seed) for seed in range(4)))
        assert all(re.fullmatch("[a-z]{5}", each) for each in found)
        with pytest.raises(RequestError) as caught:
            await text(StructuredOutput(json_schema='{"not": {}}'))
        assert caught.value.code == "unsupported_schema"
        assert await text(StructuredOutput(choice=["only"])) == "only"
    finally:
        await llm.close()


_LEAVES = st.sampled_from(
    [
        {"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1, None]}, {"const": "é"},
        {"type": "integer", "minimum": -20, "maximum": 300}, {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[ab]{1,3}$"}, {"type": ["string", "null"], "maxLength": 2},
        {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5},
    ]
)  # fmt: skip


def _object(properties: dict, required: bool) -> dict:
    names = list(properties) if required else list(properties)[:1]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _array(item: dict, least: int) -> dict:
    return {"type": "array", "items": item, "minItems": least, "maxItems": least + 1}


_NAMES = st.text('abé" ', min_size=1, max_size=3)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(_NAMES, inner, max_size=3), st.booleans()),
        st.builds(_array, inner, st.integers(0, 2)),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=_SCHEMAS, seed=st.integers(0, 1000))
def test_whatever_is_generated_is_accepted_from_scratch(llm, schema, seed):
    structured = StructuredOutput(json_schema=json.dumps(schema))
    found = answer(llm, structured, seed=seed, max_tokens=300)
    matcher = llm._grammars.compile(structured).result().copy()
    tokens = [token for token in found.token_ids if token != EOS]
    matcher.accept(tokens)  # raises when it is not
    if found.finish_reason is FinishReason.STOP:
        assert matcher.complete
        assert valid(found.text, schema)
