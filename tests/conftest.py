"""What holds for every test: the same random numbers in every run, no limit on time (machines are slow at times)."""

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
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
