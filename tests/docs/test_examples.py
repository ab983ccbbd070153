"""The examples run as they stand, and the README's Python with them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_demo_asks_a_server_and_stops_it():
    done = subprocess.run([sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    right, asked = re.search(r"(\d+) of (\d+) right", done.stdout).groups()
    assert asked == "12"
    assert int(right) >= 9
    assert int(re.search(r"(\d+) of \d+ prompt tokens came from the prefix cache", done.stdout)[1]) > 0
    assert "stopped on SIGTERM with exit code 0" in done.stdout


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo no memory left; exit 3", "ended before it was ready"),
        ("echo ready on http://127.0.0.1:9; exec sleep 60", "Connection error"),
    ],
)
def test_a_demo_that_fails_says_why_and_shows_the_server_s_log(tmp_path, monkeypatch, capsys, script, why):
    monkeypatch.syspath_prepend(ROOT / "examples")
    demo = importlib.import_module("demo")
    server = tmp_path / "server"
    server.write_text(f"#!/bin/sh\n{script}\n")
    server.chmod(0o755)
    monkeypatch.setattr(demo.sys, "executable", str(server))
    assert demo.main() == 1
    shown = capsys.readouterr().out
    assert why in shown
    assert script.split(";")[0].removeprefix("echo ") in shown


def test_the_readme_s_program_answers():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    program = next(code for code in blocks if "LLM(" in code)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "362 stop"), done.stderr[-2000:]
