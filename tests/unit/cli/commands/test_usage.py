"""`tokenmill usage`: a table for people, rows for programs."""

import csv
import json

import pyarrow.parquet
import pytest

from tokenmill.cli import main as cli
from tokenmill.server.config import StoreConfig
from tokenmill.server.tenancy.ledger import Entry
from tokenmill.server.tenancy.store import USAGE, Store


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, code=0):
        with pytest.raises(SystemExit) as left:
            cli.main(["usage", *words, "--state", str(tmp_path)])
        assert left.value.code == code
        return capsys.readouterr()

    return call


@pytest.fixture
def two_requests(tmp_path):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    values = {
        "key_id": "", "endpoint": "/v1/completions", "prompt_tokens": 1500, "cached_tokens": 4, "completion_tokens": 5,
        "rejected_tokens": 0, "queue_s": None, "first_token_s": None, "total_s": 2.0, "dollars": 0.125,
        "finish": "stop", "error_code": "",
    }  # fmt: skip
    entries = [Entry(request_id=f"r{i}", finished=1.764e9 + i * 86_400, model=f"[b]m{i}", **values) for i in (0, 1)]
    with store.writing() as connection:
        store.insert_new(connection, USAGE, [entry.row() for entry in entries])
    store.close()


def test_where_nothing_was_used_it_says_so(call):
    assert call().out.strip() == "Nothing was used."
    assert json.loads(call("--json").out) == []


@pytest.mark.usefixtures("two_requests")
def test_a_table_by_model(call):
    told = call("--by", "model").out
    assert "[b]m0" in told
    assert "1,500" in told
    assert "0.125" in told


@pytest.mark.usefixtures("two_requests")
def test_rows_as_json_between_days(call):
    [row] = json.loads(call("--by", "day", "--since", "2025-11-25", "--json").out)
    assert (row["requests"], row["dollars"]) == (1, 0.125)


@pytest.mark.usefixtures("two_requests")
def test_files(call, tmp_path):
    call("--by", "request", "--csv", str(tmp_path / "a.csv"))
    call("--by", "request", "--parquet", str(tmp_path / "a.parquet"))
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [row["request_id"] for row in csv.DictReader(file)] == ["r0", "r1"]
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet")["prompt_tokens"].to_pylist() == [1500, 1500]


@pytest.mark.usefixtures("two_requests")
def test_a_file_that_cannot_be_written_is_one_line(call, tmp_path):
    for flag in ("--csv", "--parquet"):
        told = call(flag, str(tmp_path / "none" / "x"), code=2)
        assert told.err.startswith("error[file_unwritable]")
        assert told.err.count("\n") == 1
    assert "Choose one" in call("--json", "--csv", str(tmp_path / "x"), code=2).err


@pytest.mark.parametrize("words", [["--by", "user"], ["--since", "monday"], ["--until", "2025-13-01"]])
def test_what_cannot_be_asked_is_one_line(call, words):
    told = call(*words, code=2)
    assert told.err.startswith("error[invalid_parameter]")
    assert told.err.count("\n") == 1
