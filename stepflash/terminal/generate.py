"""One completion on standard output, as text while it comes or as one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from rich.console import Console

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.assistant.reader import Prompt
from stepflash.assistant.session import Session
from stepflash.assistant.stream import Answer, Fold
from stepflash.chat.messages import Conversation, Message
from stepflash.engine.request import SamplingParams
from stepflash.terminal.chat import AnswerPrinter, Speed


def run_generate(
    session: Session,
    text: str,
    sampling: SamplingParams,
    *,
    model_name: str,
    system: str | None = None,
    is_raw: bool = False,
    is_thinking: bool = True,
    as_json: bool = False,
) -> None:
    """Answer `text` as a user's message, or continue it as it is when `is_raw`."""
    if is_raw:
        prompt = session.prepare_text(text, sampling)
    else:
        head = (Message(role="system", content=system),) if system else ()
        conversation = Conversation(messages=(*head, Message(role="user", content=text)))
        prompt = session.prepare(conversation, sampling, thinking=Thinking() if is_thinking else NO_THOUGHT)
    printer = None if as_json else AnswerPrinter(Console())
    speed = Speed()
    started = time.monotonic()
    answer = asyncio.run(_answer(session, prompt, printer))
    if as_json:
        seconds = time.monotonic() - started
        print(json.dumps(_as_json(session, prompt, answer, text, model_name, seconds), ensure_ascii=False))
    elif sys.stderr.isatty():
        note = speed.describe(answer.usage)
        Console(stderr=True).print(note, style="dim", markup=False, highlight=False)


async def _answer(session: Session, prompt: Prompt, printer: AnswerPrinter | None) -> Answer:
    collected = Fold()
    try:
        async with aclosing(session.answer(prompt)) as stream:
            async for item in stream:
                collected.add(item)
                if printer is not None:
                    printer.show(item)
    finally:
        if printer is not None:
            printer.end()
    return collected.answer()


def _as_json(
    session: Session, prompt: Prompt, answer: Answer, text: str, model_name: str, seconds: float
) -> dict[str, Any]:
    return {
        "model": model_name,
        "prompt": text,
        "text": session.tokenizer.decode(answer.token_ids),
        "reasoning": answer.reasoning,
        "content": answer.content,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
        "finish_reason": answer.finish_reason,
        "prompt_token_ids": list(prompt.request.prompt_token_ids),
        "token_ids": list(answer.token_ids),
        "usage": asdict(answer.usage),
        "seconds": round(seconds, 4),
    }
