"""Many processes: the same result as one, whatever the mesh; checkpoints that any number of ranks takes up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

import apd_minimal as apd
from apd_minimal import store
from apd_minimal.scale import processes


def launch(n: int, what: str, folder: Path) -> list[tuple[int, str]]:
    """Start n ranks without torchrun, which would stop the others itself: exit code and messages of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, what, str(folder)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    messages = [process.communicate(timeout=1200)[1] for process in started]
    return [(process.returncode, message) for process, message in zip(started, messages, strict=True)]


def numbers(rows: list[Any]) -> list[float]:
    """A row of the history after the other; a loss that is not in force counts as -1."""
    return [-1.0 if value is None else value for row in rows for value in (row if isinstance(row, list) else [row])]


def assert_equal(path: Path, expected: apd.Decomposition) -> None:
    tensors, facts = store.read_tensors(path, "test")
    assert expected.restarts is not None
    assert facts["history"].keys() == expected.history.keys()
    for name, rows in expected.history.items():
        assert numbers(facts["history"][name]) == pytest.approx(numbers(rows), rel=1e-6, abs=1e-12), name
    torch.testing.assert_close(torch.tensor(facts["scores"]), torch.tensor(expected.scores))
    for i, t in enumerate(expected.restarts.parameters()):
        torch.testing.assert_close(tensors[str(i)], t, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def alone() -> dict[str, apd.Decomposition]:
    """The same runs in this process."""
    return {name: run(apd.decompose) for name, run in ranks.CASES.items()}


@pytest.mark.parametrize("n", [2, 4])
def test_many_processes_do_what_one_does(n: int, tmp_path: Path, alone: dict[str, apd.Decomposition]) -> None:
    """Started as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run(
        [*command, ranks.__file__, "equal", str(tmp_path)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    for name, result in alone.items():
        for components in (c for c in (1, 2, 4) if n % c == 0):
            assert_equal(tmp_path / f"{name}-{components}", result)


def test_a_rank_that_dies_stops_the_others_and_any_number_goes_on(
    tmp_path: Path, alone: dict[str, apd.Decomposition]
) -> None:
    (code, message), (killed, _) = launch(2, "kill", tmp_path)
    assert killed == -signal.SIGKILL
    assert code != 0
    assert "RankLost: rank 0 lost another rank of 2; start again, with any number of ranks, to go on from" in message
    checkpoint = tmp_path / "run.safetensors"
    assert store.read_tensors(checkpoint, "checkpoint")[1]["step"] == 6
    before = checkpoint.read_bytes()
    for code, message in launch(4, "go on", tmp_path):
        assert code == 0, message
    assert_equal(tmp_path / "result", alone["tms"])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(ranks.STEPS)), "one line a step, by one of the ranks"
    checkpoint.write_bytes(before)
    resumed = ranks.tms(apd.decompose, checkpoint=checkpoint)
    assert resumed.history["step"] == list(range(ranks.STEPS))
    write = tmp_path / "resumed"
    ranks.write(write, resumed)
    assert_equal(write, alone["tms"])


def test_a_checkpoint_of_one_process_is_taken_up_by_two(tmp_path: Path, alone: dict[str, apd.Decomposition]) -> None:
    def broken(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == 8:
            raise RuntimeError("broken")
        return ranks.sparse(step, generator)

    with pytest.raises(RuntimeError, match="broken"):
        ranks.tms(apd.decompose, source=broken, checkpoint=tmp_path / "run.safetensors", checkpoint_every=3)
    for code, message in launch(2, "go on", tmp_path):
        assert code == 0, message
    assert_equal(tmp_path / "result", alone["tms"])


def test_wrong_input_is_refused_on_every_rank(tmp_path: Path) -> None:
    for code, message in launch(2, "refused", tmp_path):
        assert code == 0, message
    for rank in range(2):
        found = json.loads((tmp_path / f"refused-{rank}.json").read_text())
        assert found == {
            "attribution": "attribution must be None where the components are spread over ranks: gradients are exact",
            "attribution along the data": "nothing",
            "few samples": "a batch of 1 cannot be spread over 2 ranks",
            "few components": "1 components cannot be spread over 2 ranks",
            "other settings": "the ranks were given different targets or settings",
            "other pieces": "the ranks were given different targets or settings",
            "other batches": "the ranks were given different batches",
            "other checkpoints": "the ranks were given different checkpoints",
            "no such mesh": 'mesh must have the dimensions ("data", "components"), got None',
            "broken": "step 1: the a",
            "autocast": "True",
            "mesh": "2 ranks cannot be laid out with 3 along components",
        }


def test_a_mesh_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="started by torchrun"):
        processes.mesh()
