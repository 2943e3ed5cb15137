"""Traces in the layouts in which they are published."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopd_lab.sim.request_trace import read_trace

SAME = {
    "vidur.csv": "arrived_at,num_prefill_tokens,num_decode_tokens\n10.5,100,7\n12.75,200,8\n",
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.5000000,100,7\n2023-11-16 18:15:48.7500000,200,8\n",
    "azure2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.500000+00:00,100,7\n2024-05-10 00:00:02.750000+00:00,200,8\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,100,7,107,Conversation log\n6,GPT-4,50,0,50,API log\n7.25,GPT-4,200,8,208,API log\n",
    "mooncake.jsonl": '{"timestamp": 500, "input_length": 100, "output_length": 7, "hash_ids": [1]}\n\n'
    '{"timestamp": 2750, "input_length": 200, "output_length": 8, "hash_ids": [1, 2]}\n',
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_requests_in_every_layout(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(SAME[name])
    found = read_trace(tmp_path / name)
    assert [(each.prompt_tokens, each.output_tokens) for each in found] == [(100, 7), (200, 8)]
    assert [each.arrival for each in found] == pytest.approx([0, 2.25], abs=1e-6)


def test_requests_are_put_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n9,1,1\n4,2,2\n")
    assert [(each.arrival, each.prompt_tokens) for each in read_trace(path)] == [(0, 2), (5, 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "trace.csv, line 2: cannot be read: it has a, b; known are: arrived_at"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,2,3\n2,x,3\n", "line 3: .*'x'"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,2\n", "line 2: .*num_decode_tokens is None"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,-2,3\n", "line 2: .*'-2'; it must be a number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,2,3\n", "line 2: .*yesterday"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,2,3\nnan,2,3\n", r"trace\.csv, line 3: .*'nan'"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\ninf,2,3\n", r"trace\.csv, line 2: .*'inf'"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,2,0\n", "holds no request"),
        ("", "holds no request"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trace(path)


def test_a_broken_line_of_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 1, "output_length": 1}\n\n{"timest\n')
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 3: cannot be read"):
        read_trace(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"timestamp": 1, "input_length": 1}', "it has no 'output_length'"),
        ("[1, 2, 3]", "no JSON object"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1, -1]}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 7}', "not iterable"),
    ],
)
def test_a_wrong_row_of_json_is_named(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 1, "output_length": 1}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 2: .*" + words):
        read_trace(path)
