"""How many drafts a step should make and verify, from what was accepted and from what steps took."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Costs:
    """What depths cost for about so many sequences, as far as it is known.

    `relative[d]` is the time of a step at depth d in some unit common to all depths; only ratios mean anything.
    `recent` are seconds of the last steps at depth `current`, `probed` those of the running probe of depth `probe`.
    """

    relative: list[float]
    warm_up: list[list[float]]
    current: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    probe: int | None = None
    probed: list[float] = field(default_factory=list)
    num_tries: int = 0  # steps for which the running probe was chosen
    last_probe: int = -1
    interval: int = 0  # steps between probes
    countdown: int = 0  # to the next
    held: int = 0  # steps for which the choice stands, without another thought


class DepthController:
    """Chooses the speculation depth of a step from measured acceptance and measured step times.

    Steps are timed per number of sequences, and of others beside them, in powers of two, so whatever a depth really
    costs, extra experts and dispatch included, is in the number. The depth with most expected tokens per second wins.
    The others are measured again now and then, because contexts grow and texts change, and more and more seldom while
    that changes nothing. A probe is compared with the steps just before it: a machine that gets slower for a while
    gets slower for all depths, and must not make one look better than another.
    """

    WARM_UP_SAMPLES = 3
    PROBE_STEPS = 3
    PROBE_INTERVAL = 64
    MAX_PROBE_INTERVAL = 512
    # A probe that differs by more from what was known is repeated soon.
    SURPRISE = 1.15
    REPEAT_INTERVAL = 16
    # A choice stands for so many steps: to think it over in every step would itself cost some percent of a small
    # model's.
    HOLD = 8
    # Another depth must promise so much more before it is taken; none at all is taken where it is as good.
    MARGIN = 1.02
    # What a sequence may hope for before its own drafts are known, whatever became of others.
    HOPE = 0.6

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        # Of all sequences; follows what is measured slowly.
        self.acceptance = [self.HOPE] * max_depth
        self._costs: dict[tuple[int, int], _Costs] = {}
        self._last: _Costs | None = None
        self._others = 0.0  # beside each sequence of the last choice

    def prior(self) -> list[float]:
        """Chances of a sequence that has yet to show its own: high enough to be tried."""
        return [max(chance, self.HOPE) for chance in self.acceptance]

    def choose(self, acceptances: Seq[Seq[float]], num_others: int = 0) -> int:
        """Depth for a step of sequences with these chances (see `Sequence.acceptance`), and of others that get a
        token each whatever is chosen."""
        if not acceptances or not self.max_depth:
            return 0
        costs = self._last = self._bucket(len(acceptances), num_others)
        self._others = num_others / len(acceptances)
        if costs.held > 0:
            costs.held -= 1
            return costs.current
        for depth in range(self.max_depth, -1, -1):
            if len(costs.warm_up[depth]) < self.WARM_UP_SAMPLES:
                return depth
        if costs.probe is not None:
            costs.num_tries += 1
            # Steps that are more than decoding at one depth are not observed; then there is no result.
            if costs.num_tries <= 2 * self.PROBE_STEPS:
                return costs.probe
            self._end_probe(costs, costs.interval)
        costs.countdown -= self.HOLD
        if costs.countdown <= 0 and len(costs.recent) >= self.PROBE_STEPS:
            others = [d for d in range(self.max_depth + 1) if d != costs.current]
            costs.probe = next((d for d in others if d > costs.last_probe), others[0])
            costs.num_tries = 1
            return costs.probe
        rates = [
            (num_others + sum(expected_tokens(chances, depth) for chances in acceptances)) / seconds
            for depth, seconds in enumerate(_plausible(costs.relative))
        ]
        best = max(range(self.max_depth + 1), key=rates.__getitem__)
        margin = self.MARGIN if best else 1.0
        if best != costs.current and rates[best] >= margin * rates[costs.current]:
            costs.current = best
            costs.recent.clear()
            costs.interval = costs.countdown = self.PROBE_INTERVAL
        costs.held = self.HOLD - 1
        return costs.current

    @property
    def num_steps(self) -> int:
        """How many steps, the next one included, may follow the last choice."""
        costs = self._last
        if costs is None:
            return 1
        return 1 + costs.held if costs.probe is None else max(1, self.PROBE_STEPS - len(costs.probed))

    def is_hopeless(self, acceptance: Seq[float]) -> bool:
        """Whether no depth is worth its time for a sequence with these chances, as steps went of late."""
        relative = _plausible(self._last.relative) if self._last else [math.nan]
        return not any(map(math.isnan, relative)) and all(
            (self._others + expected_tokens(acceptance, depth)) * relative[0]
            < self.MARGIN * (self._others + 1) * relative[depth]
            for depth in range(1, self.max_depth + 1)
        )

    def observe(
        self, num_seqs: int, depth: int, seconds: float, num_steps: int = 1, num_others: int = 0
    ) -> None:
        """Steps after one choice, in which each of `num_seqs` sequences verified `depth` drafts and proposed more."""
        costs = self._bucket(num_seqs, num_others)
        costs.held = max(0, costs.held - num_steps + 1)
        seconds = max(seconds / num_steps, 1e-9)  # of a clock that stands still
        if len(costs.warm_up[depth]) < self.WARM_UP_SAMPLES:
            costs.warm_up[depth].append(seconds)
            # The first run pays for allocations, and any may be disturbed.
            costs.relative[depth] = min(costs.warm_up[depth])
        elif depth == costs.probe:
            costs.probed += [seconds] * num_steps
            if len(costs.probed) >= self.PROBE_STEPS:
                self._learn(costs, depth)
        elif depth == costs.current:
            costs.recent.append(seconds)

    def accept(self, acceptance: list[float], num_drafts: int, num_accepted: int) -> None:
        """Update a sequence's chances, and the prior, after one verification."""
        for k in range(min(num_drafts, num_accepted + 1)):
            outcome = float(k < num_accepted)
            acceptance[k] += 0.1 * (outcome - acceptance[k])
            self.acceptance[k] += 0.02 * (outcome - self.acceptance[k])

    def _bucket(self, num_seqs: int, num_others: int) -> _Costs:
        key = num_seqs.bit_length(), num_others.bit_length()
        if key not in self._costs:
            depths = range(self.max_depth + 1)
            fresh = _Costs([math.nan for _ in depths], [[] for _ in depths])
            fresh.interval = fresh.countdown = self.PROBE_INTERVAL
            self._costs[key] = fresh
        return self._costs[key]

    def _learn(self, costs: _Costs, depth: int) -> None:
        """Take over what a probe found, half of it at a time."""
        ratio = statistics.median(costs.probed) / statistics.median(costs.recent)
        found = costs.relative[costs.current] * ratio
        known = costs.relative[depth]
        costs.relative[depth] = math.sqrt(known * found)
        if max(known / found, found / known) > self.SURPRISE:
            costs.interval = self.PROBE_INTERVAL
            self._end_probe(costs, self.REPEAT_INTERVAL)
            costs.last_probe = depth - 1
        else:
            costs.interval = min(2 * costs.interval, self.MAX_PROBE_INTERVAL)
            self._end_probe(costs, costs.interval)
            costs.last_probe = depth

    def _end_probe(self, costs: _Costs, countdown: int) -> None:
        costs.probe = None
        costs.probed.clear()
        costs.countdown = countdown


def _plausible(relative: Seq[float]) -> list[float]:
    """No drafts save time by their work: where they seem to, the machine was slow in between."""
    return [max(seconds, relative[0]) for seconds in relative]


def expected_tokens(acceptance: Seq[float], depth: int) -> float:
    """Tokens per step: one, and each draft with the chance that it and all before it are right."""
    total = chance = 1.0
    for k in range(depth):
        chance *= acceptance[k]
        total += chance
    return total
