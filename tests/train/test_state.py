"""The state on disk: rows of any number of ranks come back to any other number, and what is torn is passed over."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama import folders
from mtllama.errors import UserError
from mtllama.train import state
from mtllama.train.parallel import Ranks


@dataclass(frozen=True)
class OneOfMany(Ranks):
    """A rank of a run whose other ranks are taken in turn, in this process; plain tensors stand for sharded ones."""

    @contextlib.contextmanager
    def new_folder(self, path: Path, *, overwrite: bool = False) -> Iterator[Path]:
        path.mkdir(parents=True, exist_ok=True)
        yield path

    def gather(self, value: object) -> list:  # type: ignore[override]
        return [value]

    def once(self, action):  # type: ignore[no-untyped-def, override]
        return action()

    def rows(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        each = -(-len(tensor) // self.size)
        first = min(self.rank * each, len(tensor))
        return tensor[first : first + each], first


def many(size: int) -> list[OneOfMany]:
    return [OneOfMany(rank, size, torch.device("cpu"), "fsdp") for rank in range(size)]


def trained(sizes: list[int], seed: int, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A module of parameters with so many rows, and an optimiser, after some steps."""
    torch.manual_seed(seed)
    model = torch.nn.ParameterDict(
        {f"p{i}": torch.nn.Parameter(torch.randn(size, 3) if i % 2 else torch.randn(size)) for i, size in enumerate(sizes)}
    )
    model["frozen"] = torch.nn.Parameter(torch.randn(4), requires_grad=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model, optimizer


def same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> bool:
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    return all(
        torch.equal(a, b)
        and ours.state[a].keys() == theirs.state[b].keys()
        and all(torch.equal(ours.state[a][k], theirs.state[b][k]) for k in theirs.state[b])
        for a, b in pairs
    )


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_state_of_so_many_ranks_is_restored_by_so_many_others(before: int, after: int, sizes: list[int]) -> None:
    import tempfile

    model, optimizer = trained(sizes, seed=1)
    with tempfile.TemporaryDirectory() as name:
        for ranks in reversed(many(before)):
            state.save(Path(name), 7, model, optimizer, {"examples": 9}, keep=1, ranks=ranks)
        folder = Path(name) / "step-0000007"
        assert len(list(folder.glob("*.safetensors"))) == before
        other, again = trained(sizes, seed=2)
        assert not same(again, optimizer)
        before_it = other["frozen"].detach().clone()
        for ranks in many(after):
            assert state.restore(Path(name), other, again, ranks) == (7, {"examples": 9})
            # each rank fills its rows alone; moments are put together here as the ranks would hold them
            for parameter in again.param_groups[0]["params"]:
                for kind in ("exp_avg", "exp_avg_sq"):
                    whole = again.state[parameter].setdefault("of all " + kind, torch.zeros_like(parameter))
                    rows, first = ranks.rows(again.state[parameter][kind])
                    whole[first : first + len(rows)] = rows
        for parameter in again.param_groups[0]["params"]:
            for kind in ("exp_avg", "exp_avg_sq"):
                again.state[parameter][kind] = again.state[parameter].pop("of all " + kind)
        assert same(again, optimizer)
        assert torch.equal(other["frozen"], before_it)


def test_the_state_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer = trained([5, 2], seed=0)
    state.save(tmp_path, 3, model, optimizer, {"tokens": 1}, keep=1, ranks=Ranks())
    folder = tmp_path / "step-0000003"
    with safetensors.safe_open(folder / state.rank_file(0), "pt") as file:
        assert set(file.keys()) == {f"{kind}/p{i}" for kind in ("weight", "exp_avg", "exp_avg_sq") for i in (0, 1)}
        assert json.loads(file.metadata()[state.ROWS]) == {"p0": [0, 5], "p1": [0, 2]}
    assert {path.name for path in folder.iterdir()} == {state.STATE, state.rank_file(0)}
    assert folders.read_json(folder / state.STATE) == {"step": 3, "updates": 2, "files": 1, "ranks": 1, "totals": {"tokens": 1}}


def break_file(folder: Path) -> None:
    file = folder / state.rank_file(1)
    file.write_bytes(file.read_bytes()[:-5])


def lose_a_rank(folder: Path) -> None:
    (folder / state.rank_file(0)).unlink()


def lose_rows(folder: Path) -> None:
    told = folders.read_json(folder / state.STATE)
    folders.write_json(folder / state.STATE, {**told, "files": 1})


def break_the_json(folder: Path) -> None:
    (folder / state.STATE).write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [break_file, lose_a_rank, lose_rows, break_the_json])
