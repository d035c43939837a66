"""The script that measures at ImageNet's size, at a small one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scale
from scale import main

from clip_adapter.cache.reader import FeatureCache


def test_each_command_is_a_row_with_what_it_took(tmp_path: Path) -> None:
    """In a process of its own: Linux counts the memory of whoever forks for a command's, too."""
    cache = tmp_path / "small.h5"
    command = [sys.executable, scale.__file__, "--small", "--cache", str(cache), "gda"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[-1]
    work, cpu, wall, peak, accuracy, *_ = (cell.strip() for cell in row.split("|")[1:])
    assert work == "gda"
    assert 0.5 < float(cpu) < 60
    assert float(wall) > 0.5
    assert 200 < float(peak.replace(",", "")) < 1500
    assert 60 < float(accuracy) < 100
    with FeatureCache(cache) as made:
        assert np.bincount(made.labels("train")).tolist() == [130] * 10
        assert np.all(np.diff(made.labels("train")) >= 0)
        features = made.features("train", np.arange(1300))[0]
        own = features[np.unique(features, axis=0, return_index=True)[1]]
        assert len(own) == 1300, "no image stands for another"


def test_what_takes_too_long_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--small", "--minutes", "0.02", "zero-shot"])
    assert "stopped after 0.02 CPU minutes" in capsys.readouterr().out.splitlines()[-1]
