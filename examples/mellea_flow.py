"""A guarded answer through Mellea over `midstream serve`: adapters check the question, and each answer that is drawn.

python examples/mellea_flow.py "Name three birds." --url http://localhost:8000
"""

import argparse
import json

import httpx
import yaml
from mellea.backends import ModelOption
from mellea.backends.adapters import Adapter, AdapterType, EmbeddedBinding, Identity, get_io_contract
from mellea.backends.openai import OpenAIBackend
from mellea.stdlib import functional
from mellea.stdlib.components import Intrinsic, Message
from mellea.stdlib.context import ChatContext
from mellea.stdlib.requirements import ALoraRequirement
from mellea.stdlib.sampling import RejectionSamplingStrategy

ALORA = (AdapterType.ALORA,)
LABELS = {"jailbreak": {"yes": 1.0, "no": 0.0}, "requirement_check": {"met": 1.0, "not_met": 0.0}}
OPTIONS = {ModelOption.MAX_NEW_TOKENS: 24, ModelOption.TEMPERATURE: 1.0}
STRATEGY = RejectionSamplingStrategy(loop_budget=3)  # until the requirement is met, at most three times
DRAWING = {"strategy": STRATEGY, "model_options": OPTIONS, "return_sampling_results": True}


def connect(url: str) -> OpenAIBackend:
    """A backend that knows the server's adapters by their contracts; what they answer becomes {name: {score}}."""
    models = {model["id"]: model for model in httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]}
    backend = OpenAIBackend(next(iter(models)), base_url=f"{url}/v1", api_key="none")
    for name, labels in LABELS.items():
        steps = [{"type": "likelihood", "input_path": [], "categories_to_values": labels}]
        steps += [{"type": "nest", "input_path": [], "field_name": field} for field in ("score", name)]
        contract = {**yaml.safe_load(models[name]["adapter"]["contract"]), "transformations": steps}
        backend.add_adapter(Adapter(Identity(name, "alora"), get_io_contract(name), EmbeddedBinding()), config=contract)
    return backend


def answer(backend: OpenAIBackend, question: str, requirement: str = "The answer is short.") -> str:
    asked = ChatContext().add(Message("user", question))
    guard, _ = functional.act(Intrinsic("jailbreak", adapter_types=ALORA), asked, backend, strategy=None)
    print("guard:", guard)
    if json.loads(str(guard))["jailbreak"]["score"] > 0.5:
        return "I cannot help with that."
    check = ALoraRequirement(requirement, "requirement_check", adapter_types=ALORA)
    drawn = functional.instruct(question, ChatContext(), backend, requirements=[check], **DRAWING)
    for number, [(_, verdict)] in enumerate(drawn.sample_validations):
        print("*" if number == drawn.result_index else " ", verdict.reason, drawn.sample_generations[number])
    return str(drawn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Answer between two checks, through Mellea.")
    parser.add_argument("question")
    parser.add_argument("--url", required=True)
    args = parser.parse_args()
    backend = connect(args.url)
    print(answer(backend, args.question))
    backend.close()
