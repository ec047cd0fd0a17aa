"""docs/serving.md: its requests are bodies that the service reads, its commands exist, its Python runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from onerec_hf.scripts.parser import ScriptParser
from onerec_hf.scripts.serve import ServeArguments
from onerec_hf.serving import Limits
from onerec_hf.serving.replicas import Replicas
from onerec_hf.serving.schemas import CatalogueBody, ModelBody, RecommendBody

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BODIES = {"recommend": RecommendBody, "catalogue": CatalogueBody, "model": ModelBody}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_every_request_is_a_body_that_the_service_reads():
    found = re.findall(r"curl localhost:8000/(\w+) .*?-d '(.*?)'$", "\n".join(blocks("bash")), re.M | re.S)
    assert {path for path, _ in found} == set(BODIES)
    for path, body in found:
        BODIES[path].model_validate(json.loads(body.replace(", ...]", "]")))


def test_every_command_has_arguments_that_exist():
    commands = re.findall(r"^(?:onerec serve|docker run .* onerec) (.*)$", "\n".join(blocks("bash")), re.M)
    assert len(commands) >= 2
    for command in commands:
        args, _, _ = ScriptParser("serve", None, [ServeArguments, Limits, Replicas]).parse(shlex.split(command))
        assert args.repo
    named = set(re.findall(r"`--(\w+)", PAGE))
    known = set(ServeArguments.__dataclass_fields__) | set(Limits.__dataclass_fields__)
    known |= set(Replicas.__dataclass_fields__)
    assert named - known <= {"help"}


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(code):
    exec(code, {})
