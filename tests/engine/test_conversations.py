"""Agents: a hundred turns and 30,000 tokens on nano, and each turn reads what is new in it and nothing else.

Work is counted in prompt tokens that the network computed, not in seconds. Two kinds of agent: one that sends its
history back as it was, and one whose template takes the thought out of an answer when the next message comes, so
that every prompt leaves the path of the last answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.request import Request
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model
from tests.engine.conftest import Finished, drive, request

BLOCK = 16
ANSWER = 20
THOUGHT = 8


@pytest.fixture(scope="module")
def nano() -> Step3p5ForCausalLM:
    return load_model("nano", dtype="bfloat16", progress=False)


@dataclass
class Agent:
    """A conversation: what was said, and how many tokens of each turn were new and were computed."""

    name: str
    drops_thoughts: bool
    words: torch.Generator
    history: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    def ask(self, message_tokens: int) -> Request:
        """The next turn: the last answer as this agent tells it, and a new message."""
        told = self.answer[THOUGHT:] if self.drops_thoughts else self.answer
        before = len(self.history)
        cut = before + len(told)
        self.history += [*told, *torch.randint(3, 2000, (message_tokens,), generator=self.words).tolist()]
        self.new.append(len(self.history) - before)
        name = f"{self.name}-{len(self.new)}"
        return request(name, self.history, max_tokens=ANSWER, cut_points=(before, cut))

    def hear(self, done: Finished) -> None:
        self.answer = done.token_ids
        self.computed.append(done.stats.num_prefill_tokens)
        assert done.stats.num_cached_tokens + self.computed[-1] == len(self.history)


def check(agent: Agent) -> None:
    """A turn computes its new tokens and the rest of one block; the whole conversation once."""
    for turn, (new, computed) in enumerate(zip(agent.new, agent.computed, strict=True)):
        # A block is cached whole or not at all.
        assert computed <= new + BLOCK, (agent.name, turn, new, computed)
    assert sum(agent.computed) <= len(agent.history) + len(agent.new) * BLOCK


def run(
    cores: Iterator[EngineCore], agents: list[Agent], turns: int, message_tokens: int, at_once: bool = False
) -> None:
    """Every agent's turns, one agent after the other or all at the same time."""
    for turn in range(turns):
        core = next(cores)
        asked = [agent.ask(message_tokens if turn else 4 * message_tokens) for agent in agents]
        groups = [asked] if at_once else [[one] for one in asked]
        done = {name: entry for group in groups for name, entry in drive(core, *group).items()}
        for agent, one in zip(agents, asked, strict=True):
            agent.hear(done[one.request_id])


def cores(model: Step3p5ForCausalLM, config: EngineConfig, restart_at: int = -1) -> Iterator[EngineCore]:
    """The engine of each turn: the same one, but for a restart."""
    core = EngineCore(model, config)
    turn = 0
    while True:
        if turn == restart_at:
            core.close()
            core = EngineCore(model, config)
        yield core
        turn += 1


def new_agents(count: int, drops_thoughts: bool) -> list[Agent]:
    return [Agent(f"agent{i}", drops_thoughts, torch.Generator().manual_seed(100 + i)) for i in range(count)]


OPTIONS = EngineConfig(
    max_num_seqs=4,
    max_model_len=32768,
    max_num_batched_tokens=512,
    block_size=BLOCK,
    kv_cache_bytes=320 << 20,
)


@pytest.mark.parametrize("drops_thoughts", [False, True])
def test_four_agents_take_turns(nano: Step3p5ForCausalLM, drops_thoughts: bool) -> None:
    """The short version of what follows, for every run of the tests."""
    agents = new_agents(4, drops_thoughts)
    run(cores(nano, OPTIONS), agents, turns=6, message_tokens=60)
    for agent in agents:
        check(agent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "drops_thoughts", "at_once"),
    [(1, False, False), (1, True, False), (4, False, True), (4, True, False)],
)
def test_a_hundred_turns_with_a_restart_in_the_middle(
    nano: Step3p5ForCausalLM, tmp_path: Path, count: int, drops_thoughts: bool, at_once: bool
) -> None:
    config = replace(OPTIONS, prefix_cache_path=tmp_path / "cache")
    agents = new_agents(count, drops_thoughts)
    told = ANSWER - THOUGHT * drops_thoughts
    run(cores(nano, config, restart_at=50), agents, turns=100, message_tokens=300 - told, at_once=at_once)
    for agent in agents:
        assert len(agent.history) >= 30_000
        check(agent)
        print(
            f"{agent.name}: {len(agent.history)} tokens, computed {sum(agent.computed)}, most in one turn "
            f"after the first {max(agent.computed[1:])} of {max(agent.new[1:])} new"
        )


@pytest.mark.slow
def test_hardly_any_room_for_windows_is_enough_for_those_in_use(nano: Step3p5ForCausalLM) -> None:
    """Old snapshots go first: with room for few windows, four agents in turn still find their last ones."""
    config = replace(OPTIONS, max_model_len=8192)
    stats = EngineCore(nano, config).stats()
    # A quarter of what the running sequences are not promised is for windows that are kept.
    room = 4 * 6000 * stats.kv_bytes_per_token / 0.75
    promised = config.kv_cache_bytes - stats.kv_full_total_bytes / 0.75  # type: ignore[operator]
    core = EngineCore(nano, replace(config, kv_cache_bytes=int(promised + room)))
    spare = core.stats().kv_sliding_total_bytes - promised
    agents = new_agents(4, drops_thoughts=True)
    run(itertools.repeat(core), agents, turns=18, message_tokens=270)
    assert spare < 50 * stats.kv_window_bytes
    # Each turn left at least two: at the end of its prompt and of its answer.
    assert core.stats().num_snapshots < 4 * 18 * 2
    for agent in agents:
        check(agent)
