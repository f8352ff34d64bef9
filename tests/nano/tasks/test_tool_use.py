"""Calls fit the listed tools and come from the request; answers come from results. Kind: property, brute force."""

from __future__ import annotations

import re

import pytest

from stepflash.chat.messages import ToolCall
from stepflash.nano.tasks import Example
from stepflash.nano.tasks.tool_catalog import calculate
from tests.nano.tasks.drawing import draw

PYTHON_TYPES = {"string": str, "integer": int, "number": int, "boolean": bool}
TASKS = ["tool_call", "tool_made_up", "tool_answer", "tool_chain", "tool_none"]


def calls(example: Example) -> list[ToolCall]:
    return [call for message in example.messages for call in message.tool_calls]


@pytest.mark.parametrize("task", TASKS)
def test_calls_fit_exactly_one_listed_tool(task: str) -> None:
    for example in draw(task):
        names = [tool.name for tool in example.tools]
        assert len(set(names)) == len(names)
        for call in calls(example):
            (tool,) = (tool for tool in example.tools if tool.name == call.name)
            properties = tool.parameters["properties"]
            assert set(call.arguments) == set(tool.parameters["required"])
            for key, value in call.arguments.items():
                assert type(value) is PYTHON_TYPES[properties[key]["type"]]
                assert value in properties[key].get("enum", [value])


@pytest.mark.parametrize("task", TASKS)
def test_no_two_listed_tools_do_the_same(task: str) -> None:
    for example in draw(task):
        descriptions = [tool.definition["function"]["description"] for tool in example.tools]
        assert len(set(descriptions)) == len(descriptions)


@pytest.mark.parametrize("task", ["tool_call", "tool_made_up", "tool_answer", "tool_chain"])
def test_arguments_stand_in_what_the_model_has_seen(task: str) -> None:
    for example in draw(task):
        seen = ""
        for message in example.messages:
            for call in message.tool_calls:
                for value in call.arguments.values():
                    if isinstance(value, bool):
                        assert ("on" if value else "off") in re.findall(r"\w+", seen.lower())
                        continue
                    parts = (
                        re.split(r"[+*/-]", str(value))
                        if re.fullmatch(r"[\d+*-]+", str(value))
                        else [str(value)]
                    )
                    if value not in seen if isinstance(value, str) else False:
                        parts = (
                            re.split(r"[+*/-]", value)
                            if re.fullmatch(r"[\d+*-]+", value)
                            else value.split("/")
                        )
                    assert all(part in seen for part in parts), (value, seen)
            seen += f"{message.content}\n"


def test_calculator_results_are_right() -> None:
    checked = 0
    for example in draw("tool_answer") + draw("tool_chain"):
        for message, following in zip(example.messages, example.messages[1:], strict=False):
            for call in message.tool_calls:
                described = next(tool for tool in example.tools if tool.name == call.name).definition[
                    "function"
                ]
                if described["description"] == "Evaluate an arithmetic expression.":
                    (expression,) = call.arguments.values()
                    assert following.role == "tool"
                    assert int(following.content) == eval(expression)
                    checked += 1
    assert checked > 50


def test_final_answers_use_the_last_result() -> None:
    for example in draw("tool_answer") + draw("tool_chain"):
        result = example.messages[-2].content
        assert example.messages[-2].role == "tool"
        assert (
            result in example.target.content
            or result in ("ok", "sent", "started", "playing", "deleted")
            or (result.startswith("booked ") and result.removeprefix("booked ") in example.target.content)
        )


def test_without_a_fitting_tool_nothing_is_called() -> None:
    for example in draw("tool_none"):
        assert not calls(example)
        assert example.target.content


def test_calculate_refuses_what_it_cannot() -> None:
    assert calculate("12*3") == "36"
    with pytest.raises(ValueError):
        calculate("12")