def test_a_torn_checkpoint_is_passed_over_with_a_word(damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    model, optimizer = trained([5, 2], seed=0)
    for step in (1, 2):
        for ranks in many(2):
            state.save(tmp_path, step, model, optimizer, {"examples": step}, keep=3, ranks=ranks)
    assert state.restore(tmp_path, model, optimizer, Ranks())[0] == 2
    assert capsys.readouterr().err == ""
    damage(tmp_path / "step-0000002")
    assert state.restore(tmp_path, model, optimizer, Ranks()) == (1, {"examples": 1})
    said = capsys.readouterr().err
    assert "step-0000002" in said and "passed over" in said and len(said.splitlines()) == 1


def test_states_of_which_none_can_be_read_are_refused_and_stay(tmp_path: Path) -> None:
    """They are of another model here; a disk that fails for a moment must not cost a run its work either."""
    model, optimizer = trained([5, 2], seed=0)
    for step, what in ((1, "step-0000001 cannot be read"), (2, r"step-0000001 cannot be read .*, nor can those after it")):
        state.save(tmp_path, step, model, optimizer, {}, keep=3, ranks=Ranks())
        for sizes in ([5, 3], [5, 2, 2]):
            other, again = trained(sizes, seed=1, steps=1)
            with pytest.raises(UserError, match=f"{what}.*; mend that, or remove {tmp_path} to begin anew"):
                state.restore(tmp_path, other, again, Ranks())
    assert state.restore(tmp_path, model, optimizer, Ranks())[0] == 2


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained([3], seed=0)
    for step in range(1, 6):
        state.save(tmp_path, step, model, optimizer, {}, keep=2, ranks=Ranks())
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["step-0000004", "step-0000005"]


def tear(folder: Path) -> None:
    file = folder / state.rank_file(0)
    file.write_bytes(file.read_bytes()[:-5])


def test_a_torn_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    """Else the torn one would push out the one that the run goes on from, and the one that is written now."""
    model, optimizer = trained([3], seed=0)
    for step in (2, 4, 8):
        state.save(tmp_path, step, model, optimizer, {}, keep=3, ranks=Ranks())
    tear(tmp_path / "step-0000008")
    assert state.restore(tmp_path, model, optimizer, Ranks())[0] == 4
    state.save(tmp_path, 5, model, optimizer, {}, keep=1, ranks=Ranks())
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["step-0000005"]
    for step, left in ((6, [5, 6]), (7, [5, 6, 7]), (8, [7, 8])):
        state.save(tmp_path, step, model, optimizer, {}, keep=2, ranks=Ranks())
        assert [int(folder.name[5:]) for folder in sorted(tmp_path.iterdir())] == left
        if step == 6:
            tear(tmp_path / "step-0000006")


def test_a_state_from_before_the_first_update_is_one_to_train_from(tmp_path: Path) -> None:
    model, optimizer = trained([3], seed=0, steps=0)
    state.save(tmp_path, 1, model, optimizer, {}, keep=1, ranks=Ranks())
    other, again = trained([3], seed=1, steps=0)
    assert state.restore(tmp_path, other, again, Ranks()) == (1, {})
    for each, its in ((model, optimizer), (other, again)):
        each["p0"].square().sum().backward()
        its.step()
    assert same(again, optimizer) and len(again.state) == 1


def test_without_a_checkpoint_the_run_begins_anew(tmp_path: Path) -> None:
    model, optimizer = trained([3], seed=0)
    assert state.restore(tmp_path / "none", model, optimizer, Ranks()) == (0, {})
