"""Figure 21: schemathesis makes requests of our own description; no server error, and no answer it does not allow.

Also that the description, the models and the docs say the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, unsupported_method

from octavo.server.openapi import document
from octavo.server.schema import ChatRequest, CompletionRequest, ResponsesRequest
from octavo.server.settings import ServerSettings
from octavo.server.support import page_with_tables

SOURCES = sorted((Path(__file__).parents[2] / "src" / "octavo" / "server").glob("*.py"))
DOCS = Path(__file__).parents[2] / "docs" / "server.md"
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)
"""All but positive_data_acceptance: a schema cannot say how long a context is or what models there are."""
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/openapi.json"]


BASES = {
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
    },
    "/v1/completions": {"model": "fake", "prompt": "hello", "max_tokens": 8},
    "/v1/responses": {"model": "fake", "input": "hello", "max_output_tokens": 8},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [104, 105]},
}
"""A request that is answered with 200; three of four valid cases are this one with a few generated fields."""


def drive(harness, path: str, method: str, examples: int) -> Counter[int]:
    """Statuses of the answers."""
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=harness.url)
    operation = schema[path][method]
    strategy = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy, st.data())
    def run(case, data):
        positive = case.meta is not None and case.meta.generation.mode.is_positive
        if positive and isinstance(case.body, dict) and data.draw(st.integers(0, 3)):
            names = sorted(set(case.body) - set(BASES[path]))
            kept = data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
            case.body = BASES[path] | {name: case.body[name] for name in kept}
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    run()
    return statuses


@pytest.mark.parametrize("path", POSTS)
def test_posts(fake, path):
    statuses = drive(fake, path, "POST", 50)
    assert set(statuses) <= {200, 400, 404}
    assert min(statuses[200], statuses[400]) >= 3, statuses
    assert fake.service.models.restarts == 0


@pytest.mark.parametrize("path", GETS)
def test_gets(fake, path):
    drive(fake, path, "GET", 10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", POSTS)
def test_posts_at_full_size(fake, path):
    drive(fake, path, "POST", 5000)
    assert fake.service.models.restarts == 0


def test_the_check_can_fail(fake):
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=fake.url)
    case = schema["/health"]["GET"].Case()
    answer = httpx.get(f"{fake.url}/v1/models", trust_env=False)
    with pytest.raises(BaseExceptionGroup):
        case.validate_response(schemathesis.Response.from_any(answer), checks=CHECKS)


def test_every_field_says_what_becomes_of_it():
    for model in (ChatRequest, CompletionRequest, ResponsesRequest):
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra
            assert isinstance(extra, dict), name
            assert extra["x-octavo-support"] in ("honoured", "refused", "ignored"), name
            assert field.description, name


def test_the_page_has_the_tables():
    page = DOCS.read_text(encoding="utf-8")
    assert page_with_tables(page) == page, "run: python -m octavo.server.support docs/server.md"


def test_the_page_names_every_error_code():
    """What the code can say is in the table, and nothing else."""
    page = DOCS.read_text(encoding="utf-8")
    table = page.partition("| Status | `type` | `code` |")[2].partition("\n\n")[0]
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    said = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", table)) - {
        "invalid_request_error",
        "server_error",
        "rate_limit_error",
        "permission_error",
    }
    assert {code for code in said if f'"{code}"' not in source} == set()


def test_every_limit_is_visible(fake):
    shown = fake.client.get("/v1/models/fake").json()["limits"]
    for field in dataclasses.fields(ServerSettings):
        if field.metadata["limit"]:
            assert shown[field.name] == getattr(fake.service.settings, field.name)
    assert shown["context_tokens"] == 512
