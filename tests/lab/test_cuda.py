"""`lab.cuda.run`: results show what each line asked of memory, faults name the learner's line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanopd_lab import lab
from nanopd_lab.kernels import KernelArgumentError
from nanopd_lab.lab import Session, SignatureError, Status
from nanopd_lab.lab.cuda import CudaError
from tests.lab.wrong_versions.cuda import RIGHT

COPY = """
__global__ void copy(const float* x, float* y, int stride) {
    const int i = threadIdx.x;
    y[i] = x[i * stride];
}
"""
X = np.arange(1024, dtype=np.float32)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_a_result_shows_the_line_and_its_sectors(stride: int, sectors: int) -> None:
    result = lab.cuda.run(COPY, 1, 32, [X, lab.cuda.empty(32), stride])
    assert np.array_equal(result.outputs[1], X[: 32 * stride : stride])
    (read,) = [access for access in result.accesses if access.kind == "read"]
    assert len(read.sectors) == sectors
    assert f"y[i] = x[i * stride];  global read   1              {sectors}.0" in str(result)
    assert "y[i] = x[i * stride];" in result._repr_html_()
    assert f"{32 * (sectors + 4)} bytes moved for 256 asked for" in result.summary.replace(",", "")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (COPY.replace("x[i * stride]", "x[i * stride + 1000]"), "out-of-bounds read at line 4: y[i] = x[i"),
        (COPY.replace("y[i] =", "y[0] ="), "race at line 4: y[0] = x[i * stride];\n    thread 1 of block 0"),
        (COPY.replace("y[i] =", "y[i] +="), "uninitialised read at line 4"),
        (COPY.replace("threadIdx.x;", "threadIdx.x; if (i) __syncthreads();"), "block deadlock at line 3"),
        (COPY.replace("y[i] =", "while (stride) {} y[i] ="), "too many steps at line 4"),
        (COPY.replace("x[i *", "z[i *"), "does not compile\nline 4: y[i] = z[i * stride];\n    ‘z’ was not"),
    ],
)
def test_a_fault_names_the_learners_line(source: str, words: str) -> None:
    with pytest.raises(CudaError) as caught:
        lab.cuda.run(source, 1, 32, [X, lab.cuda.empty(32), 1], device="emulator", max_steps=100_000)
    assert words.replace("‘", "'") in str(caught.value).replace("‘", "'")
    assert len(caught.value._render_traceback_()) == 1
    if "compile" not in words:
        shown = lab.cuda.run(
            source, 1, 32, [X, lab.cuda.empty(32), 1], device="emulator", check=False, max_steps=100_000
        )
        assert words.splitlines()[0] in str(shown)
        assert "FAIL" in shown._repr_html_()


def test_a_kernel_is_found_by_itself_or_by_name() -> None:
    two = (
        COPY
        + "// __global__ void not_this() {}\n__global__ void __launch_bounds__(32) one(float* y) { *y = 1; }"
    )
    with pytest.raises(KernelArgumentError, match=r"has 2 __global__ functions \(copy, one\); name one"):
        lab.cuda.run(two, 1, 1, [lab.cuda.empty(1)])
    assert lab.cuda.run(two, 1, 1, [lab.cuda.empty(1)], kernel="one").outputs[0][0] == 1


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(mode="learner", folder=tmp_path / "kept")


def test_a_cuda_source_is_handed_in_kept_and_brought_back(session: Session) -> None:
    right = RIGHT["cuda.group_sum"][0]
    assert session.exercise("cuda.group_sum", str(right)) == right
    assert session.check("cuda.group_sum").status is Status.PASS
    assert session.use("cuda.group_sum") == right
    assert "cuda.group_sum" in session.save()
    again = Session("learner", session.folder)
    assert again.load() == "PASS  cuda.group_sum"
    assert again.use("cuda.group_sum") == right
    with pytest.raises(SignatureError, match="a text of CUDA"):
        session.exercise("cuda.group_sum", lambda x: x)
    shown = session.solution("cuda.group_sum")
    assert str(shown).startswith("# cuda/warp.h, line ")
    assert "__shfl_xor_sync" in str(shown)
    assert "highlight" in shown._repr_html_()
    assert (
        Session("reference").exercise("cuda.group_sum", str(right)) == session.solution("cuda.group_sum").text
    )


def test_without_a_compiler_a_check_says_what_to_install(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanopd_lab.lab.cuda.find_compiler", lambda: None)
    session.exercise("cuda.join", '\n#error "your turn"\n')
    assert session.check("cuda.join").status is Status.TODO
    session.exercise("cuda.join", str(RIGHT["cuda.join"][0]))
    report = session.check("cuda.join")
    assert report.status is Status.UNCHECKED
    assert "Install g++" in str(report)
    assert session.use("cuda.join") == session.solution("cuda.join").text
    result = lab.cuda.run("__global__ void f(float* y) { *y = 1; }", 1, 1, [lab.cuda.empty(1)])
    assert "not run" in str(result)
    assert "apt install g++" in result._repr_html_()
