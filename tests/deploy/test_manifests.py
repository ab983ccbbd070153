"""The Helm chart and the Kustomize overlays: valid for Kubernetes, equal to each other, and true to the server."""

import json
import os
import re
import tempfile
import tomllib
from pathlib import Path

import generate
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from tokenmill.cli.command import build_all
from tokenmill.cli.main import COMMANDS, guarded
from tokenmill.engine.config import EngineConfig
from tokenmill.server.config import ServerConfig

DEPLOY = Path(generate.__file__).parent
OVERLAYS = DEPLOY / "kustomize" / "overlays"
CRDS = json.loads((Path(__file__).parent / "crds.json").read_text())
KUBERNETES = kubernetes_validate.latest_version()

VARIANTS = {
    "defaults": (),
    "hpa": ("--set", "autoscaling.kind=hpa"),
    "keda on azure": ("--set", "autoscaling.kind=keda,spot.provider=azure"),
    "a model behind a token": ("--set", "model.repo=org/name,model.tokenKey=hub,secret.name=keys"),
    "a volume of one's own": ("--set", "model.repo=org/name,model.existingClaim=mine"),
    "no network policy": ("--set", "networkPolicy.enabled=false"),
    "another name for a release in another place": ("--set", "monitoring.enabled=true", "--namespace", "elsewhere"),
    **{name: ("--values", str(file)) for name, file in generate.PROFILES.items()},
}


def _named(values):
    return pytest.mark.parametrize("flags", values.values(), ids=values)


def _overlay(run, name):
    """An overlay's resources as kubectl renders them, with the content's hash cut off the names of ConfigMaps."""
    text = run("kubectl", "kustomize", OVERLAYS / name)
    return list(yaml.safe_load_all(re.sub(r"\btokenmill-config-[a-z0-9]{10}\b", "tokenmill-config", text)))


def _one(resources, kind):
    (found,) = (each for each in resources if each["kind"] == kind)
    return found


def _check_schema(resource):
    """Against Kubernetes' own schema, strictly; custom resources against the fields that crds.json knows."""
    if resource["kind"] in CRDS:
        jsonschema.validate(resource, CRDS[resource["kind"]] | {"definitions": CRDS["definitions"]})
    else:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def _comparable(resources):
    """By kind and name, without the labels that only Helm sets, and with lists of named things sorted by name."""
    found = {}
    for resource in resources:
        if resource["kind"] == "Namespace":
            continue
        metadata = resource["metadata"]
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            metadata.get("labels", {}).pop(label, None)
        if resource["kind"] == "Deployment":
            resource["spec"]["template"]["metadata"].pop("annotations", None)
            pod = resource["spec"]["template"]["spec"]
            pod["volumes"].sort(key=lambda volume: volume["name"])
            for container in pod["containers"]:
                container["volumeMounts"].sort(key=lambda mount: mount["name"])
        found[resource["kind"], metadata["name"]] = resource
    return found


def _flags_of_serve():
    app = typer.Typer()
    app.command("serve")(COMMANDS.get("serve").callback(guarded, True))
    return {flag for parameter in typer.main.get_command(app).params for flag in parameter.opts}


def test_the_chart_passes_helms_lint(run):
    for profile in generate.PROFILES.values():
        run("helm", "lint", "--strict", generate.CHART, "--values", profile)


@pytest.mark.usefixtures("render")
def test_what_is_generated_is_committed():
    stale = [str(file) for file, text in generate.files().items() if not file.exists() or file.read_text() != text]
    assert not stale, "run: python deploy/generate.py"


@_named(VARIANTS)
def test_what_the_chart_renders_is_valid_for_kubernetes(render, flags):
    for resource in render(*flags):
        _check_schema(resource)


@pytest.mark.parametrize("name", generate.PROFILES)
def test_what_an_overlay_renders_is_valid_for_kubernetes(run, name):
    for resource in _overlay(run, name):
        _check_schema(resource)


def test_the_schemas_refuse_a_misspelt_field(render):
    for kind, path in (("Deployment", "template"), ("ScaledObject", "triggers"), ("ServiceMonitor", "endpoints")):
        resource = _one(render(*VARIANTS["production"]), kind)
        resource["spec"][path + "s"] = resource["spec"].pop(path)
        with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
            _check_schema(resource)


@pytest.mark.parametrize("name", generate.PROFILES)
def test_helm_and_kustomize_say_the_same(run, render, name):
    of_helm = _comparable(render(*VARIANTS[name]))
    of_kustomize = _comparable(_overlay(run, name))
    assert of_helm.keys() == of_kustomize.keys()
    for key, resource in of_helm.items():
        assert of_kustomize[key] == resource, key


