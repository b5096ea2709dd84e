"""What runs a fleet without Ray: Compose, Kubernetes and systemd, each held against its schema and the
settings.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.__main__ import _settings
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = ROOT / "config" / "kubernetes"
SYSTEMD = sorted((ROOT / "config" / "systemd").glob("*.service"))
VERSIONS = ("1.33", "1.37")  # of Kubernetes
PORT = 8000  # what the image listens on
SECRETS = ("FLEET_KEY", "ADMIN_KEY", "DATABASE_URL", "SECRET_ACCESS_KEY", "PASSWORD")

Resource = dict[str, Any]


def drain_timeout() -> float:
    return float(Settings.model_fields["drain_timeout"].default)


def check_settings(names: Iterator[str] | list[str]) -> None:
    """Every variable of ours is a setting."""
    known = {f"LORAPLEX_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in names if name.startswith("LORAPLEX_")} <= known


# --- Kubernetes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resources() -> list[Resource]:
    """As `kubectl apply -k` sends them; where there is no kubectl, as they are written."""
    kubectl = shutil.which("kubectl")
    if kubectl is not None:
        done = subprocess.run(
            [kubectl, "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=True, timeout=60
        )
        return list(yaml.safe_load_all(done.stdout))
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    return [each for name in listed for each in yaml.safe_load_all((KUBERNETES / name).read_text())]


def one(resources: list[Resource], kind: str, name: str) -> Resource:
    (found,) = [r for r in resources if r["kind"] == kind and r["metadata"]["name"] == name]
    return found


def pod(resources: list[Resource], role: str) -> tuple[Resource, Resource]:
    """A role's pod, and its container."""
    kind = "Deployment" if role == "gateway" else "StatefulSet"
    spec = one(resources, kind, f"loraplex-{role}")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def test_every_file_is_in_the_kustomization() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(
        path.name for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_resources_follow_the_schemas(resources: list[Resource], version: str) -> None:
    for resource in resources:
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_wrong_resource_would_be_noticed(resources: list[Resource]) -> None:
    wrong = dict(resources[0], spec={"podManagmentPolicy": "Parallel"})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("role", ["gateway", "replica"])
def test_a_pod_has_its_role_and_known_settings(resources: list[Resource], role: str) -> None:
    spec, container = pod(resources, role)
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["LORAPLEX_ROLE"] == role
    check_settings(list(variables))
    assert [entry["containerPort"] for entry in container["ports"]] == [PORT]
    assert f"EXPOSE {PORT}" in (ROOT / "Dockerfile").read_text()
    assert spec["terminationGracePeriodSeconds"] > drain_timeout()
    assert spec["securityContext"]["runAsNonRoot"] is True
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claims = one(resources, "StatefulSet", "loraplex-replica")["spec"]["volumeClaimTemplates"]
    given = {volume["name"] for volume in spec["volumes"]}
    if role == "replica":
        given |= {claim["metadata"]["name"] for claim in claims}
    assert mounted == given


@pytest.mark.parametrize("role", ["gateway", "replica"])
def test_probes_ask_what_the_server_answers(resources: list[Resource], role: str) -> None:
    _, container = pod(resources, role)
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    started = container["startupProbe"]
    patience = started["periodSeconds"] * started["failureThreshold"]
    assert patience >= (600 if role == "replica" else 30)


def test_services_select_the_pods(resources: list[Resource]) -> None:
    for name, role in (("loraplex", "gateway"), ("loraplex-replica", "replica")):
        service = one(resources, "Service", name)["spec"]
        assert service["selector"]["app.kubernetes.io/component"] == role
        assert [port["targetPort"] for port in service["ports"]] == ["http"]


def test_gateways_reach_each_replica_by_the_name_it_announces(resources: list[Resource]) -> None:
    _, container = pod(resources, "replica")
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    stateful = one(resources, "StatefulSet", "loraplex-replica")["spec"]
    service = one(resources, "Service", stateful["serviceName"])["spec"]
    assert values["LORAPLEX_REPLICA_URL"] == f"http://$(POD_NAME).{stateful['serviceName']}:{PORT}"
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)


def test_secrets_come_by_reference(resources: list[Resource]) -> None:
    assert "Secret" not in {resource["kind"] for resource in resources}
    for role in ("gateway", "replica"):
        _, container = pod(resources, role)
        assert {"secretRef": {"name": "loraplex"}} in container["envFrom"]
    for path in KUBERNETES.glob("*.yaml"):
        for resource in yaml.safe_load_all(path.read_text()):
            shown = yaml.safe_dump(resource)
            assert not [secret for secret in SECRETS if secret in shown], path.name


