"""The manifests are what Kubernetes takes, name each other truly, and give the daemon what it demands of its files."""

import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import kubelet
import kubernetes_validate
import msgspec
import pytest
import yaml
from kubelet import MANIFESTS, Object, Volumes, environment, generated, kustomization, one, resources
from weightsync.orchestrator.cli.config import findings_of
from weightsync.orchestrator.daemon.access.policy import POLICY
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.settings.credentials import Credential, credential_named, read_credentials
from weightsync.orchestrator.settings.settings import Settings, load
from weightsync.orchestrator.settings.tls import server_context

VERSIONS = ("1.29", "1.37")
"""ReadWriteOncePod is for all from 1.29 on; the other is the newest that the schemas know."""

ELSEWHERE = {"runs", "models"}
"""Claims that are yours, as docs/how-to/kubernetes.md says."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as its user has it, with tokens and certificates."""
    folder = tmp_path_factory.mktemp("kubernetes") / "weightsync"
    shutil.copytree(MANIFESTS, folder)
    kubelet.made(folder)
    return folder


@pytest.fixture
def settings(copy: Path, tmp_path: Path) -> Settings:
    """The configuration in the ConfigMap, loaded in the daemon's pod, which lies below a directory here."""
    (config,) = [each for each in generated(copy) if each["metadata"]["name"] == "weightsync-config"]
    (name,) = config["data"]
    mounted = one("StatefulSet", "weightsync")["spec"]["template"]["spec"]["containers"][0]["args"][-1]
    assert mounted == f"/etc/weightsync/config/{name}"
    Volumes(one("StatefulSet", "weightsync"), copy, tmp_path)
    text = config["data"][name]
    for path in ("/shared", "/var/lib", "/etc/weightsync/cert", "/etc/weightsync/cred"):
        assert f": {path}" in text
        text = text.replace(f": {path}", f": {tmp_path}{path}")
    (tmp_path / "config.yaml").write_text(text)
    return load(tmp_path / "config.yaml", {})


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(version: str, copy: Path) -> None:
    own = [each for each in resources() if not each["apiVersion"].startswith("monitoring.coreos.com/")]
    for each in (*own, *generated(copy)):
        assert kubernetes_validate.validate(each, version, strict=True) == version
    kinds = {each["kind"] for each in own}
    assert kinds == {"Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"}


