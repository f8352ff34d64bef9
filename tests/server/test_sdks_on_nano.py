"""The official openai and anthropic packages over HTTP against nano, which reads a file and writes one with tools."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepflash.assistant.local import open_session
from stepflash.server.app import create_app
from stepflash.settings import EngineSettings
from tests.server.live import serving

pytestmark = pytest.mark.client
MAX_ROUNDS = 4
READ = ("read_file", "Read a text file.", {"path": {"type": "string"}}, ["path"])
WRITE = (
    "write_file",
    "Write text to a file.",
    {"path": {"type": "string"}, "content": {"type": "string"}},
    ["path", "content"],
)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    settings = EngineSettings(max_num_seqs=2, kv_cache_gb=0.25)
    with (
        open_session("nano", settings) as local,
        serving(create_app(local.session, "nano", defaults=local.sampling)) as url,
    ):
        yield url


@pytest.fixture
def run_tool(tmp_path: Path) -> Callable[[str, Any], str]:
    (tmp_path / "notes.txt").write_text("blue river")

    def run_tool(name: str, arguments: Any) -> str:
        file = tmp_path / Path(arguments["path"]).name
        if name == "read_file":
            return file.read_text()
        assert name == "write_file"
        file.write_text(arguments["content"])
        return "ok"

    return run_tool


def schema(properties: Any, required: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def ask_chat(base_url: str, question: str, tool: Any, run_tool: Callable[[str, Any], str]) -> str:
    openai = pytest.importorskip("openai", reason="the openai package is not installed: make test-clients")
    tools: Any = [
        {"type": "function", "function": {"name": name, "description": text, "parameters": schema(*rest)}}
        for name, text, *rest in (tool,)
    ]
    messages: list[Any] = [{"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(MAX_ROUNDS):
            with client.chat.completions.stream(
                model="nano", messages=messages, tools=tools, temperature=0, max_tokens=400
            ) as stream:
                message = stream.get_final_completion().choices[0].message
            messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
            if not message.tool_calls:
                return str(message.content)
            for call in message.tool_calls:
                text = run_tool(call.function.name, json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    raise AssertionError(messages)


def ask_responses(base_url: str, question: str, tool: Any, run_tool: Callable[[str, Any], str]) -> str:
    openai = pytest.importorskip("openai", reason="the openai package is not installed: make test-clients")
    tools: Any = [
        {"type": "function", "name": name, "description": text, "strict": False, "parameters": schema(*rest)}
        for name, text, *rest in (tool,)
    ]
    items: list[Any] = [{"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(MAX_ROUNDS):
            response = client.responses.create(
                model="nano", input=items, tools=tools, temperature=0, max_output_tokens=400, store=False
            )
            items += [item.model_dump(exclude_none=True) for item in response.output]
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return str(response.output_text)
            for call in calls:
                text = run_tool(call.name, json.loads(call.arguments))
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": text})
    raise AssertionError(items)


def ask_messages(base_url: str, question: str, tool: Any, run_tool: Callable[[str, Any], str]) -> str:
    anthropic = pytest.importorskip(
        "anthropic", reason="the anthropic package is not installed: make test-clients"
    )
    tools: Any = [
        {"name": name, "description": text, "input_schema": schema(*rest)} for name, text, *rest in (tool,)
    ]
    messages: list[Any] = [{"role": "user", "content": question}]
    with anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0) as client:
        for _ in range(MAX_ROUNDS):
            with client.messages.stream(
                model="nano",
                messages=messages,
                tools=tools,
                max_tokens=400,
                thinking={"type": "enabled", "budget_tokens": 1024},
            ) as stream:
                message = stream.get_final_message()
            content = [block.model_dump(exclude_none=True) for block in message.content]
            messages.append({"role": "assistant", "content": content})
            calls = [block for block in message.content if block.type == "tool_use"]
            if not calls:
                return "".join(block.text for block in message.content if block.type == "text")
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": run_tool(call.name, call.input)}
                for call in calls
            ]
            messages.append({"role": "user", "content": results})
    raise AssertionError(messages)


@pytest.mark.parametrize("ask", [ask_chat, ask_responses, ask_messages])
def test_nano_reads_and_writes_files(
    ask: Callable[..., str], base_url: str, run_tool: Callable[[str, Any], str], tmp_path: Path
) -> None:
    assert "blue river" in ask(base_url, "Read the file notes.txt.", READ, run_tool)
    assert ask(base_url, 'Write "green tea" to plan.txt.', WRITE, run_tool)
    assert (tmp_path / "plan.txt").read_text() == "green tea"
