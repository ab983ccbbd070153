"""What a model's folder says about embeddings."""

import json

import pytest

from tokenmill.errors import ModelError
from tokenmill.models.folder import read_pooling
from tokenmill.types import PoolingParams


def write(folder, kinds, mode=None):
    modules = [{"idx": index, "path": f"{index}_{kind}", "type": f"sentence_transformers.models.{kind}"}
               for index, kind in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    if mode is not None:
        (folder / "1_Pooling").mkdir()
        modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
        said = {f"pooling_mode_{name}": name == mode for name in modes} | {"include_prompt": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))


def test_without_files_it_is_the_normalized_last_token(tmp_path):
    assert read_pooling(tmp_path) == PoolingParams(pooling="last", normalize=True)


@pytest.mark.parametrize(("mode", "pooling"), [("lasttoken", "last"), ("mean_tokens", "mean")])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_files_of_sentence_transformers_say_how(tmp_path, mode, pooling, normalize):
    write(tmp_path, ["Transformer", "Pooling", *(["Normalize"] if normalize else [])], mode)
    assert read_pooling(tmp_path) == PoolingParams(pooling=pooling, normalize=normalize)


@pytest.mark.parametrize(
    ("kinds", "mode", "field"),
    [
        (["Transformer", "Pooling"], "cls_token", "pooling"),
        (["Transformer", "Pooling"], "none of them", "pooling"),
        (["Transformer", "Pooling", "Dense"], "mean_tokens", "modules.json"),
    ],
)
def test_what_does_not_exist_here_is_refused(tmp_path, kinds, mode, field):
    write(tmp_path, kinds, mode)
    with pytest.raises(ModelError) as refused:
        read_pooling(tmp_path)
    assert (refused.value.code, refused.value.field) == ("unsupported_model", field)


@pytest.mark.parametrize("content", ["{}", "[1]", "["])
def test_malformed_files_are_refused(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ModelError) as refused:
        read_pooling(tmp_path)
    assert refused.value.code == "checkpoint_mismatch"
