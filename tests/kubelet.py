"""The manifests below deploy/kubernetes as the cluster makes files of them: generated objects, and a pod's volumes."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.settings.credentials import make_tokens

MANIFESTS = Path(__file__).parents[1] / "deploy" / "kubernetes"
HOSTS = ("weightsync", "127.0.0.1")
Object = dict[str, Any]


def kustomization(folder: Path = MANIFESTS) -> Object:
    """What kustomize is told of ``folder``."""
    told: Object = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return told


def resources() -> list[Object]:
    """Every object that stands in a file, those of the component with them."""
    folders = [MANIFESTS, MANIFESTS / "monitoring"]
    files = [folder / name for folder in folders for name in kustomization(folder)["resources"]]
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def one(kind: str, name: str) -> Object:
    """The only object of that kind and name."""
    (found,) = [each for each in resources() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def roles() -> tuple[str, ...]:
    """The tokens that the manifests ask for."""
    (daemon,) = [made for made in kustomization()["secretGenerator"] if made["name"] == "weightsync-daemon"]
    return tuple(Path(file).name.removesuffix(".token") for file in daemon["files"])


def made(folder: Path) -> None:
    """Makes the files beside a copy of the manifests that the head of kustomization.yaml says how to make."""
    make_tokens(folder / "tokens", roles())
    make_certificates(folder / "certificates", HOSTS, (), 1)


def generated(folder: Path) -> Iterator[Object]:
    """The ConfigMaps and Secrets that kustomize makes of ``folder``, without the hash in their names."""
    told = kustomization(folder)
    for kind, generator in (("ConfigMap", "configMapGenerator"), ("Secret", "secretGenerator")):
        for each in told[generator]:
            data = {Path(file).name: (folder / file).read_bytes() for file in each["files"]}
            texts = {name: value.decode() for name, value in data.items()}
            coded = {name: base64.b64encode(value).decode() for name, value in data.items()}
            values = texts if kind == "ConfigMap" else coded
            yield {"apiVersion": "v1", "kind": kind, "metadata": {"name": each["name"]}, "data": values}


class Volumes:
    """The volumes of a pod's container, below ``root`` instead of at ``/``, with the modes that a kubelet gives.

    A Secret or a ConfigMap is a folder that all may write, with the sticky bit, and in it links to what lies in another
    folder, which a change replaces as a whole. With ``fsGroup`` the group reads and writes, and the bits say so.
    """

    def __init__(self, pod: Object, folder: Path, root: Path) -> None:
        self._objects = {each["metadata"]["name"]: each for each in generated(folder)}
        spec = pod["spec"]["template"]["spec"]
        claims = {each["metadata"]["name"] for each in pod["spec"].get("volumeClaimTemplates", ())}
        self._volumes = {each["name"]: each for each in spec["volumes"]} | {name: {"claim": name} for name in claims}
        (self._container,) = spec["containers"]
        for mount in self._container["volumeMounts"]:
            self._mount(mount, root)

    def _mount(self, mount: Object, root: Path) -> None:
        place = root / mount["mountPath"].removeprefix("/")
        volume = self._volumes[mount["name"]]
        place.parent.mkdir(parents=True, exist_ok=True)
        if "secret" in volume:
            self._data(place, volume["secret"]["secretName"], volume["secret"]["defaultMode"])
        elif "configMap" in volume:
            self._data(place, volume["configMap"]["name"], 0o644)
        else:
            place.mkdir()
            place.chmod(0o2775)  # as fsGroup leaves it

    def _data(self, place: Path, name: str, mode: int) -> None:
        inner = place / "..2026_11_26_16_31_20.1234567890"
        inner.mkdir(parents=True)
        inner.chmod(0o2755)
        for key, value in self._objects[name]["data"].items():
            secret = self._objects[name]["kind"] == "Secret"
            (inner / key).write_bytes(base64.b64decode(value) if secret else value.encode())
            (inner / key).chmod(mode)
            (place / key).symlink_to(f"..data/{key}")
        os.symlink(inner.name, place / "..data")
        place.chmod(0o3777)


def environment(pod: Object, **fields: str) -> dict[str, str]:
    """The variables of the pod's container; ``fields``: what a reference to a field of the pod gives."""
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    found: dict[str, str] = {}
    for each in container["env"]:
        value = (
            each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"].replace(".", "_")]
        )
        for name, known in found.items():  # a reference is to a variable that stands before it
            value = value.replace(f"$({name})", known)
        found[each["name"]] = value
    return found
