"""The scheduler alone, without a network: what every step promises, whatever arrives, ends and is guessed wrong.

A simulated engine computes whatever is planned, accepts drafts by chance and ends requests by chance, over a
cache that is sometimes hardly large enough for one sequence (hypothesis draws all of it).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.kv_cache import FULL, LOOKAHEAD_SLOTS, SLIDING, CacheLimits, KVCache, plan_blocks
from stepflash.engine.prefix import PrefixCache
from stepflash.engine.request import RequestStats
from stepflash.engine.sampler import Sampler
from stepflash.engine.scheduler import AHEAD_SLOTS, Scheduled, Scheduler
from stepflash.engine.sequence import Sequence
from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from tests.engine.conftest import MICRO, request

CONFIG = ModelConfig.from_pretrained(MICRO)
SAMPLER = Sampler(CONFIG.vocab_size)
MAX_MODEL_LEN = 160


@dataclass
class Arrival:
    """A request: prompt and answer lengths, priority, the step at whose start it comes, most drafts a step."""

    prompt: int
    answer: int
    priority: int
    at: int
    drafts: int


arrivals = st.builds(
    Arrival,
    prompt=st.integers(1, 100),
    answer=st.integers(1, 40),
    priority=st.integers(-1, 1),
    at=st.integers(0, 30),
    drafts=st.sampled_from([0, 1, 3, 3, 32]),
)


class Simulation:
    """What `EngineCore` does around a scheduler, with chance in place of the network."""

    def __init__(
        self, seed: int, *, spare_blocks: int, caching: bool, max_num_seqs: int, budget: int
    ) -> None:
        self.random = random.Random(seed)
        self.budget = max(budget, 4 * max_num_seqs)
        limits = CacheLimits(
            block_size=4,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            max_batched_tokens=self.budget,
            max_deferred_tokens=16,
            num_modules=3,
            dtype=torch.int8,
        )
        # The smallest cache that holds one sequence of full length, and `spare_blocks` more.
        wanted = -(-(MAX_MODEL_LEN + LOOKAHEAD_SLOTS) // 4) + spare_blocks
        kv_cache_bytes = 1 << 16
        while True:
            try:
                if plan_blocks(CONFIG, limits, kv_cache_bytes)[FULL] >= wanted:
                    break
            except ConfigError:  # not even one block
                pass
            kv_cache_bytes += 1 << 14
        self.cache = KVCache(CONFIG, limits, kv_cache_bytes=kv_cache_bytes)
        self.prefix = PrefixCache(self.cache) if caching else None
        self.scheduler = Scheduler(self.cache, self.prefix, max_num_batched_tokens=self.budget)
        self.answers: dict[int, int] = {}
        self.drafts: dict[int, int] = {}
        self.finished: list[Sequence] = []
        self.admitted: list[Sequence] = []

    def add(self, arrival: Arrival) -> None:
        number = len(self.answers)
        # Prompts of a few kinds, so that some begin alike and find each other's blocks.
        prompt = [3 + number % 3] * arrival.prompt
        asked = request(f"r{number}", prompt, priority=arrival.priority)
        self.answers[number] = min(arrival.answer, MAX_MODEL_LEN - arrival.prompt)
        self.drafts[number] = arrival.drafts
        self.scheduler.add(
            Sequence(
                request=asked,
                sampler=SAMPLER.state(asked.sampling, prompt, 0),
                constraint=None,
                stop_ids=frozenset(),
                max_tokens=self.answers[number],
                num_modules=0,
                arrival=number,
                submitted_at=0.0,
                token_ids=list(prompt),
                stats=RequestStats(),
            )
        )

    def step(self) -> list[Scheduled]:
        scheduler = self.scheduler
        before = set(map(id, scheduler.running))
        plan = scheduler.schedule(0.0)
        self.admitted += [seq for seq in scheduler.running if id(seq) not in before]
        self.check(plan)
        for item in plan:
            self.compute(item)
        for group, pool in enumerate(self.cache.pools):
            held = [
                s.blocks.full if group == FULL else s.blocks.sliding for s in scheduler.running if s.blocks
            ]
            pool.check_integrity(held, self.prefix.keepers(group) if self.prefix else ())
        return plan

    def check(self, plan: list[Scheduled]) -> None:
        running = self.scheduler.running
        assert sum(item.num_tokens + len(item.drafts) for item in plan) <= self.budget
        planned = {id(item.seq): item for item in plan}
        assert len(planned) == len(plan), "a sequence is planned twice"
        assert running == sorted(running, key=lambda seq: seq.order)
        assert self.scheduler.waiting == sorted(self.scheduler.waiting, key=lambda seq: seq.order)
        for item in plan:
            seq, blocks = item.seq, item.seq.blocks
            assert seq in running
            assert 1 <= item.num_tokens <= seq.num_pending
            assert not item.drafts or item.is_sampled
            end = seq.num_computed + item.num_tokens + len(item.drafts)
            assert blocks is not None
            assert len(blocks.full) * 4 >= end
            assert (blocks.sliding_first + len(blocks.sliding)) * 4 >= end
            # What the window of the first planned slot sees is still there.
            assert blocks.sliding_first * 4 <= max(0, seq.num_computed - 16 + 1)
            for group, held in ((FULL, blocks.full), (SLIDING, blocks.sliding)):
                first = 0 if group == FULL else blocks.sliding_first
                row = self.cache.tables[group][blocks.row]
                assert row[first : first + len(held)].tolist() == held
        decoding = [seq for seq in running if seq.num_pending == 1]
        assert all(id(seq) in planned for seq in decoding), "a sequence that only waits for a token got none"
        left = self.budget - sum(1 + len(planned[id(seq)].drafts) for seq in decoding)
        if self.scheduler.waiting and running:
            # Priority is strict: nobody runs whose place or memory a more urgent one waits for.
            assert self.scheduler.waiting[0].request.priority >= running[-1].request.priority or left == 0
        prompts = [seq for seq in running if seq.num_pending > 1]
        if prompts:
            urgent = min(seq.request.priority for seq in prompts)
            most = [seq for seq in prompts if seq.request.priority == urgent]
            shares = {id(seq): planned[id(seq)].num_tokens if id(seq) in planned else 0 for seq in most}
            assert sum(shares.values()) == min(left, sum(seq.num_pending for seq in most))
            for seq in most:
                # Nobody gets less than its equal part, unless it needs no more.
                assert shares[id(seq)] >= min(seq.num_pending, left // len(most))

    def compute(self, item: Scheduled) -> None:
        seq = item.seq
        number = seq.arrival
        if item.is_sampled:
            accepted = self.random.randint(0, len(item.drafts))
            room = self.answers[number] - seq.num_generated
            new = [self.random.randint(3, 9) for _ in range(min(room, accepted + 1))]
            seq.token_ids += new
            seq.num_computed = min(seq.num_computed + item.num_tokens + accepted, len(seq.token_ids) - 1)
            left = self.answers[number] - seq.num_generated
            seq.drafts = [3] * min(self.random.randint(0, self.drafts[number]), max(0, left - 1))
        else:
            seq.num_computed += item.num_tokens
        assert seq.blocks is not None
        boundary = seq.num_computed // 4 * 4
        if self.prefix is not None and self.random.random() < 0.4 and boundary:
            kept = self.cache.sliding_before(seq.blocks, boundary)
            if kept is not None:
                node = self.prefix.insert(seq.token_ids, seq.blocks.full[: boundary // 4])
                self.prefix.add_snapshot(node, *kept, ())
        self.cache.trim(seq.blocks, seq.num_computed)
        if seq.num_generated >= self.answers[number]:
            self.scheduler.remove(seq)
            self.finished.append(seq)

    def abort_one(self) -> None:
        known = [*self.scheduler.waiting, *self.scheduler.running]
        if known:
            seq = self.random.choice(known)
            self.scheduler.remove(seq)
            self.finished.append(seq)


@settings(max_examples=150)
@given(
    work=st.lists(arrivals, min_size=1, max_size=14),
    seed=st.integers(0, 2**32),
    spare_blocks=st.sampled_from([0, 3, 20, 200]),
    caching=st.booleans(),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 64),
    aborting=st.booleans(),
)
def test_every_step_keeps_its_promises_and_everything_ends(
    work: list[Arrival],
    seed: int,
    spare_blocks: int,
    caching: bool,
    max_num_seqs: int,
    budget: int,
    aborting: bool,
) -> None:
    simulation = Simulation(
        seed, spare_blocks=spare_blocks, caching=caching, max_num_seqs=max_num_seqs, budget=budget
    )
    scheduler = simulation.scheduler
    steps = 0
    while len(simulation.finished) < len(work):
        for arrival in work:
            if arrival.at == steps:
                simulation.add(arrival)
        if aborting and steps % 7 == 6:
            simulation.abort_one()
        plan = simulation.step()
        assert plan or not (scheduler.running or scheduler.waiting), "there is work and nothing is planned"
        steps += 1
        assert steps < 6000, "the requests do not come to an end"
    assert scheduler.running == []
    assert scheduler.waiting == []
    if simulation.prefix is not None:
        simulation.prefix.clear()
    assert simulation.cache.used_bytes == 0
    assert simulation.cache.num_free_rows == max_num_seqs


def test_requests_of_one_priority_start_in_the_order_of_their_arrival() -> None:
    simulation = Simulation(1, spare_blocks=0, caching=False, max_num_seqs=3, budget=16)
    generator = random.Random(3)
    for _ in range(40):
        simulation.add(Arrival(generator.randint(1, 100), generator.randint(1, 30), 0, 0, 0))
    started: list[int] = []
    while len(simulation.finished) < 40:
        simulation.step()
    for seq in simulation.admitted:
        if seq.arrival not in started:  # again after a preemption
            started.append(seq.arrival)
    assert started == sorted(started)


def test_an_urgent_request_takes_the_place_of_a_lower_priority() -> None:
    simulation = Simulation(4, spare_blocks=0, caching=True, max_num_seqs=1, budget=64)
    simulation.add(Arrival(prompt=50, answer=30, priority=0, at=0, drafts=0))
    for _ in range(5):
        simulation.step()
    simulation.add(Arrival(prompt=50, answer=3, priority=-1, at=0, drafts=0))
    simulation.add(Arrival(prompt=50, answer=3, priority=0, at=0, drafts=0))
    (planned,) = simulation.step()
    assert planned.seq.arrival == 1
    while len(simulation.finished) < 3:
        simulation.step()
    assert [seq.arrival for seq in simulation.finished] == [1, 0, 2]
    assert [seq.stats.num_preemptions for seq in simulation.finished] == [0, 1, 0]


def test_forced_drafts_of_some_do_not_starve_the_others() -> None:
    """Four sequences with 32 certain tokens each and room for 16 a step: every one still moves in every step."""
    simulation = Simulation(5, spare_blocks=200, caching=False, max_num_seqs=4, budget=16)
    for _ in range(4):
        simulation.add(Arrival(prompt=2, answer=40, priority=0, at=0, drafts=32))
    while len(simulation.finished) < 4:
        simulation.step()  # checks it


@pytest.mark.parametrize("caching", [False, True])
def test_who_gives_way_is_the_last_in_order(caching: bool) -> None:
    simulation = Simulation(2, spare_blocks=4, caching=caching, max_num_seqs=4, budget=64)
    for priority in (1, 0, 0, 1):
        simulation.add(Arrival(prompt=20, answer=60, priority=priority, at=0, drafts=0))
    preempted: list[Sequence] = []
    preempt = simulation.scheduler.preempt

    def record(seq: Sequence) -> None:
        assert seq is simulation.scheduler.running[-1]
        preempted.append(seq)
        preempt(seq)

    simulation.scheduler.preempt = record  # type: ignore[method-assign]
    while len(simulation.finished) < 4:
        simulation.step()
    assert preempted
    # The first in order is never the one that gives way: it always gets on.
    assert all(seq.arrival != 1 for seq in preempted)
    assert simulation.finished[0].arrival == 1


def test_slots_for_further_steps_cost_nobody_the_slots_of_this_one() -> None:
    """The first in order could have spare blocks; the second, with many certain tokens, needs the same ones."""
    simulation = Simulation(6, spare_blocks=200, caching=False, max_num_seqs=2, budget=64)
    for _ in range(2):
        simulation.add(Arrival(prompt=20, answer=60, priority=0, at=0, drafts=0))
    simulation.step()
    first, second = simulation.scheduler.running
    second.drafts = [3] * 32
    pool = simulation.cache.pools[FULL]
    assert second.blocks is not None
    missing = -(-(second.num_computed + 1 + 32 + LOOKAHEAD_SLOTS) // 4) - len(second.blocks.full)
    taken = pool.allocate(pool.num_free - missing - 1)
    assert [len(item.drafts) for item in simulation.scheduler.schedule(0.0)] == [0, 32]
    assert simulation.scheduler.num_preemptions == 0
    pool.release(taken)
    # With memory for both the first has more than it needs.
    simulation.scheduler.schedule(0.0)
    assert simulation.cache.num_slots(first.blocks) >= first.num_computed + 1 + LOOKAHEAD_SLOTS + AHEAD_SLOTS  # type: ignore[arg-type]
