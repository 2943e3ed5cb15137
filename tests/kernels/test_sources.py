"""Pieces of `cuda/`, and kernels with another text in a piece's place."""

from __future__ import annotations

import copy

import pytest
import torch

from nanopd_lab.kernels import KernelCompileError, emulated, reference
from nanopd_lab.kernels.decode_launches import FILES, RUNGS
from nanopd_lab.kernels.problems import Problem, make_problem
from nanopd_lab.kernels.sources import YOURS, definition, replaced, with_headers
from nanopd_lab.resources import cuda_dir

PIECES = [("mapping.h", "place_of"), ("warp.h", "group_sum"), ("join.h", "join"), ("join.h", "Part")]
PIECES += [("paged.h", "key_row"), ("decode_a_naive.cu", "paged_decode_naive"), ("split_kv.h", "finish_item")]


def decode(rung: str, problem: Problem, headers: dict[str, str]) -> torch.Tensor:
    out, _ = emulated.paged_decode(
        rung,
        *problem.decode_args,
        headers=headers,
        instrument=True,
    )
    return out


@pytest.mark.parametrize(("file", "name"), PIECES)
def test_a_definition_is_whole_and_knows_where_it_stands(file: str, name: str) -> None:
    found = definition(file, name)
    lines = (cuda_dir() / file).read_text().splitlines(keepends=True)
    assert "".join(lines[found.line - 1 :]).startswith(found)
    assert found.count("{") == found.count("}") > 0
    assert name in found
    assert name == "Part" or found.startswith("//")
    assert copy.deepcopy(found).file == file


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"cuda/join.h defines no splice"):
        definition("join.h", "splice")


@pytest.mark.parametrize("rung", RUNGS)
def test_the_packages_own_text_put_in_its_own_place_changes_nothing(rung: str) -> None:
    problem = make_problem(torch.bfloat16, 64, 16, 3, 1, (40, 7))
    for file, name in PIECES[:3]:
        own = definition(file, name)
        out = decode(rung, problem, replaced(own, own))
        assert reference.relative_error(out, problem.wanted()) <= reference.TOLERANCES[torch.bfloat16]


def test_another_text_really_is_compiled_into_the_kernel_and_errors_name_its_line() -> None:
    problem = make_problem(torch.float32, 64, 16, 3, 1, (40, 7))
    own = definition("warp.h", "group_sum")
    nothing = replaced(own, "template <int WIDTH> DEVICE float group_sum(float x) { return 0; }")
    for rung in ("online", "gqa", "split"):  # all scores 0: the mean of V
        out = decode(rung, problem, nothing)
        values = problem.kv_layer[problem.block_tables[0], 1].permute(1, 0, 2, 3).reshape(1, -1, 64)[:, :40]
        assert torch.allclose(out[0], values.mean(1).expand(3, -1), atol=1e-5)
    with pytest.raises(KernelCompileError, match=rf"{YOURS}:2:"):
        decode("split", problem, replaced(own, "\nthis is no C++"))


def test_lines_keep_their_names_and_numbers() -> None:
    own = definition("warp.h", "group_sum")
    text = with_headers((cuda_dir() / FILES["split"]).read_text(), replaced(own, own), FILES["split"])
    place, label, found = 0, FILES["split"], 0
    for line in text.splitlines():
        if line.startswith("#line"):
            _, number, label = line.split()
            place, label = int(number) - 1, label.strip('"')
            continue
        place += 1
        if label in ("warp.h", "split_kv.h", "decode_d_split.cu") and line.strip():
            assert (cuda_dir() / label).read_text().splitlines()[place - 1] == line
            found += 1
    assert found > 200
