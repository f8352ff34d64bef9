"""The depth controller on a simulated machine: it finds the best depth and does not insist on a bad one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from stepflash.engine.depth_controller import DepthController, expected_tokens
from stepflash.engine.speculative import num_accepted


def simulate(
    acceptance: list[float],
    seconds: list[float],
    steps: int,
    slowness: Callable[[int], float] = lambda step: 1.0,
) -> list[int]:
    """Depths chosen on a machine where a step at depth d takes seconds[d], times its slowness at the time."""
    controller = DepthController(3)
    chosen = []
    for step in range(steps):
        depth = controller.choose([acceptance])
        controller.observe(1, depth, seconds[depth] * slowness(step))
        chosen.append(depth)
    return chosen


@pytest.mark.parametrize(
    ("acceptance", "seconds", "best"),
    [
        # Tokens per second by hand: 1/1, 1.9/1.1, 2.71/1.2, 3.44/1.3 = 2.65.
        ([0.9, 0.9, 0.9], [1.0, 1.1, 1.2, 1.3], 3),
        # Nothing is ever accepted: any cost is wasted.
        ([0.01, 0.01, 0.01], [1.0, 1.05, 1.1, 1.15], 0),
        # The second draft hardly ever survives: 1.8/1.1 = 1.64 against 1.84/1.2 = 1.53.
        ([0.8, 0.05, 0.5], [1.0, 1.1, 1.2, 1.3], 1),
        # Drafts are good but cost a lot, as with experts on slow memory.
        ([0.6, 0.6, 0.6], [1.0, 2.0, 3.0, 4.0], 0),
    ],
)
def test_the_depth_settles_on_the_fastest(acceptance: list[float], seconds: list[float], best: int) -> None:
    chosen = simulate(acceptance, seconds, 2000)
    warm = 4 * DepthController.WARM_UP_SAMPLES
    settled = chosen[warm:]
    assert settled.count(best) / len(settled) > 0.98
    # Other depths are looked at again now and then, in case the world has changed.
    assert set(settled) == {0, 1, 2, 3}
    rate = expected_tokens(acceptance, best) / seconds[best]
    achieved = sum(expected_tokens(acceptance, d) for d in settled) / sum(seconds[d] for d in settled)
    assert achieved > 0.97 * rate


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_machine_does_not_make_useless_drafts_look_useful(seed: int) -> None:
    """Slow for a while, quick for a while, and single steps that take several times as long."""
    random = Random(seed)
    spells = [random.choice([1.0, 1.0, 1.5, 2.0]) for _ in range(100)]
    seconds = [1.0, 1.2, 1.4, 1.6]
    chosen = simulate(
        [0.01, 0.01, 0.01],
        seconds,
        10_000,
        lambda step: (
            spells[step // 100] * random.uniform(1.0, 1.2) * (4.0 if random.random() < 0.02 else 1.0)
        ),
    )
    assert len(chosen) / sum(seconds[depth] for depth in chosen) > 0.97


def test_drafts_that_become_right_are_noticed_by_probes() -> None:
    """What is accepted is measured only when there are drafts: while there are none, probes must find it."""
    controller = DepthController(3)
    chances, seconds, chosen = [0.01, 0.01, 0.01], [1.0, 1.1, 1.2, 1.3], []
    for step in range(6000):
        depth = controller.choose([chances])
        controller.observe(1, depth, seconds[depth])
        controller.accept(chances, depth, depth if step > 2000 else 0)
        chosen.append(depth)
    assert chosen[1000:2000].count(0) > 970
    assert chosen[-1000:].count(3) > 950


def test_several_steps_after_one_choice_count_as_such() -> None:
    """The choice stands for no more of them, and probes stay as short."""
    controller, seconds = DepthController(3), [1.0, 1.1, 1.2, 1.3]
    taken = [0, 0, 0, 0]
    while sum(taken) < 4000:
        depth = controller.choose([[0.9, 0.9, 0.9]])
        num_steps = controller.num_steps if depth in (0, 3) else 1
        assert num_steps <= DepthController.HOLD
        controller.observe(1, depth, num_steps * seconds[depth], num_steps)
        taken[depth] += num_steps
    assert taken[3] / sum(taken) > 0.97
    assert min(taken) > DepthController.WARM_UP_SAMPLES


def test_a_change_of_cost_is_noticed() -> None:
    controller = DepthController(3)
    seconds = [1.0, 1.1, 1.2, 1.3]
    for step in range(1200):
        if step == 300:
            seconds = [1.0, 3.0, 5.0, 7.0]
        depth = controller.choose([[0.8, 0.8, 0.8]])
        controller.observe(1, depth, seconds[depth])
    assert controller.choose([[0.8, 0.8, 0.8]]) == 0


def test_hopeless_is_what_costs_more_than_it_brings() -> None:
    """Not before every depth was timed, and not where chances are good or drafts are cheap."""
    controller = DepthController(2)
    assert not controller.is_hopeless([0.0, 0.0])
    for seconds in ([1.0, 1.6, 2.0], [1.0, 1.2, 1.4]):
        controller = DepthController(2)
        for _ in range(50):
            depth = controller.choose([[0.0, 0.0]])
            controller.observe(1, depth, seconds[depth])
        assert controller.is_hopeless([0.0, 0.0])
        assert controller.is_hopeless([0.3, 0.3]) == (seconds[1] == 1.6)
        assert not controller.is_hopeless([0.9, 0.9])


def test_what_others_wait_for_counts() -> None:
    """A step that is a twentieth longer, for the sake of one of eight, must bring it 0.4 tokens and more."""
    controller = DepthController(1)
    for _ in range(50):
        depth = controller.choose([[0.5]], 7)
        controller.observe(1, depth, 1.0 + 0.05 * depth, 1, 7)
    assert controller.choose([[0.5]], 7) == 0
    assert controller.is_hopeless([0.5])
    assert not controller.is_hopeless([0.9])


def test_a_clock_that_stands_still_is_no_error() -> None:
    assert set(simulate([0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], 300)) <= {0, 1, 2, 3}


def test_acceptance_counts_only_drafts_whose_predecessors_were_right() -> None:
    controller = DepthController(3)
    chances = [0.5, 0.5, 0.5]
    controller.accept(chances, num_drafts=3, num_accepted=1)
    assert chances == pytest.approx([0.55, 0.45, 0.5])  # right, wrong, unknown
    assert expected_tokens([0.5, 0.5, 0.2], 3) == pytest.approx(1 + 0.5 + 0.25 + 0.05)
    assert [num_accepted([4, 5, 6], chosen) for chosen in ([4, 5, 6, 7], [4, 9, 6, 7], [1, 5, 6, 7])] == [
        3,
        1,
        0,
    ]
    assert num_accepted([], [3]) == 0
