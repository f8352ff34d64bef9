"""The OpenAPI description at `/openapi.json`: what the bodies of requests may hold.

Routes read their bodies themselves, because errors must have the form of each API; so FastAPI cannot know them.
`describe_bodies` adds the models by which they are checked, and the statuses that a client must expect.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from stepflash.server.anthropic_decode import CountTokensBody, MessagesBody
from stepflash.server.body import Body
from stepflash.server.openai_responses_decode import ResponsesBody
from stepflash.server.openai_schema import ChatBody, CompletionBody
from stepflash.server.prompt_routes import PromptBody, TokensBody

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/tokenize": PromptBody,
    "/apply-template": PromptBody,
    "/detokenize": TokensBody,
    "/cache/explain": PromptBody,
}
ERRORS = {
    "400": "the request is wrong; the body names the field",
    "401": "no valid API key",
    "404": "there is no such thing",
    "405": "the route does not take this method",
    "413": "the body is too large",
    "429": "too many requests; retry-after says when to come back",
    "503": "the model does not answer",
    "529": "Anthropic's status for too many requests",
}


def describe_bodies(app: FastAPI) -> None:
    """Make `app.openapi()` complete."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(
                get_openapi(title=app.title, version=app.version, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(description: dict[str, Any]) -> dict[str, Any]:
    schemas: dict[str, Any] = description.setdefault("components", {}).setdefault("schemas", {})
    # FastAPI's own error bodies, which no route of ours sends.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            for status, text in ERRORS.items():
                operation["responses"].setdefault(status, {"description": text})
            if method == "post" and path in BODIES:
                schema = {"$ref": f"#/components/schemas/{_add(schemas, BODIES[path])}"}
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                }
    return description


def _add(schemas: dict[str, Any], body: type[Body]) -> str:
    """Put a model and those it needs among the schemas; its name there."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[body.__name__] = schema
    return body.__name__
