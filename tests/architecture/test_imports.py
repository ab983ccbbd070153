"""Imports point down. The contracts themselves are in pyproject.toml, section importlinter."""

import subprocess
import sys
from pathlib import Path

import tokenmill

ROOT = Path(__file__).parents[2]


def test_every_import_contract_is_kept():
    checker = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [checker, "--no-cache", "--config", ROOT / "pyproject.toml"], cwd=ROOT / "src", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " 0 broken" in done.stdout


def test_importing_the_package_loads_neither_torch_nor_any_other_heavy_library():
    heavy = ("torch", "numpy", "tokenizers", "transformers", "fastapi", "typer", "rich")
    code = f"import sys, tokenmill; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert done.stdout.strip() == "[]"


def test_listing_the_commands_loads_no_torch():
    code = (
        "import sys\n"
        "from tokenmill.cli.main import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    print('loaded:', 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert done.stdout.rstrip().endswith("loaded: False")


def test_inner_packages_are_empty():
    package = Path(tokenmill.__file__).parent
    # `kernels` exports its operations: they are called everywhere, and by name.
    full = [file for file in package.rglob("*/__init__.py") if file.read_text().strip()]
    assert [file.parent.relative_to(package).as_posix() for file in full] == ["kernels"]
