"""Training text is byte for byte what the chat template renders. Kind: against a second implementation."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from stepflash.chat.messages import Message, ToolCall
from stepflash.chat.template import ChatTemplate
from stepflash.nano.tasks import (
    TASKS,
    Example,
    completion,
    prompt_text,
    render,
    sample,
    training_example,
    turns,
)


def test_documents_equal_the_template() -> None:
    template, rng = ChatTemplate.builtin(), Random(0)
    examples = [sample(rng, rng.random()) for _ in range(150)]
    examples += [training_example(task, "hard", rng) for task in TASKS for _ in range(3)]
    for example in examples:
        text = "".join(text for text, _ in render(example))
        assert text == template.render(example.messages, example.tools, add_generation_prompt=False).text


def test_prompts_equal_the_template() -> None:
    template, rng = ChatTemplate.builtin(), Random(1)
    for _ in range(150):
        for step in turns(sample(rng, rng.random())):
            assert prompt_text(step) == template.render(step.prompt, step.tools).text


def test_what_carries_loss_is_what_the_model_writes() -> None:
    rng = Random(2)
    for _ in range(150):
        example = sample(rng, rng.random())
        trained = [text for text, has_loss in render(example) if has_loss]
        assert trained == [completion(step.target) + "<|im_end|>" for step in turns(example)]


def test_loss_on_the_prompt_covers_the_question() -> None:
    example = replace(training_example("repeat", "easy", Random(3)), loss_on_prompt=True)
    assert (example.messages[-2].content, True) in render(example)


def test_results_in_a_row_and_odd_arguments() -> None:
    call = ToolCall(name="f", arguments={"a": [1, "\u00e9"], "b": True, "c": None, "d": {"k": 1.5}})
    messages = (
        Message(role="system", content="S"),
        Message(role="user", content="first"),
        Message(role="assistant", content="old", reasoning="forgotten"),
        Message(role="user", content="go"),
        Message(role="assistant", content="calling", reasoning="t", tool_calls=(call, call)),
        Message(role="tool", content="r1"),
        Message(role="tool", content="r2"),
        Message(role="assistant", content="done", reasoning="u"),
    )
    text = "".join(text for text, _ in render(Example(task="x", tier="easy", messages=messages)))
    assert text == ChatTemplate.builtin().render(messages, add_generation_prompt=False).text


def test_an_answer_without_a_thought_is_refused() -> None:
    messages = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    with pytest.raises(ValueError, match="needs a thought"):
        render(Example(task="x", tier="easy", messages=messages))
