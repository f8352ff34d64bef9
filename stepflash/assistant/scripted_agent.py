"""A scripted model that does one small task with whatever file tools or shell an agent program offers it.

It reads a file, writes another, and says so: enough to see that a program's tool definitions, calls, results and
final text survive the way through a server. It knows nothing but what stands in its prompt, as a model does.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

END = "<|im_end|>"  # of every answer
_TASK = re.compile(r"Read the file (\S+/in\.txt)\b.*? into the file (\S+/out\.txt)\b", re.DOTALL)
_NUMBER = re.compile(r"The number is (\d+)\.")
_TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?=<\|im_start\|>|\Z)", re.DOTALL)
# Names that agents give their tools, with the parameters that matter.
_READERS = {"Read": "file_path", "read": "filePath", "read_file": "absolute_path"}
_WRITERS = {
    "Write": ("file_path", "content"),
    "write": ("filePath", "content"),
    "write_file": ("file_path", "content"),
}
_SHELLS = {"Bash": "command", "bash": "command", "exec_command": "cmd", "shell": "command"}
_DESCRIPTION = {"description": "Do the task"}  # some shells insist on one
_ALSO = {"Bash": _DESCRIPTION, "bash": _DESCRIPTION}


def task(folder: str) -> str:
    """What to ask an agent for. `folder` is absolute and has no spaces."""
    return (
        f"Read the file {folder}/in.txt. It says which number it holds. Write that number plus one, and nothing "
        f"else, into the file {folder}/out.txt. Then say which number you wrote."
    )


def start_file(number: int) -> str:
    """The text of in.txt."""
    return f"The number is {number}.\n"


def scripted_agent(prompt: str) -> str:
    """The next answer of the model, with a thought if the prompt begins one. What is not the task (a title, a
    summary) gets a short text."""
    answer = _answer(prompt)
    return answer if prompt.rstrip().endswith("<think>") else answer.partition("</think>\n")[2]


def _answer(prompt: str) -> str:
    turns = _TURN.findall(prompt)
    asked = [i for i, (role, text) in enumerate(turns) if role == "user" and _TASK.search(text)]
    tools = _tool_names(prompt)
    if not asked or not tools:
        return f"A title is wanted.\n</think>\nRead a number and write the next one{END}"
    found = _TASK.search(turns[asked[-1]][1])
    assert found is not None
    source, target = found.groups()
    results = [text for role, text in turns[asked[-1] :] if role == "tool_response"]
    numbers = [int(number) for text in results for number in _NUMBER.findall(text)]
    if not results:
        return _say("The file must be read first.", "Reading.", _read(source, tools))
    if not numbers:
        return f"The result holds no number.\n</think>\nI could not read {PurePosixPath(source).name}.{END}"
    if len(results) == 1:
        return _say(f"{numbers[0]} plus one.", "Writing.", _write(target, str(numbers[0] + 1), tools))
    return f"Both are done.\n</think>\nI wrote {numbers[0] + 1}.{END}"


def _tool_names(prompt: str) -> set[str]:
    listed = _TOOLS.search(prompt)
    names = set()
    for line in listed[1].splitlines() if listed else ():
        definition = json.loads(line)
        names.add(str(definition.get("function", definition).get("name")))
    return names


def _read(path: str, tools: set[str]) -> tuple[str, Mapping[str, Any]]:
    for name, parameter in _READERS.items():
        if name in tools:
            return name, {parameter: path}
    return _shell(f"cat {shlex.quote(path)}", tools)


def _write(path: str, text: str, tools: set[str]) -> tuple[str, Mapping[str, Any]]:
    for name, (where, what) in _WRITERS.items():
        if name in tools:
            return name, {where: path, what: text}
    return _shell(f"printf %s {text} > {shlex.quote(path)}", tools)


def _shell(command: str, tools: set[str]) -> tuple[str, Mapping[str, Any]]:
    for name, parameter in _SHELLS.items():
        if name in tools:
            return name, {parameter: command, **_ALSO.get(name, {})}
    return "shell", {"command": command}  # the agent will say that there is no such tool


def _say(thought: str, text: str, call: tuple[str, Mapping[str, Any]]) -> str:
    name, arguments = call
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    tags = f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
    return f"{thought}\n</think>\n{text}\n{tags}{END}"
