"""The deployment files' arguments for vLLM are those that it has."""

from __future__ import annotations

import json

from tests.deploy.test_settings import VLLMS

from serving import Vllm

PARSER = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for command in json.loads(sys.argv[1]):
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    print(json.dumps([found.model_tag, found.max_logprobs, [each.name for each in found.lora_modules]]))
"""


def test_vllm_takes_them(vllm: Vllm) -> None:
    program = f"import sys; sys.argv[1:] = [{json.dumps(list(VLLMS.values()))!r}]\n{PARSER}"
    done = vllm.run(program)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [["/model", 20, ["answerability", "jailbreak"]]] * len(VLLMS)


def test_a_flag_that_there_is_not_is_found(vllm: Vllm) -> None:
    program = f"import sys; sys.argv[1:] = [{json.dumps([['/model', '--no-such-flag']])!r}]\n{PARSER}"
    assert "no-such-flag" in vllm.run(program).stderr
