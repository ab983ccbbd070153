import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.config import build, flatten, load_toml, option, options
from tokenmill.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = option(16, "how many", low=1, high=64)
    share: float = option(0.5, "which part", low=0, high=1)
    kind: str = option("lru", "which one", choices=("lru", "fifo"))
    words: tuple[str, ...] = option((), "some words")
    limit: int | None = option(None, "at most")
    on: bool = option(True, "whether")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: str = option("x", "what it is called")


def test_nothing_given_means_the_defaults():
    assert build(Outer, {}) == Outer()


def test_values_reach_the_fields_they_name():
    built = build(Outer, {"name": "y", "inner": {"size": 3, "words": ["a", "b"], "limit": 4, "on": False}})
    assert built == Outer(Inner(size=3, words=("a", "b"), limit=4, on=False), "y")


def test_a_dash_is_an_underscore():
    @dataclasses.dataclass(frozen=True)
    class One:
        block_size: int = option(1, "")

    assert build(One, {"block-size": 2}) == One(2)


@pytest.mark.parametrize(
    ("values", "code", "field", "hint"),
    [
        ({"nme": "y"}, "unknown_option", "nme", "Did you mean 'name'?"),
        ({"inner": {"sizee": 3}}, "unknown_option", "inner.sizee", "Did you mean 'size'?"),
        ({"inner": 3}, "invalid_option", "inner", "section"),
        ({"inner": {"size": "3"}}, "invalid_option", "inner.size", "of type int"),
        ({"inner": {"size": True}}, "invalid_option", "inner.size", "of type int"),
        ({"inner": {"size": None}}, "invalid_option", "inner.size", "of type int"),
        ({"inner": {"size": 0}}, "invalid_option", "inner.size", "between 1 and 64"),
        ({"inner": {"size": 65}}, "invalid_option", "inner.size", "between 1 and 64"),
        ({"inner": {"share": math.nan}}, "invalid_option", "inner.share", "finite"),
        ({"inner": {"share": 1.5}}, "invalid_option", "inner.share", "between 0 and 1"),
        ({"inner": {"kind": "lruu"}}, "unknown_choice", "inner.kind", "Did you mean 'lru'?"),
        ({"inner": {"on": 1}}, "invalid_option", "inner.on", "of type bool"),
        ({"inner": {"words": "ab"}}, "invalid_option", "inner.words", "of type tuple"),
        ({"inner": {"words": [1]}}, "invalid_option", "inner.words", "of type str"),
    ],
)
def test_a_wrong_value_is_refused_with_its_full_name_and_what_is_allowed(values, code, field, hint):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert (caught.value.code, caught.value.field) == (code, field)
    assert hint in caught.value.message
    assert field in caught.value.message


def test_an_integer_is_a_float_where_one_is_wanted():
    share = build(Outer, {"inner": {"share": 1}}).inner.share
    assert isinstance(share, float)
    assert share == 1.0


@given(st.integers(1, 64), st.floats(0, 1), st.sampled_from(["lru", "fifo"]), st.lists(st.text()))
def test_what_is_flattened_can_be_built_again(size, share, kind, words):
    config = Outer(Inner(size, share, kind, tuple(words)))
    nested: dict = {"inner": {}}
    for name, value in flatten(config).items():
        *section, key = name.split(".")
        (nested[section[0]] if section else nested)[key] = value
    assert build(Outer, nested) == config


def test_options_lists_every_field_with_path_type_default_and_help():
    found = {".".join(each.path): each for each in options(Outer)}
    assert list(found) == ["inner.size", "inner.share", "inner.kind", "inner.words", "inner.limit", "inner.on", "name"]
    kind = found["inner.kind"]
    assert (kind.type, kind.default, kind.help, kind.choices) == (str, "lru", "which one", ("lru", "fifo"))
    assert found["inner.size"].flag == "--size"


def test_toml_is_read_and_its_mistakes_are_told(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[inner]\nsize = 3\n")
    assert load_toml(file) == {"inner": {"size": 3}}
    file.write_text("[inner\n")
    binary = tmp_path / "c.toml"
    binary.write_bytes(b"\xff\xfe")
    wrong = {file: "config_malformed", binary: "config_malformed", tmp_path / "b.toml": "config_not_found"}
    for path, code in (wrong | {tmp_path: "config_not_found"}).items():
        with pytest.raises(ConfigError) as caught:
            load_toml(path)
        assert caught.value.code == code
        assert path.name in caught.value.message
