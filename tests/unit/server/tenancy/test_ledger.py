"""The ledger: everything written once, whatever happens to the database and to the disk."""

import json
import subprocess
import sys
import threading

import msgspec
import pytest
import sqlalchemy

from tokenmill.server.config import StoreConfig
from tokenmill.server.tenancy.ledger import Entry, Ledger, _SpillFile
from tokenmill.server.tenancy.store import USAGE, Store

DAY = 86_400.0


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("tokenmill.server.tenancy.ledger._TICK_S", 0.01)
    monkeypatch.setattr("tokenmill.server.tenancy.ledger._LONGEST_PAUSE_S", 0.05)


def entry(number, **fields):
    values = {
        "request_id": f"r-{number}", "finished": 1_764_028_800.0, "key_id": "k", "model": "demo",
        "endpoint": "/v1/completions", "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 5,
        "rejected_tokens": 0, "queue_s": 0.1, "first_token_s": None, "total_s": 2.0, "dollars": 0.25,
        "finish": "stop", "error_code": "",
    }  # fmt: skip
    return Entry(**values | fields)


def ids(store):
    with store.reading() as connection:
        return sorted(connection.execute(sqlalchemy.select(USAGE.c.request_id)).scalars())


def expected(count):
    return sorted(f"r-{number}" for number in range(count))


def wait_for(condition):
    waiting = threading.Event()
    while not condition():
        waiting.wait(0.01)


@pytest.fixture
def spill(tmp_path):
    return tmp_path / "waiting" / "usage.jsonl"


def full(store):
    """Makes SQLite say that the disk is full, and returns what makes room again."""
    with store.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    @sqlalchemy.event.listens_for(store._engine, "checkout")
    def limit(connection, *_):
        connection.execute(f"PRAGMA max_page_count = {room['pages']}")

    room = {"pages": pages}
    return lambda: room.update(pages=2**30)


def test_every_line_is_written_once_with_what_it_tells(store, spill):
    ledger = Ledger(store, spill, 36_500)
    for number in range(1203):
        ledger.record(entry(number))
    ledger.record(entry(0))  # the same request again
    ledger.close()
    assert (ledger.pending, ledger.lost) == (0, 0)
    assert ids(store) == expected(1203)
    with store.reading() as connection:
        row = connection.execute(sqlalchemy.select(USAGE).where(USAGE.c.request_id == "r-7")).mappings().one()
    assert row["day"] == "2025-11-25"
    assert {**row} == entry(7).row()
    assert not spill.exists()


def test_lines_reach_the_database_without_being_asked(store, spill):
    ledger = Ledger(store, spill, 36_500)
    ledger.record(entry(0))
    wait_for(lambda: ids(store) == ["r-0"])
    ledger.close()


def test_while_postgresql_is_away_nothing_is_lost_and_nothing_doubled(postgres_server, spill, caplog):
    store = Store(StoreConfig(database=postgres_server.url))
    store.migrate()
    with store.writing() as connection:
        connection.execute(sqlalchemy.delete(USAGE))
    ledger = Ledger(store, spill, 36_500, bound=12_000)
    numbers = iter(range(10**6))
    stopping, recorded = threading.Event(), []

    def serve():
        while not stopping.wait(0.001):
            recorded.append(next(numbers))
            ledger.record(entry(recorded[-1]))

    server = threading.Thread(target=serve)
    server.start()
    for kill in (False, True):
        wait_for(lambda: len(ids(store)) > 20)
        postgres_server.stop(kill)
        try:
            wait_for(spill.exists)  # more came than is kept in memory
        finally:
            postgres_server.start()
        wait_for(lambda: not spill.exists())
    stopping.set()
    server.join()
    ledger.close()
    assert ledger.lost == 0
    assert ids(store) == expected(len(recorded))
    assert "is written to the database again" in caplog.text
    store.close()


def test_a_ledger_may_start_before_its_database(postgres_server, spill):
    postgres_server.stop()
    store = Store(StoreConfig(database=postgres_server.url))
    try:
        ledger = Ledger(store, spill, 36_500)
        ledger.record(entry("early"))
        wait_for(lambda: ledger._failures)
    finally:
        postgres_server.start()
    wait_for(lambda: not ledger.pending)
    ledger.close()
    assert "r-early" in ids(store)
    store.close()


def test_a_full_disk_keeps_lines_until_there_is_room(tmp_path, spill, caplog):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    make_room = full(store)
    ledger = Ledger(store, spill, 36_500, bound=1000)
    for number in range(600):
        ledger.record(entry(number))
    wait_for(lambda: "is kept" in caplog.text)
    assert "disk is full" in caplog.text
    wait_for(spill.exists)
    make_room()
    wait_for(lambda: not spill.exists())
    ledger.close()
    assert (ids(store), ledger.lost) == (expected(600), 0)


