"""deploy/compose.yaml: valid by the Compose Specification, and its parts fit each other."""

from __future__ import annotations

import json

import compose_spec
import pytest
import yaml

from tests.deploy.files import DEPLOY, compose_text, services


def check(text: str) -> None:
    """By the specification, which knows no merge keys: YAML's are resolved before."""
    compose_spec.PyCompose.from_json(json.dumps(yaml.safe_load(text))).validate()


def test_it_is_valid() -> None:
    for given in ({}, {"MODEL": "./granite", "ADAPTERS": "./mine"}):
        check(compose_text(given))


def test_what_is_no_key_of_the_specification_is_found() -> None:
    with pytest.raises(ValueError, match="heathcheck"):
        check(compose_text({}).replace("healthcheck:", "heathcheck:"))


def test_the_router_knows_each_replica() -> None:
    found = services()
    replicas = {name for name in found if name.startswith("vllm-")}
    router = found["router"]
    assert {f"{name}:8000" for name in replicas} == {
        value for name, value in router["environment"].items() if name.startswith("REPLICA_")
    }
    assert set(router["depends_on"]) == replicas
    port = router["environment"]["ROUTER_BIND"].rpartition(":")[2]
    assert f"--backend=http://router:{port}" in found["front"]["command"]


def test_no_two_replicas_share_a_gpu() -> None:
    devices = [
        device["device_ids"]
        for name, each in services().items()
        if name.startswith("vllm-")
        for device in each["deploy"]["resources"]["reservations"]["devices"]
    ]
    assert len(devices) == 2
    assert len({tuple(ids) for ids in devices}) == 2


def test_files_that_are_named_are_there() -> None:
    for name, each in services().items():
        if "build" in each:
            context = (DEPLOY / each["build"]["context"]).resolve()
            assert (context / each["build"]["dockerfile"]).is_file(), name
    assert (DEPLOY / services()["router"]["volumes"][0].partition(":")[0]).is_file()
