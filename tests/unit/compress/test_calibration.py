from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenmill.compress.calibration import Calibration, documents, windows
from tokenmill.errors import ConfigError
from tokenmill.models.batch import ForwardBatch
from tokenmill.models.decoder import plain_block
from tokenmill.models.demo import corpus
from tokenmill.models.folder import DEMO
from tokenmill.models.loader import load, load_weights
from tokenmill.models.spec import kv_layout
from tokenmill.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def test_texts_come_from_lines_of_either_kind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"text": "plain"}, {"messages": [{"role": "user", "content": "asked"}]}]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join([json.dumps(record) for record in records] + [""]))
    plain, rendered = documents(file, tokenizer)
    assert plain == "plain"
    assert "asked" in rendered
    assert rendered != "asked"
    (tmp_path / "text.txt").write_text("one\ntwo")
    assert list(documents(tmp_path / "text.txt", tokenizer)) == ["one\ntwo"]


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "misspelt"}', '{"text": 3}'])
def test_a_malformed_line_is_told_by_its_number(tmp_path: Path, tokenizer: Tokenizer, line: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "good"}\n' + line)
    with pytest.raises(ConfigError, match="line 2") as caught:
        list(documents(file, tokenizer))
    assert caught.value.code == "calibration_malformed"


def test_a_file_that_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError) as missing:
        list(documents(tmp_path / "none.txt", tokenizer))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as binary:
        list(documents(tmp_path / "binary.txt", tokenizer))
    assert (missing.value.code, binary.value.code) == ("calibration_not_found", "calibration_malformed")


def test_by_default_nothing_that_is_evaluated_is_calibrated_with(tokenizer: Tokenizer) -> None:
    held_out = {file.text for file in corpus.held_out_files()}
    assert held_out.isdisjoint(documents(None, tokenizer))


def test_windows_are_drawn_from_everywhere_and_the_same_each_time(tokenizer: Tokenizer) -> None:
    texts = [f"value_{number} = {number}\n" * 200 for number in range(20)]
    found = windows(texts, tokenizer, 10, 32)
    assert found == windows(texts, tokenizer, 10, 32)
    assert len(found) == 10
    assert {len(ids) for ids in found} == {32}
    begin = tokenizer.special_tokens.get("bos_token")
    assert begin is None or all(ids[0] == tokenizer.encode(begin, add_special_tokens=False)[0] for ids in found)
    assert len({tokenizer.decode(ids).split("_")[1].split(" ")[0] for ids in found}) > 3


def test_short_texts_are_windows_of_their_own_length(tokenizer: Tokenizer) -> None:
    assert 0 < len(windows(["x = 1"], tokenizer, 10, 64)[0]) < 10
    with pytest.raises(ConfigError) as caught:
        windows([""], tokenizer, 10, 64)
    assert caught.value.code == "calibration_malformed"


def test_hidden_states_are_those_of_the_model(tiny_model_path: Path) -> None:
    """Sequences of different lengths, several batches of them: each as the whole model computes it by itself."""
    random = torch.Generator().manual_seed(0)
    spec, weights = load_weights(tiny_model_path)
    table = weights["embedding"]
    assert isinstance(table, torch.Tensor)
    sequences = [torch.randint(0, spec.vocab_size, (length,), generator=random) for length in (5, 40, 1, 17)]
    calibration = Calibration(spec, [table[ids] for ids in sequences], lambda: None)
    assert calibration.tokens == 63
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        block = plain_block(layer, own, spec.norm_eps)  # type: ignore[arg-type] - nothing is quantized
        before = [hidden.clone() for hidden in calibration.hidden]
        seen = calibration.observe(layer, block)
        assert all(torch.equal(*pair) for pair in zip(before, calibration.hidden, strict=True))
        assert {name: stats.tokens for name, stats in seen.items()} == dict.fromkeys(
            ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"), 63
        )
        calibration.advance(layer, block)
    model = load(tiny_model_path)
    for ids, hidden in zip(sequences, torch.cat(calibration.hidden).split([5, 40, 1, 17]), strict=True):
        length = len(ids)
        batch = ForwardBatch(
            ids,
            torch.arange(length),
            (torch.arange(length),),
            (torch.arange(4, dtype=torch.int32).unsqueeze(0),),
            torch.tensor([0, length], dtype=torch.int32),
            torch.tensor([length], dtype=torch.int32),
        )
        expected = model.forward(batch, model.new_cache(kv_layout(spec, 16, 4), 4))
        torch.testing.assert_close(model._norm(hidden), expected, rtol=1e-4, atol=1e-5)