def test_the_shared_settings_are_known() -> None:
    (generated,) = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
    check_settings([literal.partition("=")[0] for literal in generated["literals"]])
    head = (KUBERNETES / "kustomization.yaml").read_text()
    check_settings(re.findall(r"--from-literal=(LORAPLEX_\w+)", head))


def test_scaling_speaks_of_what_there_is(resources: list[Resource]) -> None:
    scaled = {
        r["spec"]["scaleTargetRef"]["name"] for r in resources if r["kind"] == "HorizontalPodAutoscaler"
    }
    assert scaled == {"loraplex-gateway", "loraplex-replica"}
    (metric,) = one(resources, "HorizontalPodAutoscaler", "loraplex-replica")["spec"]["metrics"]
    assert f"`{metric['pods']['metric']['name']}`" in (ROOT / "docs" / "metrics.md").read_text()


# --- Compose -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((ROOT / "config" / "compose-fleet.yml").read_text())


def test_the_compose_file_holds_together(compose: Any) -> None:
    services = compose["services"]
    for name, service in services.items():
        assert "image" in service, name
        wanted = service.get("depends_on", [])
        assert set(wanted) <= set(services), name
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{.*?\}", "/", mount).split(":")[0]
            assert source.startswith(("/", ".")) or source in compose["volumes"], mount
    used = {m.split(":")[0] for s in services.values() for m in s.get("volumes", [])}
    assert set(compose["volumes"]) <= used


def test_compose_runs_one_gateway_and_two_replicas(compose: Any) -> None:
    services = compose["services"]
    ours = {name: s for name, s in services.items() if "LORAPLEX_ROLE" in s.get("environment", {})}
    assert sorted(s["environment"]["LORAPLEX_ROLE"] for s in ours.values()) == [
        "gateway",
        "replica",
        "replica",
    ]
    for name, service in ours.items():
        variables = service["environment"]
        check_settings(list(variables))
        assert float(service["stop_grace_period"].rstrip("s")) > drain_timeout()
        if variables["LORAPLEX_ROLE"] == "replica":
            assert variables["LORAPLEX_REPLICA_URL"] == f"http://{name}:{PORT}"
        for url in ("LORAPLEX_DATABASE_URL", "LORAPLEX_LIMITS_REDIS_URL", "AWS_ENDPOINT_URL"):
            host = re.split(r"[:/]", re.sub(r".*(://|@)", "", variables[url]))[0]
            assert host in services, url
    assert services["gateway"]["ports"] == [f"{PORT}:{PORT}"]


def test_compose_holds_no_secret(compose: Any) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if any(secret in name for secret in SECRETS):
                assert "${" in str(value), name


# --- systemd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SYSTEMD, ids=lambda path: path.name)
def test_a_unit_starts_the_server_in_its_role(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read(path)
    service = unit["Service"]
    variables = dict(entry.split("=", 1) for entry in service["Environment"].split())
    check_settings(list(variables))
    role = re.sub(r"^loraplex-?|@?\.service$", "", path.name)
    assert variables.get("LORAPLEX_ROLE", "") == role, "the unit's name is its role; alone it has the default"
    assert service["ExecStart"].endswith("python -m server serve")
    assert float(service["TimeoutStopSec"]) > drain_timeout()
    assert service["KillMode"] == "mixed"
    assert variables["LORAPLEX_DATA_DIR"] == f"/var/lib/{service['StateDirectory']}"
    check_settings(re.findall(r"LORAPLEX_[A-Z_]+", path.read_text()))


@pytest.mark.parametrize("path", SYSTEMD, ids=lambda path: path.name)
def test_a_unit_does_not_try_a_wrong_setting_for_ever(path: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("max_lora_rank: many\n")
    with pytest.raises(SystemExit) as ended:
        _settings(tmp_path / "wrong.yaml")
    assert f"RestartPreventExitStatus={ended.value.code}" in path.read_text().splitlines()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("path", SYSTEMD, ids=lambda path: path.name)
def test_systemd_understands_the_unit(path: Path, tmp_path: Path) -> None:
    """With a program that is there on this machine."""
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", path.read_text(), flags=re.M)
    text = text.replace("User=loraplex", "User=root")
    (tmp_path / path.name).write_text(text)
    name = path.name.replace("@", "@8101")
    if name != path.name:
        (tmp_path / name).symlink_to(path.name)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    said = [line for line in done.stderr.splitlines() if path.stem.split("@")[0] in line]
    assert (done.returncode, said) == (0, []), done.stderr
