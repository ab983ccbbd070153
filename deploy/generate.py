"""Writes what the Kustomize bases share with the Helm chart: ``python deploy/generate.py``.

The chart is the source. The base is the chart with its own values, the components are what the production profile adds,
and each overlay's TOML file is its profile's. The few patches beside them are written by hand, and tests compare every
overlay, as kubectl renders it, with its profile, as Helm does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import dashboard

__all__ = ["NAMESPACE", "PROFILES", "files", "helm", "render"]

ROOT = Path(__file__).parent
CHART = ROOT / "helm" / "tokenmill"
PROFILES = {file.stem: file for file in sorted((ROOT / "helm" / "profiles").glob("*.yaml"))}
NAMESPACE = "tokenmill"

Resource = dict[str, Any]

_BASE = ("Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount")
_COMPONENTS = {
    "model": ("Job", "PersistentVolumeClaim"),
    "keda": ("ScaledObject",),
    "monitoring": ("PrometheusRule", "ServiceMonitor"),
}
_HELM_ONLY = ("app.kubernetes.io/managed-by", "helm.sh/chart")
_NOTE = "# Written by deploy/generate.py from the Helm chart.\n"


def helm() -> str | None:
    """The Helm program: of PATH, or as .ci/services installs it."""
    return shutil.which("helm", path=f"{os.environ['PATH']}:{ROOT.parent / 'build' / 'tools'}")


def render(*flags: str, namespace: str = NAMESPACE) -> list[Resource]:
    """What Helm makes of the chart. Stderr says why when it refuses."""
    command = [helm() or "helm", "template", "tokenmill", str(CHART), "--namespace", namespace, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def files() -> dict[Path, str]:
    """Every generated file and its text."""
    kustomize = ROOT / "kustomize"
    default, production = render(), render("--values", str(PROFILES["production"]))
    scaled = render("--set", "autoscaling.kind=hpa")
    found = {kustomize / "base" / "tokenmill.toml": _toml(default)}
    found |= _written(kustomize / "base", default, _BASE)
    for component, kinds in _COMPONENTS.items():
        found |= _written(kustomize / "components" / component, production, kinds)
    found |= _written(kustomize / "components" / "hpa", scaled, ("HorizontalPodAutoscaler",))
    for name, profile in PROFILES.items():
        found[kustomize / "overlays" / name / "tokenmill.toml"] = _toml(render("--values", str(profile)))
    return found


def _written(folder: Path, resources: list[Resource], kinds: tuple[str, ...]) -> dict[Path, str]:
    by_kind = {each["kind"]: each for each in resources}
    return {
        folder / f"{kind.lower()}.yaml": _NOTE + yaml.safe_dump(_plain(by_kind[kind]), sort_keys=False, width=120)
        for kind in kinds
    }


def _plain(resource: Resource) -> Resource:
    """Without what only Helm needs: its labels, the namespace, and the checksum that Kustomize's names replace."""
    metadata = {key: value for key, value in resource["metadata"].items() if key != "namespace"}
    metadata["labels"] = {key: value for key, value in metadata["labels"].items() if key not in _HELM_ONLY}
    if resource["kind"] == "Deployment":
        resource["spec"]["template"]["metadata"].pop("annotations", None)
    return resource | {"metadata": metadata}


def _toml(resources: list[Resource]) -> str:
    (config,) = (each for each in resources if each["metadata"]["name"] == "tokenmill-config")
    return config["data"]["tokenmill.toml"]


if __name__ == "__main__":
    dashboard.FILE.write_text(dashboard.text())  # the chart holds a link to it
    for file, content in files().items():
        file.write_text(content)