def test_where_no_file_can_be_written_memory_is_bounded_and_the_rest_is_counted(tmp_path, caplog):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    make_room = full(store)
    (tmp_path / "file").touch()
    ledger = Ledger(store, tmp_path / "file" / "spill", 36_500, bound=500)
    for number in range(800):
        ledger.record(entry(number))
    assert (ledger.pending, ledger.lost) == (500, 300)
    assert "usage is lost" in caplog.text
    wait_for(lambda: "either" in caplog.text)
    make_room()
    wait_for(lambda: not ledger.pending)
    ledger.close()
    assert ids(store) == expected(500)


def test_at_the_end_lines_that_cannot_be_written_go_to_the_file_and_the_next_server_writes_them(tmp_path, spill):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    make_room = full(store)
    ledger = Ledger(store, spill, 36_500)
    for number in range(300):
        ledger.record(entry(number))
    ledger.close()
    assert (ledger.pending, ledger.lost, len(spill.read_text().splitlines())) == (0, 0, 300)
    with spill.open("a") as file:
        file.write('{"request_id": "cut off')
    make_room()
    after = Ledger(store, spill, 36_500)
    after.close()
    assert (ids(store), after.lost, spill.exists()) == (expected(300), 1, False)


FULL_FILE = """
import resource, sys
from pathlib import Path
import msgspec
from tokenmill.server.tenancy.ledger import Entry, _SpillFile
entries = [msgspec.json.decode(line, type=Entry) for line in sys.stdin.buffer]
spill = _SpillFile(Path(sys.argv[1]))
spill.append(entries[:5])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    spill.append(entries)
except OSError as error:
    print(error.strerror)
"""


def test_a_file_that_is_cut_short_by_a_full_disk_holds_whole_lines_only(spill):
    lines = b"".join(msgspec.json.encode(entry(number)) + b"\n" for number in range(50))
    done = subprocess.run([sys.executable, "-c", FULL_FILE, str(spill)], input=lines, capture_output=True)
    assert done.stdout.decode().strip() == "File too large", done.stderr
    assert [json.loads(line)["request_id"] for line in spill.read_text().splitlines()] == [f"r-{i}" for i in range(5)]


def test_several_servers_share_the_file_without_losing_a_line(spill):
    inserted, lock = [], threading.Lock()

    def insert(entries):
        with lock:
            inserted.extend(each.request_id for each in entries)

    def append(start):
        file = _SpillFile(spill)
        for number in range(start, start + 100):
            file.append([entry(number)])

    def drain():
        while not done.is_set():
            _SpillFile(spill).drain(insert)

    done = threading.Event()
    writers = [threading.Thread(target=append, args=(start,)) for start in (0, 100, 200)]
    reader = threading.Thread(target=drain)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    _SpillFile(spill).drain(insert)
    assert sorted(inserted) == expected(300)


def test_recording_never_waits_for_the_database(tmp_path, spill):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    ledger = Ledger(store, spill, 36_500)
    with store.writing():  # nobody else can write now
        for number in range(100):
            ledger.record(entry(number))
        assert ids(store) == []
    ledger.close()
    assert ids(store) == expected(100)


def test_old_rows_are_deleted(store, spill):
    ledger = Ledger(store, spill, 36_500)
    for number in range(10):
        ledger.record(entry(number, finished=1_764_028_800.0 + number * DAY))
    ledger.close()
    now = 1_764_028_800.0 + 9 * DAY
    Ledger(store, spill, keep_days=3, now=lambda: now).close()
    assert ids(store) == ["r-6", "r-7", "r-8", "r-9"]


def test_a_clock_that_jumps_loses_nothing(store, spill, monkeypatch):
    monkeypatch.setattr("tokenmill.server.tenancy.ledger._PRUNE_EVERY_S", 0.0)
    times = [2e9, 2e9 - 1000 * DAY, 2e9, 3e9]
    ledger = Ledger(store, spill, 2000, now=lambda: times[0])
    for number, finished in enumerate(times):
        times[0] = finished
        ledger.record(entry(number, finished=finished))
        wait_for(lambda: not ledger.pending)
    ledger.close()
    assert (ids(store), ledger.lost) == (expected(4), 0)


def test_a_failure_that_nobody_thought_of_does_not_end_the_thread(tmp_path, spill, monkeypatch, caplog):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    ledger = Ledger(store, spill, 36_500)
    with monkeypatch.context() as broken:
        broken.setattr(store, "insert_new", lambda *_: 1 / 0)
        ledger.record(entry(0))
        wait_for(lambda: "the ledger failed" in caplog.text)
    wait_for(lambda: ids(store) == ["r-0"])
    ledger.close()
