"""`tokenmill keys`: what it prints, and that a server would take what it makes."""

import json

import pytest

from tokenmill.cli import main as cli
from tokenmill.server.config import StoreConfig
from tokenmill.server.tenancy.keys import Keyring, Keys
from tokenmill.server.tenancy.store import Store


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, code=0):
        with pytest.raises(SystemExit) as left:
            cli.main(["keys", *words, "--state", str(tmp_path)])
        assert left.value.code == code
        return capsys.readouterr()

    return call


@pytest.fixture
def recognize(tmp_path):
    def recognize(secret):
        keyring = Keyring(Keys(Store(StoreConfig(state=str(tmp_path)))))
        keyring.refresh()
        return keyring.recognize(secret)

    return recognize


def test_the_first_key_is_made_where_there_was_nothing_and_shown_alone_on_stdout(call, recognize):
    told = call("create", "admin", "--scopes", "admin, metrics")
    [secret] = told.out.splitlines()
    assert recognize(secret).scopes == {"admin", "metrics"}
    assert "only time" in told.err


def test_everything_about_a_key_can_be_said(call, recognize):
    words = ["--models", "a,b", "--priority", "-2", "--requests-per-minute", "5", "--tokens-per-minute", "6"]
    words += ["--concurrency", "7", "--tokens-per-day", "8", "--dollars-per-day", "0.5", "--expires-days", "1"]
    made = json.loads(call("create", "agents", *words, "--owner", "Ada", "--note", "n", "--json").out)
    principal = recognize(made["key"])
    assert (principal.models, principal.priority) == ({"a", "b"}, -2)
    assert made["limits"] == {
        "requests_per_minute": 5, "tokens_per_minute": 6, "concurrency": 7, "tokens_per_day": 8, "dollars_per_day": 0.5,
    }  # fmt: skip
    assert made["expires"] == pytest.approx(made["created"] + 86_400, abs=5)
    assert (made["owner"], made["note"]) == ("Ada", "n")


def test_rotate_and_revoke(call, recognize):
    made = json.loads(call("create", "x", "--json").out)
    second = json.loads(call("rotate", made["id"], "--json").out)["key"]
    assert recognize(made["key"])
    assert recognize(second)
    third = call("rotate", made["id"], "--grace-s", "0").out.strip()
    assert (recognize(second), bool(recognize(third))) == (None, True)
    assert "revoked" in call("revoke", made["id"]).out
    assert recognize(third) is None


def test_the_list_shows_names_as_they_are_and_no_secret(call):
    secret = call("create", "[red]odd[/red] ../x").out.strip()
    told = call("list").out
    assert "[red]odd[/red] ../x" in told
    assert secret.rpartition("-")[2] not in told
    [listed] = json.loads(call("list", "--json").out)
    assert listed["name"] == "[red]odd[/red] ../x"
    assert "key" not in listed


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["creat", "x"], "Did you mean 'create'"), (["create"], "needs a name"), (["revoke"], "needs the id"),
        (["revoke", "000000000000"], "error[key_not_found]"), (["rotate", "../../x"], "error[key_not_found]"),
        (["create", "x", "--scopes", "root"], "no scope 'root'"),
        (["create", "x", "--concurrency", "0"], "concurrency"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(call, words, error):
    told = call(*words, code=2)
    assert error in told.err
    assert told.err.count("\n") == 1
