"""Dockerfile, compose file and what they mount: linted, parsed, and without a secret."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PASSWORDS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "GRAFANA_PASSWORD")


def test_hadolint_finds_no_fault_in_the_dockerfile(run):
    run("hadolint", DEPLOY / "Dockerfile")


def test_yamllint_finds_no_fault(run):
    # Chart templates are not YAML before they are rendered.
    found = [file for file in DEPLOY.rglob("*.yaml") if "templates" not in file.parts and not file.is_symlink()]
    assert len(found) > 20
    rules = "{extends: default, rules: {document-start: disable, line-length: disable, braces: {max-spaces-inside: 0}, "
    run("yamllint", "--strict", "-d", rules + "comments: {min-spaces-from-content: 1}, indentation: "
        "{indent-sequences: whatever}}}", *found)  # fmt: skip


def test_everything_the_image_copies_reaches_the_build():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    assert set(copied) == kept
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_runs_without_privileges_and_tells_its_health():
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert "/livez" in re.search(r"^HEALTHCHECK .*\n.*$", final, re.MULTILINE).group()
    assert not re.search(r"apt-get|pip install", final), "the final stage installs nothing"


def test_torch_comes_first_and_from_the_cpu_index():
    build = DOCKERFILE[: DOCKERFILE.rindex("\nFROM ")]
    assert build.index("torch==${TORCH}") < build.index("COPY src")
    assert "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu" in build
    assert re.search(r"ARG TORCH=(.+)", build).group(1) == re.search(
        r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    ).group(1)


def test_the_compose_file_follows_the_specification():
    compose = PyCompose.from_yaml(_interpolated())
    assert set(compose.service_names()) == {"server", "prometheus", "grafana", "postgres", "redis"}
    with pytest.raises(ValueError, match="portz"):
        PyCompose.from_yaml(_interpolated().replace("ports:", "portz:"))


def _interpolated():
    values = dict.fromkeys(PASSWORDS, "x") | {"MODEL": "demo"}
    text = (DEPLOY / "compose.yaml").read_text()
    return re.sub(r"(?<!\$)\$\{(\w+)(?::[?-][^}]*)?\}", lambda found: values[found.group(1)], text)


def test_every_service_tells_its_health_and_keeps_its_state_in_a_volume():
    for name, service in COMPOSE["services"].items():
        assert "healthcheck" in service or name == "server", "the server's is in its image"
        volumes = {volume.partition(":")[0] for volume in service["volumes"]}
        assert volumes & COMPOSE["volumes"].keys(), name


def test_nothing_listens_beyond_this_machine():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_passwords_come_from_the_environment_and_have_no_default():
    text = (DEPLOY / "compose.yaml").read_text()
    for name in PASSWORDS:
        assert f"${{{name}:?" in text
        assert not re.search(rf"\$\{{{name}(?!:\?)", text), f"{name} has a use that does not insist on a value"
    template = (DEPLOY / "compose.env").read_text()
    assert sorted(re.findall(r"^(\w+)=$", template, re.MULTILINE)) == sorted(PASSWORDS)
    assert not re.search(r"^\w+=\S", template, re.MULTILINE)
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_images_are_pinned():
    images = [service["image"] for service in COMPOSE["services"].values()]
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []


def test_compose_waits_longer_for_the_server_to_stop_than_it_may_drain():
    server = COMPOSE["services"]["server"]
    drain = next(float(word.partition("=")[2]) for word in server["command"] if word.startswith("--drain-timeout-s"))
    assert float(server["stop_grace_period"].removesuffix("s")) >= drain + 10


def test_every_file_that_is_mounted_exists():
    mounted = [
        volume.partition(":")[0]
        for service in COMPOSE["services"].values()
        for volume in service["volumes"]
        if volume.startswith("./")
    ]
    assert len(mounted) == 4
    assert [path for path in mounted if not (DEPLOY / path).exists()] == []


def test_promtool_finds_no_fault_in_the_configuration_of_prometheus(promtool, tmp_path):
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "tokenmill.rules.yaml").symlink_to(DEPLOY / "alerts" / "tokenmill.rules.yaml")
    text = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    config = tmp_path / "prometheus.yaml"
    config.write_text(text.replace("/etc/prometheus/rules", str(rules)))
    done = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: \d+ rules found", done.stdout)


@pytest.mark.parametrize("kind", ["datasources", "dashboards"])
def test_grafana_is_provisioned_with(kind):
    (file,) = (DEPLOY / "grafana" / "provisioning" / kind).iterdir()
    provisioned = yaml.safe_load(file.read_text())
    assert provisioned["apiVersion"] == 1
    if kind == "datasources":
        (source,) = provisioned["datasources"]
        assert source["url"] == "http://prometheus:9090"
    else:
        (provider,) = provisioned["providers"]
        mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
        assert f"{provider['options']['path']}/tokenmill.json" in mounts
