"""Reports of steps, gathered."""

from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.outbox import Outbox
from tokenmill.testing import FakeClock
from tokenmill.types import EngineOutput, EngineStats, FinishReason, TokenLogprobs

STATS = EngineStats()


def output(name: str, *tokens: int, end: FinishReason | None = None, **fields) -> EngineOutput:
    return EngineOutput(request_id=name, token_ids=list(tokens), finish_reason=end, **fields)


def test_the_first_report_leaves_at_once_and_the_next_when_its_time_has_come():
    clock = FakeClock()
    outbox = Outbox(clock, cores=2)
    assert not outbox.due(idle=False)
    outbox.put([output("a", 1), output("b", 2)], (2, 0.1))
    assert outbox.due(idle=False)
    assert outbox.take(STATS).outputs == [output("a", 1), output("b", 2)]
    outbox.put([output("a", 3)], (1, 0.1))
    assert not outbox.due(idle=False)
    clock.advance(1.0)
    assert outbox.due(idle=False)


def test_nothing_is_held_back_when_the_engine_is_idle():
    outbox = Outbox(FakeClock(), cores=2)
    outbox.put([output("a", 1)], (1, 0.1))
    outbox.take(STATS)
    outbox.put([output("a", 2, end=FinishReason.LENGTH)], (1, 0.2))
    assert not outbox.due(idle=False)
    assert outbox.due(idle=True)
    report = outbox.take(STATS)
    assert report.steps == [(1, 0.2)]
    assert not outbox.due(idle=True)


def test_an_id_that_comes_again_is_another_request():
    outbox = Outbox(FakeClock(), cores=2)
    outbox.put([output("a", 1, end=FinishReason.ABORT)])
    outbox.put([output("a", 2)], (1, 0.1))
    report = outbox.take(STATS)
    assert [(each.token_ids, each.finish_reason) for each in report.outputs] == [([1], FinishReason.ABORT), ([2], None)]
    assert report.steps == [(1, 0.1)]


def test_what_belongs_to_the_tokens_goes_with_them():
    outbox = Outbox(FakeClock(), cores=2)
    first, second = (TokenLogprobs([token], [-1.0], 1) for token in (1, 2))
    scores = [None, TokenLogprobs([7], [-2.0], 1)]
    outbox.put([output("a", 1, logprobs=[first], prompt_logprobs=scores, cached_tokens=3)])
    outbox.put([output("a", 2, logprobs=[second], cached_tokens=3, end=FinishReason.STOP, stop_token=2)])
    [joined] = outbox.take(STATS).outputs
    assert joined == output(
        "a", 1, 2, logprobs=[first, second], prompt_logprobs=scores, cached_tokens=3, end=FinishReason.STOP,
        stop_token=2,
    )  # fmt: skip


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=4), max_size=20))
def test_whatever_the_reports_the_tokens_of_each_request_arrive_in_order(steps):
    clock = FakeClock()
    outbox = Outbox(clock, cores=2)
    sent: dict[str, list[int]] = {}
    came: dict[str, list[int]] = {}
    for step in steps:
        for name, token in step:
            sent.setdefault(name, []).append(token)
        outbox.put([output(name, token) for name, token in step], (1, 0.001))
        clock.advance(0.0004)
        if outbox.due(idle=step is steps[-1]):
            for each in outbox.take(STATS).outputs:
                came.setdefault(each.request_id, []).extend(each.token_ids)
    assert came == sent
