"""A graph as a value and as a file: what is read, what is refused, what a teacher never saw."""

import pickle
from pathlib import Path

import graph_support
import numpy as np
import pytest
import torch

from dsdistill.harness.errors import UserError
from dsdistill.harness.paths import data_root
from kd.graphs import graph

CORA = data_root() / "graphs" / "cora.npz"


def _write(folder: Path, **changes: object) -> Path:
    arrays = graph_support.arrays() | changes
    path = folder / "graph.npz"
    np.savez(path, **{k: np.asarray(v) for k, v in arrays.items() if v is not None})
    return path


def test_a_file_gives_the_arrays_that_it_was_made_from(tmp_path: Path) -> None:
    read, arrays = graph.load(_write(tmp_path)), graph_support.arrays()
    assert (len(read), read.width, read.classes) == (60, 5, 2)
    np.testing.assert_array_equal(read.features, arrays["features"])
    np.testing.assert_array_equal(read.edges, arrays["edges"])
    for name in graph.PARTS:
        np.testing.assert_array_equal(getattr(read, name), np.sort(arrays[name]))


def test_features_may_be_entries(tmp_path: Path) -> None:
    dense = graph_support.arrays()["features"]
    rows, cols = np.nonzero(dense)
    entries = {"rows": rows, "cols": cols, "values": dense[rows, cols], "shape": dense.shape}
    read = graph.load(_write(tmp_path, features=None, **entries))
    np.testing.assert_array_equal(read.features, dense)


def test_an_edge_counts_once_and_none_is_from_a_node_to_itself(tmp_path: Path) -> None:
    edges = [[3, 1], [1, 3], [1, 3], [2, 2], [0, 4]]
    read = graph.load(_write(tmp_path, edges=edges))
    assert read.edges.tolist() == [[0, 4], [1, 3]]
    assert read.neighbours.tolist() == [[0, 4], [1, 3], [3, 1], [4, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels is missing"),
        ({"test": None}, "test is missing"),
        ({"features": None}, "features is missing, or rows of rows, cols, values, shape"),
        ({"features": np.full((60, 5), np.nan)}, "features must be finite"),
        ({"features": np.zeros(60)}, r"features must be numbers \(n, d\)"),
        ({"edges": [[0, 60]]}, "edges has 60, and the 60 nodes are 0 to 59"),
        ({"edges": [[0, -1]]}, "edges has -1, and the 60 nodes"),
        ({"edges": [[0.5, 1.0]]}, "edges must be whole numbers"),
        ({"edges": [0, 1]}, r"edges must be node numbers \(m, 2\)"),
        ({"labels": np.zeros(59, int)}, r"labels must be whole numbers \(60,\)"),
        ({"labels": np.zeros(60, int)}, "labels must be of two classes or more"),
        ({"labels": np.full(60, -2)}, "labels must be classes 0, 1, ..., or -1"),
        ({"labels": np.r_[-1, np.ones(59, int)], "test": [0]}, "node 0 of test has no label"),
        ({"test": [7], "train": [7]}, "node 7 is in train and in test"),
        ({"test": [7, 7]}, "node 7 is in test and in test"),
        ({"train": []}, "train must be one node or more"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_file_and_array(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    if "test" in changes and "train" not in changes and changes["test"] is not None:
        changes |= {"train": [20], "validation": [30]}
    path = _write(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as raised:
        graph.load(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "graph.npz"
    np.savez(path, features=np.array([{}], object), **_without_features())
    with pytest.raises(UserError, match=r"is no \.npz of arrays of numbers"):
        graph.load(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match=r"is no \.npz of arrays of numbers"):
        graph.load(path)
    with pytest.raises(UserError, match=f"no file {tmp_path}"):
        graph.load(tmp_path / "none.npz")


def _without_features() -> dict[str, np.ndarray]:
    return {k: v for k, v in graph_support.arrays().items() if k != "features"}


def test_held_out_nodes_are_nowhere_in_the_smaller_graph() -> None:
    whole = graph_support.small()
    seen, unseen = whole.hold_out(0.2, seed=1)
    assert (len(unseen), len(seen)) == (6, 54)
    assert set(unseen.tolist()) <= set(whole.test.tolist())
    kept = [node for node in range(60) if node not in unseen.tolist()]
    torch.testing.assert_close(seen.features, whole.features[kept])
    back = torch.tensor(kept)
    expected = {tuple(e) for e in whole.edges.tolist() if not {*e} & {*unseen.tolist()}}
    assert {tuple(e) for e in back[seen.edges].tolist()} == expected
    for name in graph.PARTS:
        mine = [n for n in getattr(whole, name).tolist() if n not in unseen.tolist()]
        assert back[getattr(seen, name)].tolist() == mine
        part = getattr(seen, name)
        torch.testing.assert_close(seen.labels[part], whole.labels[torch.tensor(mine)])


def test_another_seed_holds_other_nodes_out() -> None:
    whole = graph_support.small()
    first, again, other = (whole.hold_out(seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("share", [0, 1, -0.5, 0.001])
def test_a_share_that_holds_none_or_all_out_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        graph_support.small().hold_out(share)


def test_unit_rows_sum_to_one_and_a_row_of_zeros_stays() -> None:
    arrays = graph_support.arrays()
    arrays["features"] = np.abs(arrays["features"])
    arrays["features"][3] = 0
    sums = graph.make(**arrays).with_unit_rows().features.sum(1)
    assert sums[3] == 0
    torch.testing.assert_close(sums[4:], torch.ones(56))


@pytest.mark.skipif(not CORA.is_file(), reason=f"no {CORA}")
def test_cora_has_its_published_size() -> None:
    cora = graph.load(CORA)
    assert (len(cora), cora.width, cora.classes, len(cora.edges)) == (2708, 1433, 7, 5278)
    assert [len(getattr(cora, name)) for name in graph.PARTS] == [140, 500, 1000]
    assert torch.bincount(cora.labels[cora.train]).tolist() == [20] * 7
