"""The thinking budget: against a plain list of tokens, and in the engine with drafts."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.assistant.budget import CLOSING_TEXT, NO_THOUGHT, Thinking, ThoughtLimit
from stepflash.assistant.local import open_session
from stepflash.assistant.session import as_choice
from stepflash.chat.messages import Conversation, Message
from stepflash.engine.constraints import Constraint
from stepflash.engine.request import Request, SamplingParams
from stepflash.settings import EngineSettings
from tests.scripted_engine import scripted_session

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
END, CLOSING = 9, (7, 8, 9)
HELLO = Conversation(messages=(Message(role="user", content="hello"),))


def allowed(tokens: list[int], budget: int) -> int | None:
    """The one token that may follow, or None for any: by searching the whole list."""
    ended_at = tokens.index(END) if END in tokens else None
    if ended_at is not None or len(tokens) < budget:
        return None
    return CLOSING[len(tokens) - budget]


@given(
    budget=st.integers(1, 6),
    steps=st.lists(st.integers(-4, 9).filter(bool), max_size=60),
)
def test_any_walk_forward_and_back(budget: int, steps: list[int]) -> None:
    """A positive step is a token that the model would like, a negative one goes back by as many."""
    constraint = ThoughtLimit(budget, CLOSING)
    assert isinstance(constraint, Constraint)
    tokens: list[int] = []
    for step in steps:
        if step < 0:
            num_back = min(-step, len(tokens))
            constraint.rollback(num_back)
            tokens = tokens[: len(tokens) - num_back]
        else:
            only = allowed(tokens, budget)
            token_id = step if only is None else only
            constraint.accept(token_id)
            tokens.append(token_id)
        # Free for as long as nothing can be dictated, whatever comes meanwhile; END among it.
        num_free = 0
        while num_free < 7 and allowed(tokens + [1] * num_free, budget) is None:
            num_free += 1
        assert min(constraint.num_free, 7) == num_free
        only = allowed(tokens, budget)
        assert constraint.mask() == (None if only is None else {only})
        forced = list(constraint.forced())
        assert forced == ([] if only is None else list(CLOSING[CLOSING.index(only) :]))


@pytest.mark.parametrize("draft_depth", [0, 3])
def test_in_the_engine_the_closing_follows_the_budget(draft_depth: int) -> None:
    """Free of the constraint and under it: the same tokens up to the budget, then the closing, then more."""
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, draft_depth=draft_depth)

    async def tokens(constraint: Constraint | None) -> list[int]:
        request = Request(
            request_id=str(constraint is None),
            prompt_token_ids=(5, 6, 7),
            sampling=sampling,
            constraint=constraint,
        )
        return [i async for output in local.session.engine.submit(request) for i in output.token_ids]

    with open_session(str(MICRO), EngineSettings(max_num_seqs=2)) as local:
        free = asyncio.run(tokens(None))
        closing = (202, 31, 18, next(i for i in range(400) if i not in free))
        bounded = asyncio.run(tokens(ThoughtLimit(12, closing)))
    assert bounded[:16] == [*free[:12], *closing]
    assert len(bounded) == 40


def test_the_session_bounds_thoughts_alone() -> None:
    session = scripted_session("x")
    prompt = session.prepare(HELLO, SamplingParams(), thinking=Thinking(max_tokens=3))
    constraint = prompt.request.constraint
    assert isinstance(constraint, ThoughtLimit)
    for token_id in (1, 2, 3):
        assert constraint.mask() is None
        constraint.accept(token_id)
    assert session.tokenizer.decode(constraint.forced()) == f"{CLOSING_TEXT}</think>"
    twin = as_choice(prompt, 1).request.constraint
    assert isinstance(twin, ThoughtLimit)
    constraint.accept(session.tokenizer.think_end_id or 0)
    assert (list(constraint.forced()), len(list(twin.forced()))) == ([], len(CLOSING_TEXT) + 1)
    unbounded = session.prepare(HELLO, SamplingParams(), thinking=NO_THOUGHT)
    assert unbounded.request.constraint is None
