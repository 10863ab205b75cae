"""Flags and variables in deploy/ are those that the programs have, and the parts of a deployment agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from midstream.cli.main import app
from midstream.config import ServerConfig
from tests.deploy.files import DEPLOY, ROOT, commands, pods, services

FRONTS = {name: command for name, command in commands().items() if command[:2] == ["midstream", "serve"]}
VLLMS = {name: command for name, command in commands().items() if name not in FRONTS}


def front_settings(command: list[str]) -> dict[str, Any]:
    """The settings that the real command line reads. Raises for a flag that it does not have."""
    group: Any = typer.main.get_command(app)
    serve = group.commands["serve"]
    context = serve.make_context("serve", list(command[2:]))
    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    return ServerConfig.model_validate(given).model_dump()


def values_after(command: list[str], flag: str) -> list[str]:
    """The values of a vLLM flag that takes several: those up to the next flag."""
    found = []
    for part in command[command.index(flag) + 1 :]:
        if part.startswith("--"):
            break
        found.append(part)
    return found


def test_there_is_one_front_and_vllms_in_each_kind_of_deployment() -> None:
    assert set(FRONTS) == {"compose front", "kubernetes midstream"}
    assert set(VLLMS) == {"compose vllm-1", "compose vllm-2", "kubernetes vllm"}


@pytest.mark.parametrize("name", FRONTS)
def test_the_front_has_these_flags(name: str) -> None:
    settings = front_settings(FRONTS[name])
    assert settings["backend"] == "http://router:8080"
    assert settings["model"] == "/model"


def test_a_flag_that_there_is_not_is_found() -> None:
    with pytest.raises(Exception, match="no-such-flag"):
        front_settings([*FRONTS["compose front"], "--no-such-flag=1"])


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("vllm", VLLMS)
def test_front_and_vllm_serve_the_same(name: str, vllm: str) -> None:
    settings, command = front_settings(FRONTS[name]), VLLMS[vllm]
    assert command[0] == settings["model"]
    assert f"--served-model-name={settings['served_name']}" in command
    modules = [module.partition("=")[2] for module in values_after(command, "--lora-modules")]
    assert modules == list(settings["adapters"])
    # What RemoteBackend asks for: probabilities from 20 logprobs, and how much was reused.
    assert {"--max-logprobs=20", "--enable-prompt-tokens-details", "--enable-prefix-caching"} <= set(command)


def test_replicas_are_alike() -> None:
    first, *others = VLLMS.values()
    assert others == [first] * len(others)


def test_variables_of_the_front_are_its_settings() -> None:
    names = set(services()["front"]["environment"])
    names |= {each["name"] for each in dict(pods())["midstream"]["containers"][0]["env"]}
    known = {f"MIDSTREAM_SERVE_{name.upper()}" for name in ServerConfig.model_fields} | {"MIDSTREAM_CACHE"}
    assert names <= known


def test_a_body_that_the_front_takes_fits_the_timeouts_of_the_router() -> None:
    config = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8")
    limit = ServerConfig().request_timeout_s
    for side in ("client", "server"):
        found = re.search(rf"timeout {side} (\d+)s", config)
        assert found is not None
        # A backend waits 600 s for a silent server; the router is not to be the first to give up.
        assert int(found[1]) > max(limit, 600)


@pytest.mark.parametrize("file", [DEPLOY / "vllm" / "Dockerfile", ROOT / "Dockerfile"], ids=str)
def test_dockerfiles_copy_what_is_there_and_end_without_root(file: Path) -> None:
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    copied = [source for line in lines if line[0] == "COPY" for source in line[1:-1]]
    assert copied
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert Path(source).parts[0] not in ignored, source
    users = [line[1] for line in lines if line[0] == "USER"]
    assert users
    assert users[-1] not in ("root", "0")


def test_images_are_our_own_or_public_ones_by_their_plain_names() -> None:
    texts = [file.read_text(encoding="utf-8") for file in DEPLOY.rglob("*.yaml")]
    found = {image for text in texts for image in re.findall(r"image: (\S+)", text)}
    assert found == {"haproxy:2.6", "midstream", "midstream-vllm"}


def test_yaml_has_no_key_twice() -> None:
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> Any:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        assert len(keys) == len(set(keys)), keys
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for file in DEPLOY.rglob("*.yaml"):
        assert list(yaml.load_all(file.read_text(encoding="utf-8"), Loader=Strict)), file
