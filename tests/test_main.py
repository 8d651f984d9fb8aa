"""`python -m apd_minimal`, on a target and a run that are cut short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch

import apd_minimal as apd
from apd_minimal import __main__ as command
from apd_minimal.study.tune import Tuned


def test_a_folder_that_is_not_there_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["apd_minimal", "--out", "no/such/x.png"])
    with pytest.raises(SystemExit):
        command.main()
    told = capsys.readouterr()
    assert told.err.strip().endswith("--out must be a file in a folder that is there, got no/such/x.png")
    assert not told.out, "it had begun"


@pytest.mark.parametrize("arguments", [[], ["--seed", "3", "--out", "mine.png"]])
def test_it_says_who_owns_what_and_saves_the_picture(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[int] = []
    results: list[Tuned] = []
    whole = apd.targets.TMS.fit

    def fit(self: apd.targets.TMS, seed: int = 0) -> apd.targets.TMS:
        seeds.append(seed)
        return whole(self, seed, steps=20)

    def tune(*args: Any, **settings: Any) -> Tuned:
        seeds.append(settings["seed"])
        results.append(apd.tune.tune(*args, **{**settings, "steps": 15, "progress": False}))
        return results[-1]

    monkeypatch.setattr(apd.targets.TMS, "fit", fit)
    monkeypatch.setattr(command, "tune", tune)
    monkeypatch.setattr(sys, "argv", ["apd_minimal", *arguments])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    command.main()
    torch.set_num_threads(threads)
    plt.close("all")
    seed, name = (3, "mine.png") if arguments else (0, "tms-5-2.png")
    assert seeds == [seed, seed]
    target = whole(apd.targets.TMS(), seed, steps=20)
    printed = capsys.readouterr().out
    components = results[0].best.components
    assert f"k: {results[0].k:.2f} components" in printed
    assert str(apd.metrics.ownership(components, target.mechanisms())) in printed
    error = (components.sum("encode.weight") - target.encode.weight.detach().T).square().mean()
    assert f"mean squared weight error {float(error):.1e}\n" in printed
    assert printed.endswith(f"picture: {name}\n")
    for said in ("5 features in 2 dimensions", "apart"):  # what one waits for
        assert said in printed
    assert [path.name for path in tmp_path.iterdir()] == [name]
    image = matplotlib.image.imread(tmp_path / name)
    assert min(image.shape[:2]) > 100
    assert image.std() > 0.01, "there is something on it"


def test_it_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["apd_minimal", "--help"])
    monkeypatch.delitem(sys.modules, "apd_minimal.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("apd_minimal", run_name="__main__")
    assert caught.value.code == 0
    assert "usage: python -m apd_minimal" in capsys.readouterr().out


def test_an_unknown_argument_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["apd_minimal", "--sed", "1"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert "--sed" in capsys.readouterr().err
