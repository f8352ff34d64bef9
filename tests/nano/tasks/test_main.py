"""The command that shows the data. Kind: end to end."""

from __future__ import annotations

import pytest

from stepflash.nano.tasks.__main__ import main


def test_shows_examples_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    main(["spell", "--count", "3", "--tier", "hard"])
    shown = capsys.readouterr().out
    assert shown.count("<|im_start|>assistant\n<think>\n") == 3


def test_refuses_an_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no_such_task"])
    assert "invalid choice" in capsys.readouterr().err