@pytest.mark.parametrize("name", ["hpa", "keda", "model", "monitoring", "spot"])
def test_every_component_renders_on_the_base_by_itself(run, tmp_path, name):
    base, component = DEPLOY / "kustomize" / "base", DEPLOY / "kustomize" / "components" / name
    overlay = {"resources": [os.path.relpath(base, tmp_path)], "components": [os.path.relpath(component, tmp_path)]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    for resource in yaml.safe_load_all(run("kubectl", "kustomize", tmp_path)):
        _check_schema(resource)


@_named(VARIANTS)
def test_the_grace_period_covers_the_pause_before_the_stop_and_the_drain(render, flags):
    resources = render(*flags)
    pod = _one(resources, "Deployment")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = _server_config(resources).drain_timeout_s
    flush = 5  # what the server grants connections after that: `_FLUSH_S` of server/app.py
    assert pod["terminationGracePeriodSeconds"] >= pause + drain + flush + 5


@pytest.mark.parametrize(("pause", "drain"), [(1, 0), (5, 30), (20, 600)])
def test_the_grace_period_follows_from_the_other_settings(render, pause, drain):
    resources = render("--set", f"lifecycle.preStopSeconds={pause},lifecycle.drainSeconds={drain}")
    pod = _one(resources, "Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == pause + drain + 15
    assert _server_config(resources).drain_timeout_s == drain


def _config(resources):
    (config,) = (each for each in resources if each["metadata"]["name"] == "tokenmill-config")
    return config["data"]["tokenmill.toml"]


def _built(resources):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(_config(resources))
        file.flush()
        return build_all({"engine": EngineConfig, "server": ServerConfig}, {"config": Path(file.name)})


def _server_config(resources):
    return _built(resources)["server"]


@_named(VARIANTS)
def test_the_server_takes_the_configuration(render, flags):
    resources = render(*flags)
    sections = tomllib.loads(_config(resources))
    built = _built(resources)
    assert built["server"].host == "0.0.0.0"
    for section, options in sections.items():
        owner = built.get(section) or next(getattr(each, section) for each in built.values() if hasattr(each, section))
        assert {key: getattr(owner, key) for key in options} == {
            key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
        }


@_named(VARIANTS)
def test_every_flag_the_server_is_started_with_exists(render, flags):
    (server,) = _one(render(*flags), "Deployment")["spec"]["template"]["spec"]["containers"]
    command, *given = server["args"]
    assert command == "serve"
    assert {each.partition("=")[0] for each in given} <= _flags_of_serve()
    expanded = {variable["name"] for variable in server.get("env", [])}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(given))) == expanded


@_named(VARIANTS)
def test_pods_meet_the_restricted_standard_and_write_to_volumes_only(render, flags):
    for resource in render(*flags):
        if resource["kind"] not in ("Deployment", "Job"):
            continue
        pod = resource["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= {v["name"] for v in pod["volumes"]}


def test_each_probe_asks_for_what_it_is_for(render):
    (server,) = _one(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    paths = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/startupz", "liveness": "/livez", "readiness": "/readyz"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 600  # startupSeconds


def test_server_and_job_agree_on_where_the_model_lies(render):
    resources = render(*VARIANTS["production"])
    (job,) = _one(resources, "Job")["spec"]["template"]["spec"]["containers"]
    pod = _one(resources, "Deployment")["spec"]["template"]["spec"]
    waiting = next(each for each in pod["initContainers"] if each["name"] == "wait-for-model")
    repo, revision, folder = job["args"]
    assert (repo, revision) == ("Qwen/Qwen3-4B", "main")
    assert _built(resources)["engine"].model.model == folder == waiting["command"][-1]


def test_another_model_is_fetched_by_another_job_into_another_folder(render):
    def names(*flags):
        job = _one(render("--set", "model.repo=org/name", *flags), "Job")
        return job["metadata"]["name"], job["spec"]["template"]["spec"]["containers"][0]["args"][-1]

    before, after = names(), names("--set", "model.revision=v2")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_change_of_the_configuration_rolls_the_pods(render, run):
    def checksum(*flags):
        return _one(render(*flags), "Deployment")["spec"]["template"]["metadata"]["annotations"]

    assert checksum() != checksum("--set", "config.scheduler.max_num_seqs=8")
    rendered = {name: run("kubectl", "kustomize", OVERLAYS / name) for name in generate.PROFILES}
    hashes = {re.search(r"name: tokenmill-config-(\w{10})", text).group(1) for text in rendered.values()}
    assert len(hashes) == len(generate.PROFILES)


def test_the_autoscaler_owns_the_number_of_replicas(render):
    assert "replicas" in _one(render(), "Deployment")["spec"]
    for kind in ("hpa", "keda"):
        deployment = _one(render("--set", f"autoscaling.kind={kind}"), "Deployment")
        assert "replicas" not in deployment["spec"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("replica=2", "replica"),
        ("secret.adminKey=admin", "/secret/name"),
        ("secret.flags.redis=redis", "/secret/name"),
        ("config.server.port=9000", "/config/server/port"),
        ("autoscaling.kind=magic", "/autoscaling/kind"),
        ("autoscaling.saturation=7", "/autoscaling/saturation"),
        ("lifecycle.marginSeconds=0", "/lifecycle/marginSeconds"),
        ("model.repo=../../etc", "/model/repo"),
        ("model.revision=a/b", "/model/revision"),
        ("resources.limits=null", "/resources"),
        ("image.tag=latest", "/image/tag"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(render, flags, named):
    with pytest.raises(ValueError, match=named):
        render("--set", flags)


def test_every_setting_of_the_chart_is_in_its_schema():
    schema = json.loads((generate.CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = yaml.safe_load((generate.CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert values.keys() == schema["properties"].keys() - {"global"}
