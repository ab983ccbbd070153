import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import tokenmill.models.demo
from tokenmill.models.demo import corpus, tasks

KINDS = list(tasks.TASKS)
SOURCE = (
    "import os\n\n\ndef area(width, height):\n    if width < 0:\n        raise ValueError\n    return width * height\n"
)


def question(task: tasks.Task) -> str:
    return task.messages[-1]["content"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_same_tasks_and_another_seed_others(kind: str) -> None:
    assert tasks.generate(kind, 7, 20) == tasks.generate(kind, 7, 20)
    assert tasks.generate(kind, 7, 20)[:5] == tasks.generate(kind, 7, 5)
    assert tasks.generate(kind, 7, 20) != tasks.generate(kind, 8, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_ends_with_a_user_turn_and_accepts_its_own_answer_only(kind: str) -> None:
    for task in tasks.generate(kind, 1, 100):
        assert task.kind == kind
        assert [message["role"] for message in task.messages] in (["user"], ["system", "user"])
        assert tasks.is_correct(task, task.answer)
        assert tasks.is_correct(task, f"\n{task.answer} \n")
        assert not tasks.is_correct(task, "")
        assert not tasks.is_correct(task, task.answer + "1")


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        tasks.generate("juggle", 0, 1)


def test_lookup_answers_with_the_value_of_the_asked_key() -> None:
    for task in tasks.generate("lookup", 2, 300):
        pairs = dict(re.findall(r"^(\S+)(?:: | = | -> )(\S+)$", question(task), re.MULTILINE))
        asked = re.search(r"value of (\S+?)[?.]|Look up (\S+) in|belongs to (\S+?)\?", question(task))
        assert asked is not None
        key = next(group for group in asked.groups() if group)
        assert pairs[key] == task.answer


def test_lookup_lists_fill_but_never_exceed_the_promised_number_of_tokens() -> None:
    file = Path(tokenmill.models.demo.__file__).parent / "checkpoint" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    lists = [max(question(task).split("\n\n"), key=len) for task in tasks.generate("lookup", 3, 500)]
    lengths = [len(tokenizer.encode(listing).ids) for listing in lists]
    assert tasks.LOOKUP_TOKENS * 0.75 < max(lengths) <= tasks.LOOKUP_TOKENS


@pytest.mark.parametrize(("kind", "sign"), [("add", 1), ("subtract", -1)])
def test_arithmetic_is_right_and_has_two_or_three_digits(kind: str, sign: int) -> None:
    for task in tasks.generate(kind, 4, 300):
        first, second = (int(number) for number in re.findall(r"\d+", question(task)))
        if question(task).startswith("Subtract"):
            first, second = second, first
        assert 10 <= first <= 999
        assert 10 <= second <= 999
        assert task.answer == str(first + sign * second)
        assert not task.answer.startswith("-")


def test_arithmetic_for_evaluation_is_reserved_and_most_pairs_are_not() -> None:
    assert all(tasks.is_reserved(task) for kind in ("add", "subtract") for task in tasks.generate(kind, 5, 50))
    rng = random.Random(0)
    reserved = Counter(tasks.is_reserved(tasks.add(rng)) for _ in range(2000))
    assert 0.02 < reserved[True] / 2000 < 0.09
    assert not any(tasks.is_reserved(task) for task in tasks.generate("copy", 5, 50))


def test_a_pair_is_reserved_in_whatever_words_and_order() -> None:
    def asked(text: str) -> tasks.Task:
        return tasks.Task("add", ({"role": "user", "content": text},), (), "")

    for a, b in ((12, 345), (700, 41), (99, 100), (512, 256)):
        forms = (f"What is {a} + {b}?", f"Add {b} and {a}.", f"Compute {a}+{b}.")
        assert len({tasks.is_reserved(asked(form)) for form in forms}) == 1


def test_copy_and_reverse_use_the_items_of_the_question() -> None:
    for task in tasks.generate("copy", 6, 100):
        assert question(task).endswith(task.answer)
    for task in tasks.generate("reverse", 6, 100):
        assert question(task).endswith(" ".join(reversed(task.answer.split(" "))))


def test_extract_json_is_judged_by_value_and_validity_by_the_keys() -> None:
    for task in tasks.generate("extract_json", 7, 100):
        fields = json.loads(task.answer)
        assert all(name in question(task) for name in fields)
        assert tasks.is_correct(task, json.dumps(fields, indent=4))
        wrong = dict.fromkeys(fields, "?")
        assert tasks.is_valid_json(task, json.dumps(wrong))
        assert not tasks.is_correct(task, json.dumps(wrong))
        assert not tasks.is_valid_json(task, json.dumps({**fields, "more": 1}))
        assert not tasks.is_valid_json(task, task.answer[:-1])
        assert not tasks.is_valid_json(task, "[]")


def test_tool_call_fits_one_of_the_offered_tools() -> None:
    for task in tasks.generate("tool_call", 8, 200):
        call = tasks.parse_tool_call(task.answer)
        assert call is not None
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
        assert len(tools) == len(task.tools)
        assert list(call["arguments"]) == tools[call["name"]]["required"]
        kinds = {"integer": int, "string": str}
        for name, value in call["arguments"].items():
            assert isinstance(value, kinds[tools[call["name"]]["properties"][name]["type"]])
            assert str(value) in question(task)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        '{"name": "f", "arguments": {}}',
        "<tool_call>\n{broken\n</tool_call>",
        "<tool_call>\n[]\n</tool_call>",
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        'so: <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    ],
)
def test_what_is_not_one_tool_call_parses_to_none(text: str) -> None:
    assert tasks.parse_tool_call(text) is None


def test_continue_code_asks_for_the_lines_that_follow() -> None:
    for task in tasks.generate_code([SOURCE], 9, 50):
        before = question(task).split("\n\n", 1)[1]
        assert f"{before.strip()}\n{task.answer}" in SOURCE or f"{before.strip()}\n\n\n{task.answer}" in SOURCE


def test_continue_code_is_judged_by_its_first_line_without_indentation() -> None:
    task = tasks.Task("continue_code", (), (), "    return width\n    pass")
    assert tasks.is_correct(task, "return width\nsomething else")
    assert not tasks.is_correct(task, "return height")
    assert not tasks.is_correct(task, "")


def test_source_too_short_to_continue_is_an_error() -> None:
    with pytest.raises(ValueError, match="short"):
        tasks.continue_code(random.Random(0), "a = 1\nb = 2\nc = 3\n\n\n")
    with pytest.raises(ValueError, match="long enough"):
        tasks.generate_code(["a = 1\n"], 0, 1)


def write(root: Path, path: str, content: bytes = b"x = 1\n") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


def test_corpus_splits_every_readable_library_file_by_its_path(tmp_path: Path) -> None:
    names = [f"module{i}.py" for i in range(100)]
    for name in names:
        write(tmp_path, name)
    write(tmp_path, "site-packages/other.py")
    write(tmp_path, "broken.py", b"\xff\xfe\x00 not utf-8")
    write(tmp_path, "empty.py", b"\n")
    write(tmp_path, "notes.txt")
    training = [file.path for file in corpus.training_files(tmp_path)]
    held_out = [file.path for file in corpus.held_out_files(tmp_path)]
    assert sorted(training + held_out) == sorted(names)
    assert held_out == sorted(name for name in names if corpus.is_held_out(name))
    assert 0 < len(held_out) < 20


def test_held_out_files_are_the_same_with_and_without_the_librarys_tests(tmp_path: Path) -> None:
    names = [f"module{i}.py" for i in range(60)]
    for name in names:
        write(tmp_path, name)
    without = list(corpus.held_out_files(tmp_path))
    for name in names:
        write(tmp_path, f"test/{name}")
    assert list(corpus.held_out_files(tmp_path)) == without


def test_the_running_library_has_text_on_both_sides() -> None:
    assert next(corpus.training_files()).text
    assert next(corpus.held_out_files()).text
