"""The thread pool: any number of threads and callers, oversubscribed or not, gives the bits of one thread."""

from __future__ import annotations

import threading

import pytest
import torch

from stepflash.kernels import ops
from stepflash.kernels.formats import Format

from .conftest import random_packed
from .test_moe import routed, shared


@pytest.mark.parametrize(("num_callers", "num_threads"), [(1, 2), (1, 7), (3, 3)])
def test_results_do_not_depend_on_threads_or_callers(num_callers: int, num_threads: int) -> None:
    formats = [Format.INT4_G32] * 3
    packed, options = (
        random_packed(Format.INT4_G32, 256, 128),
        routed(128, 64, 8, 3, formats) | shared(128, 64, formats),
    )
    inputs = [torch.randn(n, 128).bfloat16() for n in (1, 3, 40)]
    wrong: list[str] = []
    with torch.inference_mode():
        linears = [ops.linear(x, [packed], [Format.INT4_G32], [256]) for x in inputs]
        blocks = [ops.moe(x, **options, residual=x) for x in inputs]

    def caller() -> None:
        torch.set_num_threads(num_threads)
        with torch.inference_mode():
            for _ in range(15):
                for x, expected_linear, expected_block in zip(inputs, linears, blocks, strict=True):
                    if not torch.equal(ops.linear(x, [packed], [Format.INT4_G32], [256]), expected_linear):
                        wrong.append("linear")
                    if not torch.equal(ops.moe(x, **options, residual=x), expected_block):
                        wrong.append("moe")

    callers = [threading.Thread(target=caller) for _ in range(num_callers)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong
