"""What the ledger tells: sums and rows, over HTTP and in files."""

import csv
import io
from typing import Any

import httpx2
import pyarrow.parquet
import pytest
import sqlalchemy

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.server.app import create_app
from tokenmill.server.config import ServerConfig, StoreConfig
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.tenancy.keys import Keys, KeySpec
from tokenmill.server.tenancy.ledger import Entry
from tokenmill.server.tenancy.store import KEYS, USAGE, Store
from tokenmill.server.tenancy.tenants import Tenants
from tokenmill.server.tenancy.usage import rows, write_csv, write_parquet

NOON = 1_764_072_000.0  # 2025-11-25 12:00 UTC
DAY = 86_400.0


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    database = request.getfixturevalue("postgres_server").url if request.param == "postgresql" else ""
    store = Store(StoreConfig(state=str(tmp_path), database=database))
    store.migrate()
    with store.writing() as connection:
        connection.execute(sqlalchemy.delete(USAGE))
        connection.execute(sqlalchemy.delete(KEYS))
    yield store
    store.close()


@pytest.fixture
def key_id(store: Store) -> str:
    """The id of a key called =1+1; six requests have been written, two of them with it."""
    key, _ = Keys(store).create(KeySpec(name="=1+1", owner="Ada"))
    entries = [
        Entry(
            request_id=f"r-{number}",
            finished=NOON + number * DAY / 2,
            key_id=key.id if number < 2 else "",
            model="small" if number % 2 else "large",
            endpoint="/v1/completions",
            prompt_tokens=100,
            cached_tokens=10 * number,
            completion_tokens=number,
            rejected_tokens=0,
            queue_s=0.5,
            first_token_s=1.0 * number if number else None,
            total_s=2.0,
            dollars=0.25,
            finish="stop" if number else "error",
            error_code="" if number else "engine_dead",
        )
        for number in range(6)
    ]
    with store.writing() as connection:
        store.insert_new(connection, USAGE, [entry.row() for entry in entries])
    return key.id


def test_by_key_with_its_name_and_owner(store: Store, key_id: str) -> None:
    nobody, somebody = rows(store, "key")
    assert (somebody["key_id"], somebody["name"], somebody["owner"]) == (key_id, "=1+1", "Ada")
    assert (nobody["key_id"], nobody["name"]) == ("", None)
    assert somebody | {"key_id": 0, "name": 0, "owner": 0} == {
        "key_id": 0, "name": 0, "owner": 0, "requests": 2, "failed": 1, "prompt_tokens": 200, "cached_tokens": 10,
        "completion_tokens": 1, "rejected_tokens": 0, "mean_first_token_s": 1.0, "mean_total_s": 2.0, "dollars": 0.5,
    }  # fmt: skip


@pytest.mark.usefixtures("key_id")
def test_by_model_and_by_day(store: Store) -> None:
    assert [(row["model"], row["requests"], row["completion_tokens"]) for row in rows(store, "model")] == [
        ("large", 3, 6), ("small", 3, 9),
    ]  # fmt: skip
    assert [(row["day"], row["requests"]) for row in rows(store, "day")] == [
        ("2025-11-25", 1), ("2025-11-26", 2), ("2025-11-27", 2), ("2025-11-28", 1),
    ]  # fmt: skip


@pytest.mark.usefixtures("key_id")
@pytest.mark.parametrize(
    ("since", "until", "numbers"),
    [
        (None, None, [0, 1, 2, 3, 4, 5]), ("2025-11-26", None, [1, 2, 3, 4, 5]), (None, "2025-11-26", [0, 1, 2]),
        ("2025-11-27", "2025-11-27", [3, 4]), ("2026-01-01", None, []), ("2025-11-28", "2025-11-25", []),
    ],
)  # fmt: skip
def test_days_from_and_to_are_both_in(store: Store, since: Any, until: Any, numbers: Any) -> None:
    found = rows(store, "request", since, until)
    assert [row["request_id"] for row in found] == [f"r-{number}" for number in numbers]


@pytest.mark.parametrize(("field", "value"), [("by", "user"), ("since", "yesterday"), ("until", "2025-02-30"),
                                              ("since", "' OR 1=1"), ("until", ""), ("since", "2025-1-1")])  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_field(tmp_path: Any, field: str, value: str) -> None:
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    asked: Any = {"by": "key", field: value}
    with pytest.raises(RequestError) as caught:
        list(rows(store, **asked))
    assert caught.value.field == field


@pytest.mark.usefixtures("key_id")
def test_csv_has_a_header_and_nothing_that_a_spreadsheet_would_compute(store: Store) -> None:
    file = io.StringIO(newline="")
    assert write_csv(file, rows(store, "key")) == 2
    read = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert read[1]["name"] == "'=1+1"
    assert read[1]["prompt_tokens"] == "200"
    assert write_csv(io.StringIO(), []) == 0


@pytest.mark.usefixtures("key_id")
def test_parquet_holds_the_same_rows(store: Store, tmp_path: Any) -> None:
    file = tmp_path / "usage.parquet"
    assert write_parquet(file, rows(store, "request")) == 6
    assert pyarrow.parquet.read_table(file).to_pylist() == list(rows(store, "request"))


def test_a_database_that_is_away_is_told() -> None:
    with pytest.raises(UnavailableError):
        list(rows(Store(StoreConfig(database="postgresql://x@127.0.0.1:9/x")), "key"))


async def test_over_http(llm: Any, store: Store, key_id: str) -> None:
    app = create_app(llm, ServerConfig(), Metrics("scripted"), Tenants(store=store))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as http:
        answer = await http.get("/admin/usage", params={"by": "day", "since": "2025-11-27"})
        assert [(row["day"], row["requests"]) for row in answer.json()["data"]] == [
            ("2025-11-27", 2),
            ("2025-11-28", 1),
        ]
        assert (await http.get("/admin/usage")).json()["data"][1]["key_id"] == key_id
        for params in ({"by": "request"}, {"by": "x"}, {"since": "x"}):
            answer = await http.get("/admin/usage", params=params)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, *params)
