"""A plugin is a package with entry points. It is found without being registered, and our own contracts hold for it."""

import importlib
import json
import sys
import textwrap

import pytest
import torch
import transformers

from tokenmill.cli.main import main
from tokenmill.config import build
from tokenmill.engine.config import POLICIES, EngineConfig
from tokenmill.errors import ConfigError
from tokenmill.kernels.dispatch import Op
from tokenmill.kernels.ops import rms_norm
from tokenmill.models.family import FAMILIES
from tokenmill.models.loader import load
from tokenmill.testing import check_no_starvation, check_policy

SOURCES = {
    "newest": """
        from tokenmill.engine.policy import Policy

        class NewestFirst(Policy):
            def order(self, request, view):
                return -request.source.arrival

        POLICY = NewestFirst
    """,
    "renamed": """
        from dataclasses import replace
        from tokenmill.models.families.qwen3 import FAMILY as QWEN3

        FAMILY = replace(QWEN3, spec=lambda config: QWEN3.spec({**config, "model_type": "renamed_qwen"}))
    """,
    "rms_norm": """
        import torch

        DEVICES = ("cpu",)

        def rms_norm(x, weight, eps):
            y = torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps)
            return y.to(x.dtype)
    """,
    "greet": '''
        """Greet somebody."""
        from tokenmill.cli.command import Command

        def run(name: str = "you"):
            """Greet."""
            print("hello", name)

        COMMAND = Command(run)
    ''',
}
ENTRY_POINTS = """\
[tokenmill.policies]
newest_first = mill_plugin.newest

[tokenmill.families]
renamed_qwen = mill_plugin.renamed

[tokenmill.kernels]
rms_norm = mill_plugin.rms_norm

[tokenmill.commands]
greet = mill_plugin.greet
"""


@pytest.fixture(autouse=True)
def _plugin(tmp_path, monkeypatch):
    """An installed distribution ``mill-plugin`` with one choice of each kind."""
    package = tmp_path / "site" / "mill_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, text in SOURCES.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text).lstrip())
    information = tmp_path / "site" / "mill_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mill-plugin\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mill_plugin"]:
        del sys.modules[name]


def test_a_policy_is_a_choice_like_the_others_and_keeps_the_contract():
    assert "newest_first" in POLICIES.names()
    scheduler = {"policy": "newest-first", "max_num_seqs": 8, "max_num_batched_tokens": 24, "starvation_s": 2.0}
    config = build(EngineConfig, {"scheduler": scheduler, "cache": {"block_size": 4}})
    order = [output.request_id for output in check_policy(config)]
    assert order != sorted(order, key=lambda name: int(name[1:]))
    check_no_starvation(config)


def test_a_family_loads_a_checkpoint_of_its_type(tmp_path):
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    own = load(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "renamed_qwen"}))
    plugged = load(folder)
    assert "renamed_qwen" in FAMILIES.names()
    assert plugged.spec.model_type == "renamed_qwen"
    assert plugged.spec.layers == own.spec.layers
    hidden = torch.randn(3, 32)
    assert torch.equal(plugged.logits(hidden), own.logits(hidden))


def test_a_kernel_goes_first_and_agrees_with_the_reference():
    op = Op("rms_norm", rms_norm.reference)
    assert op.active("cpu").source == "mill_plugin.rms_norm"
    assert op.active("cuda").source == "reference"
    for name, arguments in rms_norm.cases():
        found, expected = op(*arguments), rms_norm.reference(*arguments)
        assert found.dtype == expected.dtype, name
        torch.testing.assert_close(found, expected, rtol=1e-2 if found.dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_kernel_that_says_no_device_is_refused(tmp_path):
    (tmp_path / "site" / "mill_plugin" / "rms_norm.py").write_text("def rms_norm(x, weight, eps): return x\n")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="DEVICES") as caught:
        Op("rms_norm", rms_norm.reference).implementations()
    assert caught.value.code == "broken_plugin"


def test_a_command_is_listed_and_runs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "greet" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["greet", "--name", "Ada"])
    assert (left.value.code, capsys.readouterr().out) == (0, "hello Ada\n")
