import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import RequestError
from tokenmill.types import EngineRequest, SamplingParams, StructuredOutput


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {1: math.nan}),
        ("allowed_token_ids", []),
        ("bad_words", [""]),
        ("bad_words_ids", [[]]),
        ("seed", 2**63),
        ("stop", [""]),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("prompt_logprobs", 65),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", field)
    assert field in caught.value.message


@pytest.mark.parametrize(("given_stop", "kept"), [(None, []), ("end", ["end"]), (["a", "b"], ["a", "b"])])
def test_stop_is_a_list_after_construction(given_stop, kept):
    assert SamplingParams(stop=given_stop).stop == kept


@pytest.mark.parametrize(("temperature", "top_k", "greedy"), [(0.0, 0, True), (1.0, 1, True), (1.0, 0, False)])
def test_greedy_is_temperature_zero_or_one_candidate(temperature, top_k, greedy):
    assert SamplingParams(temperature=temperature, top_k=top_k).greedy is greedy


def test_no_longest_answer_allows_any_shortest_one():
    assert SamplingParams(max_tokens=None, min_tokens=1000).min_tokens == 1000


@given(
    st.builds(
        EngineRequest,
        request_id=st.text(),
        prompt_token_ids=st.lists(st.integers(0, 2**31)),
        arrival=st.floats(0, 1e9),
        priority=st.integers(-100, 100),
        deadline=st.none() | st.floats(0, 1e9),
        params=st.builds(
            SamplingParams,
            temperature=st.floats(0, 100),
            top_p=st.floats(0.01, 1),
            seed=st.none() | st.integers(-(2**63), 2**63 - 1),
            stop=st.lists(st.text(min_size=1)),
            logit_bias=st.none() | st.dictionaries(st.integers(0, 1000), st.floats(-100, 100)),
        ),
    )
)
def test_a_request_survives_the_way_between_processes(request_):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request_), type=EngineRequest) == request_


def test_what_crosses_the_boundary_is_checked_again():
    with pytest.raises((RequestError, msgspec.ValidationError)):
        msgspec.json.decode(b'{"temperature": -1.0}', type=SamplingParams)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"temprature": 1.0}', type=SamplingParams)


def test_structured_output_is_exactly_one_thing():
    assert StructuredOutput(regex="a").kind == "regex"
    assert StructuredOutput(json_object=True).kind == "json_object"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "structured"),
        ({"json_object": False}, "structured"),
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"json_schema": ""}, "json_schema"),
        ({"choice": []}, "choice"),
        ({"choice": ["a", ""]}, "choice"),
        ({"regex": "\ud800"}, "regex"),
    ],
)
def test_structured_output_that_says_nothing_or_too_much_is_refused(given, field):
    with pytest.raises(RequestError) as caught:
        StructuredOutput(**given)
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", field)
