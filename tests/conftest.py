"""What holds for every test: the same random numbers in every run, one thread, no limit on time."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "stepflash",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),  # elsewhere every run tries other examples
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("stepflash")


# Small shapes: a second thread costs more than it brings. A test that wants more says so; were they left to those
# behind it, each of the processes that share this machine would have some that wait for work in a loop.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
