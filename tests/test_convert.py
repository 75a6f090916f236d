# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the true galore_torch are converted, go on training alike, and crafted ones are refused."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import galore_torch
import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.convert import ConversionError, convert_checkpoint, convert_optimizer_state

RANK, GAP, STEPS = 4, 3, 5
SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12), "r_is_min": (RANK, 16)}


class Weights(nn.Module):
    """Some matrices and a bias, with a smooth loss."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList(
            [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in shapes]
        )
        self.bias = nn.Parameter(torch.randn(7, generator=generator).to(dtype))
        self.goals = [torch.randn(*p.shape, generator=generator).to(dtype) for p in self.parameters()]

    def loss(self) -> Tensor:
        return torch.stack(
            [(p - goal).float().pow(4).sum() for p, goal in zip(self.parameters(), self.goals, strict=True)]
        ).sum()


def groups_of(model: Weights, *, proj_type: str = "std", rank: int = RANK) -> list[dict[str, Any]]:
    galore = {"rank": rank, "update_proj_gap": GAP, "scale": 0.5, "proj_type": proj_type}
    return [{"params": list(model.matrices), **galore}, {"params": [model.bias]}]


def theirs(model: Weights, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return galore_torch.GaLoreAdamW(groups_of(model, **settings), lr=0.02, eps=1e-30)


def train(model: Weights, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


@pytest.fixture
def trained() -> tuple[Weights, Any]:
    model = Weights(tuple(SHAPES.values()))
    optimizer = theirs(model)
    train(model, optimizer, STEPS)
    return model, optimizer


@pytest.fixture
def source(trained: tuple[Weights, Any], tmp_path: Path) -> Path:
    path = tmp_path / "old.ckpt"
    torch.save(trained[1].state_dict(), path)
    return path


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("steps", [STEPS, 2 * GAP], ids=["between refreshes", "at a refresh"])
def test_training_goes_on_as_with_galore_torch(proj_type: str, steps: int, tmp_path: Path) -> None:
    # galore-torch itself fails on reverse_std with rank = m < n.
    shapes = [shape for name, shape in SHAPES.items() if name != "r_is_min" or proj_type == "std"]
    reference = Weights(tuple(shapes))
    reference_optimizer = theirs(reference, proj_type=proj_type)
    train(reference, reference_optimizer, steps)
    torch.save({"state_dict": reference.state_dict(), "optimizer": reference_optimizer.state_dict()}, tmp_path / "old")

    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    checkpoint = torch.load(tmp_path / "new", weights_only=True)
    model = Weights(tuple(shapes))
    model.load_state_dict(checkpoint["state_dict"])
    base = torch.optim.AdamW(groups_of(model, proj_type=proj_type), lr=0.02, eps=1e-30, weight_decay=0.0)
    optimizer = GaLoreOptimizer(base, model, method="galore", fix_signs=False)
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(reference, reference_optimizer, 3 * GAP)
    train(model, optimizer, 3 * GAP)

    for ours, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    for ours, wanted in zip(model.parameters(), Weights(tuple(shapes)).parameters(), strict=True):
        assert (ours - wanted).abs().max() > 0.05  # they did move


@pytest.mark.parametrize(
    ("proj_type", "shape", "side", "low_shape"),
    [
        ("std", (24, 10), 1, (24, RANK)),
        ("std", (10, 24), 0, (RANK, 24)),
        ("std", (12, 12), 1, (12, RANK)),
        ("std", (RANK, 16), 0, (RANK, 16)),
        ("std", (16, RANK), 1, (16, RANK)),
        ("std", (RANK, RANK), 1, (RANK, RANK)),
        ("reverse_std", (24, 10), 0, (RANK, 10)),
        ("reverse_std", (10, 24), 1, (10, RANK)),
        ("reverse_std", (12, 12), 0, (RANK, 12)),
        ("reverse_std", (RANK, RANK), 0, (RANK, RANK)),
        ("left", (12, 12), 0, (RANK, 12)),
        ("right", (12, 12), 1, (12, RANK)),
        ("full", (12, 12), 2, (RANK, RANK)),
        ("full", (10, 24), 2, (RANK, RANK)),
    ],
)
def test_layout(proj_type: str, shape: tuple[int, int], side: int, low_shape: tuple[int, int]) -> None:
    model = Weights((shape,))
    optimizer = theirs(model, proj_type=proj_type)
    train(model, optimizer, STEPS)
    state = convert_optimizer_state(optimizer.state_dict())["state"][0]

    assert state["galore_side"] == side
    assert state["galore_step"] == STEPS
    assert state["galore_refreshed_at"] == GAP
    assert state["galore_refreshes"] == 2
    assert state["galore_failures"] == 0
    assert state["step"].dtype == torch.float32
    assert state["step"].shape == ()
    assert state["step"].item() == STEPS
    m, n = shape
    dims = {0: (m,), 1: (n,), 2: (m, n)}[side]
    bases = [state[key] for key in ("galore_basis", "galore_basis_right") if key in state]
    assert [tuple(basis.shape) for basis in bases] == [(d, RANK) for d in dims]
    for basis in bases:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK), atol=1e-5, rtol=0)
    for key in ("exp_avg", "exp_avg_sq"):
        assert tuple(state[key].shape) == low_shape
        assert torch.equal(state[key], optimizer.state[model.matrices[0]][key])


@pytest.mark.parametrize(
    ("steps", "refreshed_at", "refreshes"), [(1, 0, 1), (3, 0, 1), (4, 3, 2), (6, 3, 2), (7, 6, 3)]
)
def test_counters_follow_galore_torchs_refreshes(steps: int, refreshed_at: int, refreshes: int) -> None:
    model = Weights(((24, 10),))
    optimizer = theirs(model)
    seen = []
    original = GaLoreProjector.get_orthogonal_matrix
    projector_calls = pytest.MonkeyPatch()
    projector_calls.setattr(
        GaLoreProjector,
        "get_orthogonal_matrix",
        lambda self, *args, **kwargs: (seen.append(1), original(self, *args, **kwargs))[1],
    )
    train(model, optimizer, steps)
    projector_calls.undo()
    state = convert_optimizer_state(optimizer.state_dict())["state"][0]
    assert (state["galore_refreshed_at"], state["galore_refreshes"]) == (refreshed_at, refreshes)
    assert len(seen) == refreshes


def test_views_become_fresh_contiguous_tensors(trained: tuple[Weights, Any], source: Path, tmp_path: Path) -> None:
    original = trained[1].state_dict()
    before = copy.deepcopy(original)
    converted = convert_optimizer_state(original)
    for state in converted["state"].values():
        for value in state.values():
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    converted["state"][0]["exp_avg"].zero_()
    assert torch.equal(original["state"][0]["exp_avg"], before["state"][0]["exp_avg"])  # nothing is shared
    assert "projector" in original["state"][0]

    report = convert_checkpoint(source, tmp_path / "new.ckpt")
    assert report.bytes_after < report.bytes_before


def test_dtypes_are_kept() -> None:
    model = Weights(((24, 10),), dtype=torch.bfloat16)
    optimizer = theirs(model)
    train(model, optimizer, 2)
    state = convert_optimizer_state(optimizer.state_dict())["state"][0]
    assert {state[key].dtype for key in ("galore_basis", "exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_groups_are_what_torch_adamw_keeps(trained: tuple[Weights, Any]) -> None:
    groups = convert_optimizer_state(trained[1].state_dict())["param_groups"]
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).state_dict()["param_groups"][0]
    galore = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_type": "std"}
    assert set(groups[0]) == {*fresh, *galore}
    assert {key: groups[0][key] for key in galore} == galore
    assert set(groups[1]) == set(fresh)
    assert groups[1]["lr"] == 0.02


def test_report(source: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(source, tmp_path / "new.ckpt")
    assert (report.projected, report.plain) == (4, 1)
    assert report.sides == {"right": 2, "left": 2}
    assert report.ranks == {RANK: 4}
    assert "eps" in report.warnings[0]
    text = str(report)
    assert "4 projected weights (2 left, 2 right; 4 of rank 4), 1 plain" in text
    assert f"{report.bytes_after:,} after" in text


def test_report_warns_of_edited_groups_and_uncorrected_bias(trained: tuple[Weights, Any], tmp_path: Path) -> None:
    state = trained[1].state_dict()
    state["param_groups"][0]["scale"] = 2.0
    state["param_groups"][1]["correct_bias"] = False
    torch.save(state, tmp_path / "old")
    warned = " ".join(convert_checkpoint(tmp_path / "old", tmp_path / "new").warnings)
    assert "scale=0.5, its group 2.0" in warned
    assert "correct_bias=False" in warned


# -- files -------------------------------------------------------------------------------------------------------------


def test_lightning_checkpoint_keeps_everything_else(trained: tuple[Weights, Any], tmp_path: Path) -> None:
    model, optimizer = trained
    ordinary = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    checkpoint = {
        "epoch": 1,
        "global_step": STEPS,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict(), ordinary.state_dict()],
        "lr_schedulers": [{"last_epoch": STEPS}],
        "hyper_parameters": {"name": "x", "lr": 0.1},
    }
    torch.save(checkpoint, tmp_path / "old.ckpt")
    convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    result = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert list(result) == list(checkpoint)
    assert result["hyper_parameters"] == checkpoint["hyper_parameters"]
    assert result["lr_schedulers"] == checkpoint["lr_schedulers"]
    assert all(torch.equal(result["state_dict"][key], value) for key, value in model.state_dict().items())
    assert "galore_basis" in result["optimizer_states"][0]["state"][0]
    assert result["optimizer_states"][1] == ordinary.state_dict()


def test_nothing_of_galore_torch_is_imported(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['galore_torch'] = None\n"
        "from lightning_galore.convert import convert_checkpoint\n"
        "report = convert_checkpoint(sys.argv[1], sys.argv[2])\n"
        "assert not [name for name in sys.modules if name.startswith('galore_torch.')]\n"
        "sys.exit(report.projected)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "new")], timeout=120, check=False)
    assert result.returncode == 4


def test_target_is_never_replaced_unasked(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.ckpt"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_checkpoint(source, target)
    assert target.read_bytes() == b"precious"
    convert_checkpoint(source, target, overwrite=True)
    assert torch.load(target, weights_only=True)["state"][0]["galore_step"] == STEPS


def test_source_may_be_its_own_target(source: Path) -> None:
    convert_checkpoint(source, source, overwrite=True)
    with pytest.raises(ConversionError, match="already in this package's layout"):
        convert_checkpoint(source, source, overwrite=True)


@pytest.mark.parametrize("failing", ["save", "load"])
def test_no_half_file_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "new.ckpt").write_bytes(b"precious")

    def broken_save(checkpoint: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    def broken_replace(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    if failing == "save":
        monkeypatch.setattr(torch, "save", broken_save)
    else:
        monkeypatch.setattr(Path, "replace", broken_replace)
    with pytest.raises((OSError, KeyboardInterrupt)):
        convert_checkpoint(source, folder / "new.ckpt", overwrite=True)
    assert os.listdir(folder) == ["new.ckpt"]
    assert (folder / "new.ckpt").read_bytes() == b"precious"


def test_permissions_follow_the_source(source: Path, tmp_path: Path) -> None:
    source.chmod(0o640)
    convert_checkpoint(source, tmp_path / "new.ckpt")
    assert (tmp_path / "new.ckpt").stat().st_mode & 0o777 == 0o640


def test_paths_are_checked(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_checkpoint(tmp_path / "missing", tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="make it first"):
        convert_checkpoint(source, tmp_path / "nowhere" / "new")
    with pytest.raises(ConversionError, match=r"is a folder without optimizer\.pt.*give a single file"):
        convert_checkpoint(tmp_path, tmp_path / "new")
    with pytest.raises(ConversionError, match="is a folder"):
        convert_checkpoint(source, tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(state_dict: dict[str, Any]) -> dict[str, Any]:
        change(state_dict)
        return state_dict

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: [1, 2], "a dictionary is expected"),
        (lambda sd: {"state_dict": {}}, "no optimizer state"),
        (lambda sd: {"optimizer_states": []}, "empty"),
        (lambda sd: {"optimizer_states": {0: sd}}, "not a list"),
        (lambda sd: {"optimizer_states": [torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict()]}, "is empty"),
        (
            edited(lambda sd: sd["state"][0].update(state1=torch.zeros(2), absmax1=torch.zeros(2))),
            "8-bit.*weights only",
        ),
        (edited(lambda sd: sd["state"][0].update(RMS=1.0)), "Adafactor"),
        (
            edited(lambda sd: [state.pop("projector", None) for state in sd["state"].values()]),
            r"holds no projector.* Load the model's weights only .*in\s+model\.safetensors.* Else: give a Lightning",
        ),
        (edited(lambda sd: sd["state"][0].update(projector=3)), "not a GaLoreProjector"),
        (edited(lambda sd: sd["state"][0].update(momentum=1)), "has the keys"),
        (edited(lambda sd: sd["state"][0].update(step=0)), "step=0"),
        (edited(lambda sd: sd["state"][0].update(step=1.5)), "step=1.5"),
        (edited(lambda sd: sd["state"][0].update(exp_avg="x")), "moments"),
        (edited(lambda sd: sd["state"][0].update(exp_avg=torch.zeros(3, 3))), "differ"),
        (
            edited(lambda sd: sd["state"][0].update(exp_avg=torch.zeros(3, 3), exp_avg_sq=torch.zeros(3, 3))),
            "belong to no weight",
        ),
        (edited(lambda sd: sd["state"][0].update(exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))), "matrix"),
        (edited(lambda sd: sd["state"].update({99: sd["state"][0]})), "no param group"),
        (edited(lambda sd: sd.update(state=[])), "damaged"),
        (edited(lambda sd: sd.update(param_groups=[{"lr": 1}])), "damaged"),
    ],
)
def test_other_states_are_refused(
    trained: tuple[Weights, Any], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    torch.save(change(trained[1].state_dict()), tmp_path / "old")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", "4", "rank is '4'"),
        ("rank", True, "rank is True"),
        ("update_proj_gap", 0, "update_proj_gap is 0"),
        ("scale", float("nan"), "scale is nan"),
        ("scale", torch.tensor(1.0), "scale is"),
        ("proj_type", "sideways", "proj_type is 'sideways'"),
        ("proj_type", ["std"], "proj_type is"),
        ("proj_type", "full", "list of two"),
        ("ortho_matrix", None, "a tensor is expected"),
        ("ortho_matrix", [1.0, 2.0], "a tensor is expected"),
        ("ortho_matrix", torch.zeros(4), "dense floating-point matrix"),
        ("ortho_matrix", torch.zeros(4, 10, dtype=torch.int8), "dense floating-point matrix"),
        ("ortho_matrix", torch.zeros(4, 10).to_sparse(), "dense floating-point matrix"),
        ("project", "x", r"\['project'\] added"),
        ("__class__", "x", r"\['__class__'\] added"),
        ("proj_quant", True, "4-bit"),
    ],
)
def test_projectors_with_anything_unexpected_are_refused(
    trained: tuple[Weights, Any], tmp_path: Path, key: str, value: object, message: str
) -> None:
    state_dict = trained[1].state_dict()
    vars(state_dict["state"][0]["projector"])[key] = value
    torch.save(state_dict, tmp_path / "old")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rank_beyond_the_weight_is_refused() -> None:
    model = Weights(((24, 10),))
    optimizer = theirs(model, rank=16)
    train(model, optimizer, 2)
    with pytest.raises(ConversionError, match=r"rank=16 .* \(24, 10\)"):
        convert_optimizer_state(optimizer.state_dict())


def test_projector_missing_an_attribute_is_refused(trained: tuple[Weights, Any]) -> None:
    del trained[1].state[trained[0].matrices[0]]["projector"].scale
    with pytest.raises(ConversionError, match=r"\['scale'\] missing"):
        convert_optimizer_state(trained[1].state_dict())


def test_projector_elsewhere_in_the_file_is_refused(trained: tuple[Weights, Any], tmp_path: Path) -> None:
    projector = trained[1].state[trained[0].matrices[0]]["projector"]
    torch.save({"optimizer": trained[1].state_dict(), "extra": [{"x": projector}]}, tmp_path / "old")
    with pytest.raises(ConversionError, match="outside of its optimizer states"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("place", ["state", "projector", "elsewhere"])
@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (lambda marker: Calls(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]), "Popen"),
        (lambda marker: Calls(Path, str(marker)), "Path"),
        (lambda marker: subprocess.CompletedProcess([], 0), "CompletedProcess"),
    ],
    ids=["system", "eval", "popen", "path", "object"],
)
def test_code_in_the_file_never_runs(
    trained: tuple[Weights, Any], tmp_path: Path, place: str, payload: Callable[[Path], object], named: str
) -> None:
    marker = tmp_path / "was_here"
    state_dict = trained[1].state_dict()
    if place == "state":
        state_dict["state"][0]["exp_avg"] = payload(marker)
    elif place == "projector":
        state_dict["state"][0]["projector"].scale = payload(marker)
    else:
        state_dict["hyper_parameters"] = payload(marker)
    torch.save(state_dict, tmp_path / "old")
    with pytest.raises(ConversionError, match=named):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize(
    "crafted",
    [Calls(GaLoreProjector, 4), Calls(GaLoreProjector), GaLoreProjector],
    ids=["called with arguments", "never given a state", "the class itself"],
)
def test_stand_in_has_no_way_in(trained: tuple[Weights, Any], tmp_path: Path, crafted: object) -> None:
    state_dict = trained[1].state_dict()
    state_dict["state"][0]["projector"] = crafted
    torch.save(state_dict, tmp_path / "old")
    with pytest.raises(ConversionError):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


def test_tensor_projector_is_refused_with_a_remedy(
    trained: tuple[Weights, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sys)("galore_torch.galore_projector_tensor")
    cls = type("GaLoreProjectorTensor", (), {"__module__": module.__name__})
    module.GaLoreProjectorTensor = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state_dict = trained[1].state_dict()
    state_dict["state"][0]["projector"] = cls()
    torch.save(state_dict, tmp_path / "old")
    with pytest.raises(ConversionError, match="more than two dimensions.*start a new optimizer"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", pickle.dumps({"state": {}})[:-3]])
def test_broken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "old").write_bytes(content)
    with pytest.raises(ConversionError, match="old"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")


def test_the_allow_list_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    convert_checkpoint(source, tmp_path / "new")
    assert set(torch.serialization.get_safe_globals()) == before
