"""Adapters as functions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import Running, write_adapters

CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]


def test_the_list_says_what_each_takes(live: Running) -> None:
    found = {entry["name"]: entry for entry in live.client.get("/v1/intrinsics").json()["data"]}
    assert found["jailbreak"]["labels"] == ["yes", "no"]
    assert found["jailbreak"]["reads"] == "user"
    assert found["requirement_check"]["arguments"] == ["requirement"]
    assert "twin" not in found, "a plain LoRA that no text calls"


def test_one_call(live: Running) -> None:
    response = live.client.post("/v1/intrinsics/jailbreak", json={"messages": CHAT})
    found = response.json()
    assert found["object"] == "intrinsic.result"
    assert found["result"] in ("yes", "no")
    assert abs(sum(found["probabilities"].values()) - 1) < 1e-6
    assert found["activation_index"] == 19, "it judges the user's turn"
    usage = found["usage"]
    assert usage["prompt_tokens"] == usage["computed_tokens"] + usage["prompt_tokens_details"]["cached_tokens"]
    again = live.client.post("/v1/intrinsics/jailbreak", json={"messages": CHAT}).json()
    assert again["usage"]["computed_tokens"] == 1
    assert again["probabilities"] == pytest.approx(found["probabilities"], abs=1e-4)


def test_several_at_once_share_the_prefix_and_one_failure_leaves_the_others(live: Running) -> None:
    messages = [{"role": "user", "content": "a prompt of its own " * 5}, CHAT[1]]
    names = ["jailbreak", "answerability", "nobody", "requirement_check", "certainty"]
    body: dict[str, Any] = {"names": names, "messages": messages}
    found = live.client.post("/v1/intrinsics", json=body).json()["data"]
    assert [entry["intrinsic"] for entry in found] == names
    assert found[2]["error"]["code"] == "adapter_not_found"
    assert "requirement" in found[3]["error"]["message"]
    shared = len(
        live.client.post("/tokenize", json={"messages": messages[:1], "add_generation_prompt": False}).json()["tokens"]
    )
    computed = [entry["usage"]["computed_tokens"] for entry in (found[0], found[1])]
    assert sum(computed) < shared + 60, "the prefix is computed once"
    body["arguments"] = {"requirement_check": {"requirement": "be short"}}
    assert live.client.post("/v1/intrinsics", json=body).json()["data"][3]["result"] in ("met", "not_met")


def test_a_fan_out_names_each_once_and_gives_arguments_to_those_only(live: Running) -> None:
    def refused(**body: Any) -> str:
        response = live.client.post("/v1/intrinsics", json={"messages": CHAT, **body})
        assert response.status_code == 400, response.text
        return str(response.json()["error"]["message"])

    message = refused(names=["jailbreak", "certainty", "jailbreak"])
    assert "jailbreak" in message
    assert "certainty" not in message
    message = refused(names=["jailbreak"], arguments={"requirement_chek": {"requirement": "x"}, "jailbreak": {}})
    assert "requirement_chek" in message


def test_a_name_with_a_slash(live: Running, tmp_path: Path) -> None:
    folder = write_adapters(tmp_path)["jailbreak"]
    live.run(live.engine.load_adapter(folder, name="team/jailbreak"))
    try:
        _until_listed(live, "team/jailbreak")
        for name in ("team/jailbreak", "team%2Fjailbreak"):
            response = live.client.post(f"/v1/intrinsics/{name}", json={"messages": CHAT})
            assert response.status_code == 200, response.text
            assert response.json()["intrinsic"] == "team/jailbreak"
    finally:
        live.run(live.engine.unload_adapter("team/jailbreak"))


def _until_listed(live: Running, name: str) -> None:
    """A server in front of another one sees within seconds what is loaded there."""
    for _ in range(200):
        if name in [model["id"] for model in live.client.get("/v1/models").json()["data"]]:
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} is not seen")


def test_errors(live: Running) -> None:
    def post(name: str, **body: Any) -> Any:
        return live.client.post(f"/v1/intrinsics/{name}", json={"messages": CHAT, **body})

    assert post("nobody").status_code == 404
    assert post("jailbreak", arguments={"x": 1}).status_code == 400
    assert post("certainty", messages=CHAT[:1]).json()["error"]["message"].endswith("has none")
    assert post("jailbreak", messages=[]).status_code == 400
