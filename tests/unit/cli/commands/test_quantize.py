import json

import pytest

from tokenmill.cli.main import main
from tokenmill.models.loader import load_weights
from tokenmill.quant.weight import Quantized


def ran(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["quantize", *map(str, arguments)])
    return left.value.code


def test_a_model_is_written_and_told_as_json(tiny_model_path, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Some text to calibrate with. " * 40)
    out = tmp_path / "out"
    flags = ("--format", "int8", "--calibration", text, "--samples", 4, "--length", 50, "--json")
    code = ran(tiny_model_path, out, *flags)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    told = json.loads(printed.out)
    assert {key: told[key] for key in ("model", "out", "format", "method", "group")} == {
        "model": str(tiny_model_path), "out": str(out), "format": "int8", "method": "gptq", "group": 0,
    }  # fmt: skip
    assert told["calibration_tokens"] > 100
    assert 8 < told["bits_per_weight"] < 8.5
    _, weights = load_weights(out)
    assert isinstance(weights["layers.0.mlp.down"], Quantized)


def test_a_line_for_a_person(tiny_model_path, tmp_path, capsys):
    assert ran(tiny_model_path, tmp_path / "out", "--format", "int8", "--method", "rtn") == 0
    shown = capsys.readouterr().out
    assert "weights of 8." in shown
    assert "calibrated" not in shown


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--format", "int5"], "unknown_choice"),
        (["--method", "gptk"], "unknown_choice"),
        (["--group", "48"], "unknown_choice"),
        (["--method", "rtn", "--calibration", "text.txt"], "invalid_option"),
        (["--calibration", "none.txt"], "calibration_not_found"),
    ],
)
def test_wrong_input_is_told_with_its_code_and_nothing_written(tiny_model_path, tmp_path, capsys, flags, code):
    assert ran(tiny_model_path, tmp_path / "out", *flags) == 2
    assert f"error[{code}]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_there_is_not(tmp_path, capsys):
    assert ran(tmp_path / "none", tmp_path / "out") == 2
    assert "error[model_not_found]" in capsys.readouterr().err
