"""The benchmark of the experts runs, on a CPU."""

import sys

import pytest

from benchmarks import experts


@pytest.mark.parametrize("weights", [[], ["--dense"]])
def test_a_table_of_tiny_experts(
    weights: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experts, "CACHE_BYTES", 1)
    sizes = [
        "--experts",
        "5",
        "--hidden",
        "96",
        "--intermediate",
        "64",
        "--tokens",
        "1",
        "7",
        "--runs",
        "1",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["experts", *sizes, *weights])
    experts.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 experts, 0 MB a layer, 2 layers")
    rows = [line.split("|")[1:3] for line in lines[3:]]
    assert [int(tokens) for tokens, _ in rows] == [1, 7]
    assert float(rows[0][1]) == 4, "one token hits its four"
