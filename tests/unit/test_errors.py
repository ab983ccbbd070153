import pytest

from tokenmill import errors
from tokenmill.errors import ConfigError, MissingDependencyError, TokenmillError, did_you_mean


def test_an_error_carries_a_code_a_message_and_the_field_to_blame():
    error = ConfigError("unknown_option", "There is no option 'x'.", "cache.x")
    assert (error.code, error.message, error.field) == ("unknown_option", "There is no option 'x'.", "cache.x")
    assert str(error) == "There is no option 'x'."


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_every_error_can_be_caught_as_one(name):
    assert issubclass(getattr(errors, name), TokenmillError)


def test_a_missing_dependency_says_what_to_install():
    error = MissingDependencyError("fastapi", "The server", "serve")
    assert error.code == "missing_dependency"
    assert "pip install 'tokenmill[serve]'" in error.message


def test_a_near_word_is_suggested():
    assert did_you_mean("fcsf", ["fcfs", "priority"]) == "Did you mean 'fcfs'?"


def test_without_a_near_word_all_are_listed_in_order():
    assert did_you_mean("zzz", ["priority", "fcfs"]) == "Known: fcfs, priority."
