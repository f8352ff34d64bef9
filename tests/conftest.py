"""What holds for every test: the same random numbers in every run, one thread, no limit on time."""

from __future__ import annotations

import os
import random

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


@pytest.fixture(autouse=True)
def same_start() -> None:
    random.seed(0)
    # A test that wants more threads says so. Were they left to those behind it, each of the processes that share this
    # machine would have some that wait for work in a loop.
    torch.set_num_threads(1)
    torch.manual_seed(0)
