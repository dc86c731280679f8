"""The description of the routes, and what schemathesis finds with it: a short form.

By hand for longer: schemathesis run URL/openapi.json --max-examples 1000
"""

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

POSTED = ["/v1/chat/completions", "/v1/completions", "/feedback", "/interview/grade"]


@pytest.fixture(scope="module")
def described(served):
    return httpx2.get(f"{served.url}/openapi.json").json()


def test_routes_are_described(described):
    for path in [*POSTED, "/interview/compare"]:
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]
    assert set(described["paths"]) >= {"/v1/models", "/health", "/metrics", "/interview/questions"}
    assert "/" not in described["paths"]


def test_nothing_that_is_described_or_not_makes_it_fail(served):
    """Bodies that fit the description and bodies that do not; none may give a 500."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    bounded = settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    num_asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @bounded
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                nonlocal num_asked
                num_asked += 1
                response = case.call(timeout=60)
                assert response.status_code < 500 or response.status_code == 504
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            try:
                ask()
            except Unsatisfiable:  # nothing about this route can be wrong
                assert mode == schemathesis.GenerationMode.NEGATIVE
    assert num_asked > 100
    assert served.process.poll() is None
    assert "Traceback" not in served.log.read_text()
