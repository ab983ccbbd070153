"""What outlasts the engine's process, and the report made of it."""

import json
import os

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.crash import NO_REPORTS, STACKS, Reports, ending
from tokenmill.engine.events import EventLog
from tokenmill.engine.journal import Journal, read_journal
from tokenmill.types import EngineStats


def log_with(count: int, log: EventLog | None = None) -> EventLog:
    log = EventLog(1000) if log is None else log
    for number in range(log.total, log.total + count):
        log.add(float(number), f"r{number}", "arrive", tokens=number)
    return log


def names(events) -> list[str]:
    return [event["request_id"] for event in events]


def test_a_journal_has_each_event_once_and_in_order(tmp_path):
    log = EventLog(1000)
    journal = Journal(tmp_path, log)
    for count in (3, 0, 5, 1):
        log_with(count, log)
        journal.write()
    events = read_journal(tmp_path)
    assert names(events) == [f"r{number}" for number in range(9)]
    assert events[2] == {
        "time": 2.0, "step": 0, "request_id": "r2", "action": "arrive", "reason": "", "tokens": 2, "blocks": 0,
    }  # fmt: skip


def test_a_journal_keeps_the_latest_events_in_bounded_files(tmp_path):
    log = EventLog(1000)
    journal = Journal(tmp_path, log, limit=2000)
    for _ in range(500):
        log_with(1, log)
        journal.write()
    kept = names(read_journal(tmp_path))
    assert kept == [f"r{number}" for number in range(500 - len(kept), 500)]
    assert len(kept) > 20
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 5000


def test_more_events_between_two_writes_than_the_ring_holds(tmp_path):
    log = EventLog(10)
    journal = Journal(tmp_path, log)
    log_with(25, log)
    journal.write()
    assert names(read_journal(tmp_path)) == [f"r{number}" for number in range(15, 25)]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    journal = Journal(tmp_path, log_with(3))
    journal.write()
    file = tmp_path / "events.new"
    os.truncate(file, file.stat().st_size - 5)
    assert names(read_journal(tmp_path)) == ["r0", "r1"]


def report(folder, engine, reports=None):
    return (reports or Reports(folder, 20)).write(
        engine, reason="It died.", status=-9, config=EngineConfig(), stats=EngineStats(running=2),
        requests={"a": {"prompt_tokens": 3, "generated_tokens": 4}},
    )  # fmt: skip


def test_where_none_are_kept_none_is_written(tmp_path):
    assert report(tmp_path, tmp_path, NO_REPORTS) is None
    assert not list(tmp_path.iterdir())


def test_a_report_says_how_it_ended_and_what_was_going_on(tmp_path):
    engine = tmp_path / "engine"
    engine.mkdir()
    Journal(engine, log_with(2)).write()
    (engine / STACKS).write_text("Fatal Python error: Aborted")
    content = json.loads(report(tmp_path / "crashes", engine).read_text())
    assert (content["reason"], content["ended_by"]) == ("It died.", "SIGKILL")
    assert content["stats"]["running"] == 2
    assert content["requests"] == {"a": {"prompt_tokens": 3, "generated_tokens": 4}}
    assert names(content["events"]) == ["r0", "r1"]
    assert content["stacks"] == "Fatal Python error: Aborted"
    assert content["config"]["scheduler.policy"] == "fcfs"


def test_only_the_latest_reports_are_kept(tmp_path):
    for number in range(30):
        (tmp_path / f"crash-20200101T0000{number:02}-000.json").write_text("{}")
    latest = report(tmp_path, tmp_path)
    kept = sorted(tmp_path.glob("crash-*.json"))
    assert len(kept) == 20
    assert kept[-1] == latest


def test_an_exit_status_in_words():
    assert [ending(status) for status in (-9, -6, 1, -99)] == ["SIGKILL", "SIGABRT", "status 1", "signal 99"]
