"""deploy/kubernetes: valid by Kubernetes' own schemas, and what the objects say of each other holds."""

from __future__ import annotations

import copy
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import DEPLOY, manifests, named, pods

# The oldest that still gets patches, and the newest whose schemas the validator has.
VERSIONS = ("1.34", kubernetes_validate.latest_version())


def _identity(each: dict[str, Any]) -> str:
    return f"{each['kind']}-{each['metadata']['name']}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", manifests(), ids=_identity)
def test_each_object_is_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_what_is_no_field_is_found() -> None:
    wrong = copy.deepcopy(named("Deployment", "midstream"))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_kustomize_builds_all() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    built = subprocess.run(["kubectl", "kustomize", str(DEPLOY)], capture_output=True, text=True, check=True).stdout
    objects = list(yaml.safe_load_all(built))
    assert len(objects) == len(manifests()) + 1
    config = next(each for each in objects if each["kind"] == "ConfigMap")
    assert config["data"] == {"haproxy.cfg": (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8")}
    assert {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"} == {"midstream"}
    router = next(each for each in objects if _identity(each) == "Deployment-router")
    assert router["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda each: each if isinstance(each, str) else None)
def test_pods_are_probed_bounded_and_not_root(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert named("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"] == {"app": name}


def test_services_find_their_pods() -> None:
    for each in manifests():
        if each["kind"] == "Service":
            kind = "StatefulSet" if each["metadata"]["name"] == "vllm" else "Deployment"
            labels = named(kind, each["metadata"]["name"])["spec"]["template"]["metadata"]["labels"]
            assert labels == each["spec"]["selector"]


def test_the_router_knows_each_replica_by_its_lasting_name() -> None:
    vllm = named("StatefulSet", "vllm")
    namespace = named("Namespace", "midstream")["metadata"]["name"]
    port = named("Service", "vllm")["spec"]["ports"][0]["port"]
    container = dict(pods())["router"]["containers"][0]
    known = {each["name"]: each["value"] for each in container["env"]}
    bind = known.pop("ROUTER_BIND")
    assert list(known.values()) == [
        f"vllm-{number}.{vllm['spec']['serviceName']}.{namespace}.svc.cluster.local:{port}"
        for number in range(vllm["spec"]["replicas"])
    ]
    front = dict(pods())["midstream"]["containers"][0]
    assert f"--backend=http://router:{bind.rpartition(':')[2]}" in front["args"]


def test_claims_and_secrets_that_are_used_are_there_or_named_in_the_readme() -> None:
    claims = {each["metadata"]["name"] for each in manifests() if each["kind"] == "PersistentVolumeClaim"}
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for _, pod in pods():
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    secret = variable["valueFrom"]["secretKeyRef"]
                    assert f"secret generic {secret['name']} " in readme
                    assert f"--from-literal={secret['key']}=" in readme
