"""Settings are checked when they are made, with messages that name the key."""

from typing import Any

import pytest

from stepflash.errors import ConfigError
from stepflash.settings import EngineSettings, ServerSettings, did_you_mean, is_debug


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (EngineSettings, {"dtype": "int3"}),
        (EngineSettings, {"threads": 0}),
        (EngineSettings, {"max_num_seqs": 0}),
        (EngineSettings, {"kv_cache_gb": 0.0}),
        (EngineSettings, {"kv_cache_gb": float("nan")}),
        (EngineSettings, {"kv_cache_gb": 1e9}),
        (EngineSettings, {"kv_dtype": "fp8"}),
        (EngineSettings, {"max_model_len": 1}),
        (ServerSettings, {"port": -1}),
        (ServerSettings, {"port": 65536}),
    ],
)
def test_a_wrong_value_is_refused_by_name(kind: type, values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=name):
        kind(**values)


def test_gibibytes_become_bytes() -> None:
    assert EngineSettings(kv_cache_gb=1.5).kv_cache_bytes == 3 * 2**29
    assert EngineSettings().kv_cache_bytes is None


def test_suggestions() -> None:
    assert did_you_mean("serv", ["serve", "chat"]) == "; did you mean 'serve'?"
    assert did_you_mean("xyz", ["serve", "chat"]) == ""


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_debug_from_the_environment(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEPFLASH_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("STEPFLASH_DEBUG", value)
    assert is_debug() is expected