def test_kubernetes_refuses_an_object_with_a_wrong_key() -> None:
    wrong = one("StatefulSet", "weightsync")
    wrong["spec"]["replica"] = wrong["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


class Option(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    disable_name_suffix_hash: bool


class Generator(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    files: list[str]
    options: Option | None = None


class Image(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    name: str
    new_name: str
    new_tag: str


class Kustomization(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What we use of kustomize's file; its own words are strict in the same way."""

    api_version: Literal["kustomize.config.k8s.io/v1beta1", "kustomize.config.k8s.io/v1alpha1"]
    kind: Literal["Kustomization", "Component"]
    resources: list[str]
    namespace: str = ""
    labels: list[dict[str, dict[str, str]]] = []
    images: list[Image] = []
    config_map_generator: list[Generator] = []
    secret_generator: list[Generator] = []


def test_the_kustomization_lists_every_file_and_every_image() -> None:
    for folder in (MANIFESTS, MANIFESTS / "monitoring"):
        told = msgspec.convert(kustomization(folder), Kustomization)
        files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml", "config.yaml"}
        assert set(told.resources) == files
    told = msgspec.convert(kustomization(), Kustomization)
    images = [each["spec"]["template"]["spec"]["containers"][0]["image"] for each in sets()]
    assert sorted(image.name for image in told.images) == sorted(images)
    secret = [file for made in told.secret_generator for file in made.files]
    ignored = (MANIFESTS / ".gitignore").read_text().split()
    assert all(f"/{Path(file).parent}/" in ignored for file in secret)


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not here: kustomize's own rendering is not tried"
)
def test_kustomize_renders_them(copy: Path) -> None:
    whole = (copy / "kustomization.yaml").read_text()
    (copy / "kustomization.yaml").write_text(whole.replace("# components:", "components:"))
    done = subprocess.run(["kubectl", "kustomize", copy], capture_output=True, text=True, timeout=60, check=False)
    (copy / "kustomization.yaml").write_text(whole)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert len(rendered) == len(resources()) + len(list(generated(copy)))
    for each in rendered:
        assert each["metadata"]["namespace"] == "weightsync"
        if each["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(each, VERSIONS[0], strict=True)
    (config,) = [each for each in rendered if each["metadata"]["name"].startswith("weightsync-config-")]
    assert config["metadata"]["name"] in done.stdout.replace(yaml.safe_dump(config), "")


def sets() -> list[Object]:
    return [each for each in resources() if each["kind"] == "StatefulSet"]


def used(pod: Object) -> Iterator[str]:
    for volume in pod["spec"]["template"]["spec"]["volumes"]:
        yield volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name") or volume["name"]


def test_what_pods_mount_is_there(copy: Path) -> None:
    objects = {each["metadata"]["name"] for each in generated(copy)}
    for pod in sets():
        spec = pod["spec"]["template"]["spec"]
        claims = {each["metadata"]["name"] for each in pod["spec"].get("volumeClaimTemplates", ())}
        volumes = {each["name"]: each for each in spec["volumes"]}
        mounts = [each["name"] for each in spec["containers"][0]["volumeMounts"]]
        assert sorted(mounts) == sorted([*volumes, *claims])
        named = set(used(pod))
        own = {name for name, each in volumes.items() if "emptyDir" in each or "persistentVolumeClaim" in each}
        assert named - own <= objects
        theirs = {e["persistentVolumeClaim"]["claimName"] for e in volumes.values() if "persistentVolumeClaim" in e}
        assert theirs <= ELSEWHERE


def test_the_daemon_believes_what_its_pod_has(settings: Settings) -> None:
    errors = [
        finding for finding in findings_of(settings) if finding.level == "error" and finding.check != "open files"
    ]
    assert errors == []
    assert settings.listen.tls is not None
    server_context(settings.listen.tls)
    found = {str(credential) for credential in read_credentials(settings.credentials).values()}
    assert found == {"trainer", "viewer", "operator", "engine rollout-0", "engine rollout-1"}


def test_the_state_directory_is_ours_alone(settings: Settings, tmp_path: Path) -> None:
    """The volume's root and what stands in it may be written by the pod's group; what the daemon makes there not."""
    settings.state_directory.mkdir(parents=True, mode=0o700)
    assert (tmp_path / "var/lib/weightsync").stat().st_mode & 0o020
    assert settings.state_directory.parent.parent == tmp_path / "var/lib/weightsync"
    assert [f for f in findings_of(settings) if f.level == "error" and f.check == "state_directory"] == []
    spec = one("StatefulSet", "weightsync")["spec"]["template"]["spec"]
    assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert spec["terminationGracePeriodSeconds"] >= settings.deadlines.stop_seconds + 15


def test_probes_ask_what_needs_no_credential() -> None:
    daemon = one("StatefulSet", "weightsync")["spec"]["template"]["spec"]["containers"][0]
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert daemon[probe]["httpGet"] == {"path": path, "port": "daemon", "scheme": "HTTPS"}
        assert POLICY[f"GET {path}"] == "public"
    engine = one("StatefulSet", "rollout")["spec"]["template"]["spec"]["containers"][0]
    assert engine["readinessProbe"]["httpGet"]["path"] == "/weightsync/ready"
    assert "--middleware=weightsync.agents.vllm.readiness.Readiness" in engine["args"]


def test_each_engine_may_come_in_by_its_own_token(settings: Settings) -> None:
    admit = settings.engines_admit
    assert admit is not None
    engines = one("StatefulSet", "rollout")
    tokens = {Path(file).name for made in kustomization()["secretGenerator"] for file in made["files"]}
    (mount,) = [
        each for each in engines["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] if each["name"] == "token"
    ]
    assert engines["spec"]["replicas"] == 2
    for number in range(engines["spec"]["replicas"]):
        variables = environment(engines, metadata_name=f"rollout-{number}", status_podIP=f"10.244.1.{number}")
        name = variables["WEIGHTSYNC_ENGINE"]
        assert any(fnmatchcase(name, pattern) for pattern in admit.names)
        assert mount["subPathExpr"].replace("$(POD_NAME)", name) == f"engine.{name}.token"
        assert f"engine.{name}.token" in tokens
        credential = credential_named(f"engine.{name}")
        assert credential == Credential("engine", name)
        assert credential.refuses_engine(name) == ""
        assert variables["WEIGHTSYNC_TOKEN_FILE"] == mount["mountPath"] == "/etc/weightsync/credentials/engine.token"
        assert variables["WEIGHTSYNC_HUB_URL"] == settings.agents_url.replace("https", "wss") + "/agents"
        assert variables["WEIGHTSYNC_RUN_ID"] == settings.run.id
        assert variables["VLLM_SERVER_DEV_MODE"] == "1"
        url = variables["WEIGHTSYNC_ENGINE_URL"]
        assert url == f"http://10.244.1.{number}:8000"
        assert Applicant(name=name, urls=(url,)).urls == (url,)
        assert admit.hosts == ("10.244.0.0/16",)


def test_policies_and_services_select_pods_and_ports_that_there_are() -> None:
    pods = {each["metadata"]["name"]: each["spec"]["template"] for each in sets()}
    ports = {
        name: {port["name"] for port in pod["spec"]["containers"][0]["ports"]} for name, pod in pods.items()
    }  # fmt: skip
    labels = {pod["metadata"]["labels"]["app.kubernetes.io/name"]: name for name, pod in pods.items()}
    foreign = {"trainer", "router"}
    for each in resources():
        match each["kind"]:
            case "Service":
                name = labels[each["spec"]["selector"]["app.kubernetes.io/name"]]
                assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports[name]
            case "PodDisruptionBudget":
                assert each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] in labels
            case "NetworkPolicy":
                name = labels[each["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]]
                for rule in each["spec"]["ingress"]:
                    assert {port["port"] for port in rule.get("ports", ())} <= ports[name]
                    peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"] if "podSelector" in peer]
                    assert {peer["app.kubernetes.io/name"] for peer in peers} <= set(labels) | foreign
    assert {"trainer", "rollout"} <= {
        peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
        for peer in one("NetworkPolicy", "weightsync-daemon")["spec"]["ingress"][0]["from"]
        if "podSelector" in peer
    }


class Keyed(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    key: str


class Authorization(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["Bearer"]
    credentials: Keyed


class SecretOrConfigMap(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    config_map: Keyed


class TlsConfig(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    server_name: str
    ca: SecretOrConfigMap


class Endpoint(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    port: str
    path: str
    scheme: Literal["http", "https"]
    interval: str
    authorization: Authorization
    tls_config: TlsConfig


class Selector(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    match_labels: dict[str, str]


class ServiceMonitorSpec(msgspec.Struct, forbid_unknown_fields=True):
    """What we use of it: https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.ServiceMonitor."""

    selector: Selector
    endpoints: list[Endpoint]


def test_prometheus_finds_the_daemon_and_may_look(copy: Path) -> None:
    monitor = one("ServiceMonitor", "weightsync")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    spec = msgspec.convert(monitor["spec"], ServiceMonitorSpec)
    service = one("Service", "weightsync")
    assert spec.selector.match_labels.items() <= service["metadata"]["labels"].items()
    (endpoint,) = spec.endpoints
    assert endpoint.port in {port["name"] for port in service["spec"]["ports"]}
    assert "viewer" in POLICY[f"GET {endpoint.path}"]
    assert endpoint.scheme == "https"
    assert endpoint.tls_config.server_name in kubelet.HOSTS
    objects = {each["metadata"]["name"]: each["data"] for each in generated(copy)}
    for named in (endpoint.authorization.credentials, endpoint.tls_config.ca.config_map):
        assert named.key in objects[named.name]
    assert endpoint.authorization.credentials.key == "viewer.token"
    assert set(objects["weightsync-viewer"]) == {"viewer.token"}
    assert set(objects["weightsync-trainer"]) == {"trainer.token"}
    assert "ca.key" not in {key for data in objects.values() for key in data}
