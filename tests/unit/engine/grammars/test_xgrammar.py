"""xgrammar where it is installed, and what is said where it is not."""

import importlib.util
import json
import re

import jsonschema
import pytest

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.grammar import Grammars
from tokenmill.errors import MissingDependencyError, RequestError
from tokenmill.llm import LLM
from tokenmill.types import SamplingParams, StructuredOutput

CONFIG = EngineConfig(grammar_backend="xgrammar")
INSTALLED = importlib.util.find_spec("xgrammar") is not None
needs_xgrammar = pytest.mark.skipif(not INSTALLED, reason="xgrammar is not installed")


@pytest.mark.skipif(INSTALLED, reason="xgrammar is installed")
def test_without_the_package_the_extra_is_named():
    with pytest.raises(MissingDependencyError, match=r"tokenmill\[xgrammar\]"):
        Grammars(CONFIG)


def checked(schema) -> None:
    from tokenmill.engine.grammars.xgrammar import _check

    _check(StructuredOutput(json_schema=schema if isinstance(schema, str) else json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"allOf": [{"type": "object"}]}, "allOf"),
        ({"type": "array", "items": {"properties": {"a": {"not": {}}}}}, "not"),
        ({"$defs": {"a": {"format": "date"}}, "$ref": "#/$defs/a"}, "format"),
        ({"type": "number", "minimum": 1}, "integers"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "length"),
        ({"anyOf": [{"type": "string"}], "properties": {}}, "beside anyOf"),
        ({"properties": 5}, "Properties"),
        ("{", "property name"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "recursion"),
    ],
)
def test_a_schema_that_it_would_not_enforce_is_refused(schema, says):
    with pytest.raises(RequestError, match=says) as caught:
        checked(schema)
    assert caught.value.code == "unsupported_schema"


def test_a_schema_that_it_enforces_is_let_through():
    checked({"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "integer", "minimum": 1}}})


@needs_xgrammar
def test_it_serves_every_kind():
    llm = LLM("demo", config=CONFIG)
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["a"]}

    def text(**given) -> str:
        params = SamplingParams(structured=StructuredOutput(**given), temperature=1.5, seed=1, max_tokens=200)
        return llm.generate("hello", params)[0].outputs[0].text

    assert re.fullmatch("[a-c]{3}x", text(regex="[a-c]{3}x"))
    assert text(choice=["né", "yes"]) in ("né", "yes")
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text(json_schema=json.dumps(schema))))
    assert re.fullmatch("a[bc]{2}", text(grammar='root ::= "a" [bc]{2}'))
    with pytest.raises(RequestError, match="GBNF"):
        text(grammar='start: "a"')
