"""Other kernels really are others: what tools.portable sets reaches the tests, the chapters and the sums."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools import portable

SEEN = """
import os, sys
sys.path[:0] = ["."]
import conftest  # the chapters' environment, last word before torch
import torch
print(os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.environ.get("MKL_CBWR"))
"""


@pytest.mark.parametrize(("name", "seen"), [("two threads", "2 2 None"), ("MKL_CBWR=COMPATIBLE", "1 1 COMPATIBLE")])
def test_what_is_set_arrives(name: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APD_THREADS", raising=False)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    command = [sys.executable, "-c", SEEN]
    found = subprocess.check_output(command, cwd=portable.ROOT, env=portable.environment(name), text=True)
    assert found.split() == seen.split()


def test_a_failure_is_counted_and_the_same_kernels_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = "print('1 failed, 2 passed in 3 s'); raise SystemExit(1)"
    monkeypatch.setattr(
        portable, "parts", lambda: {"module": [sys.executable, "-c", fails], "chapters": [sys.executable, "-c", ""]}
    )
    monkeypatch.setattr(portable, "KERNELS", {"one of mine": {}, "other of mine": {}, "left out": {}})
    monkeypatch.setattr(portable, "fingerprint", lambda name: "12345678")
    monkeypatch.setattr(sys, "argv", ["portable.py", "mine"])
    assert portable.main() == 1
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert "module: 2 passed, 1 failed, 0 skipped; chapters: 1 passed, 0 failed" in lines[0]
    assert "the same on this machine as one of mine" in lines[1]
