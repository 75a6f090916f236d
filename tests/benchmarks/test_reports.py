# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import optimizers, peers, refresh, results, stagger, steps, weights
from benchmarks.__main__ import MEASURES
from benchmarks.options import Options, run
from benchmarks.results import Report, Table, Target
from benchmarks.timing import Plan
from tests.test_architecture import MACHINE_PATH


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def report(*targets: Target) -> Report:
    return Report(
        name="toy",
        machine=Options().machine(),
        settings={"clock": "none"},
        measurements=[{"name": "a", "seconds": [1.0]}],
        tables=[Table(title="a table", header=("who", "ms"), rows=[("we", "1.0")])],
        targets=list(targets),
        notes=["nothing was left out"],
    )


def promise(value: float) -> Target:
    return Target(text="a is fast", value=value, bound=15.0)


def test_a_report_is_written_as_json_and_picture(tmp_path: Path) -> None:
    path = results.write(report(promise(20.0)), Figure(), tmp_path / "new")
    held = json.loads(path.read_text())
    assert path.name == f"{held['machine']['date'][:10]}-toy.json"
    assert held["measurements"] == [{"name": "a", "seconds": [1.0]}]
    assert held["targets"] == [{"text": "a is fast", "value": 20.0, "bound": 15.0, "at_least": True, "passed": True}]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(path.parent.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.write(report(), Figure(), tmp_path)
    before = path.read_bytes()

    def full_disk(self: Path, text: str, **kwargs: object) -> int:
        self.write_bytes(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        results.write(report(promise(1.0)), Figure(), tmp_path)
    assert path.read_bytes() == before
    assert sorted(item.suffix for item in tmp_path.iterdir()) == [".json", ".png"]


def test_the_header_names_versions_and_commit_but_no_machine() -> None:
    machine = Options(threads=1).machine()
    assert machine["threads"] == 1
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["commit"]
    text = json.dumps(machine)
    assert socket.gethostname() not in text
    assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize(("value", "status", "word"), [(15.0, 0, "pass"), (14.9, 1, "FAIL")])
def test_a_broken_promise_is_told_and_is_the_exit_status(
    value: float, status: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = lambda options: (report(promise(value)), Figure())  # noqa: E731
    assert run([measure], prog="bench", args=["--out", str(tmp_path)]) == status
    out, err = capsys.readouterr()
    assert word in out
    assert ("a is fast" in err) == bool(status)


def test_a_promise_is_held_to_speed_and_energy() -> None:
    case = refresh.Case(weights=weights.single(8, 8, rank=2), plan=Plan(seconds=0), promise=("peer", 15.0))
    own = {"times_faster_than": {"peer": {"median": 14.0}}, "captured_worst": 0.98}
    speed, energy = refresh._targets(case, {"finders": {refresh.DEFAULT: own}})
    assert (speed.value, speed.bound, speed.passed) == (14.0, 15.0, False)
    assert (energy.value, energy.bound, energy.passed) == (0.98, 0.99, False)
    assert refresh._targets(case, {"finders": {refresh.DEFAULT: {**own, "times_faster_than": {}}}}) == []
    assert [case.promise for case in refresh.CASES if case.promise] == [("torch.linalg.svd", 15), ("galore-torch", 30)]


def test_a_bound_from_above() -> None:
    assert Target(text="", value=2.0, bound=2.0, at_least=False).passed
    assert not Target(text="", value=2.1, bound=2.0, at_least=False).passed


def test_everything_runs_on_small_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(MEASURES, prog="python -m benchmarks", args=["--quick", "--out", str(tmp_path)]) == 0
    files = {path.name[11:]: path for path in tmp_path.iterdir()}
    names = [f"{name}-quick" for name in ("refresh", "steps", "training", "stagger", "quantized")]
    assert sorted(files) == sorted(f"{name}.{kind}" for name in names for kind in ("json", "png"))
    held = {name: json.loads(files[f"{name}.json"].read_text()) for name in names}
    assert all("1 thread" in report["settings"]["clock"] for report in held.values())
    rows = held["refresh-quick"]["measurements"][0]["finders"]
    assert rows["svd"]["captured_worst"] == pytest.approx(1.0, abs=1e-4)
    assert len(rows["svd"]["seconds"]) == held["refresh-quick"]["measurements"][0]["rounds"] >= 3
    kinds = held["steps-quick"]["measurements"][0]["optimizers"][optimizers.OURS]["median_s"]
    assert set(kinds) == set(steps.KINDS)
    costs = held["stagger-quick"]["measurements"][0]["optimizers"][stagger.AT_ONCE]["costs"]
    assert len(costs) == 16
    assert min([*kinds.values(), *costs]) > 0
    assert "galore-torch" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "peer", lambda name, module: None)
    measures = (refresh.measure, steps.measure)
    assert run(measures, prog="python -m benchmarks", args=["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "galore-torch is not installed" in out
    assert not any('"galore-torch": {' in path.read_text() for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--threads", "0"], "threads=0"), (["--gradients", "nowhere.pt"], "nowhere.pt"), (["--device", "tpu"], "tpu")],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run([], prog="bench", args=arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device='cuda'"):
        Options(device="cuda")
