"""The throughput bench: every row is measured and told, and torch is asked for only when it is
wanted.
"""

import json

import pytest

from benchmarks.input_pipeline import format_rows, main


def test_the_command_measures_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.input_pipeline.SOURCES", ((60, 80),))
    argv = ["--images=4", "--rounds=1", "--seconds=0.1", "--workers", "0"]
    assert main([*argv, f"--output={tmp_path / 'table'}"]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["what"] for row in rows] == [
        "decode",
        "decode, prepared",
        "augment",
        "pipeline",
        "pipeline, prepared",
    ]
    assert all(row["images_per_s"][0] > 1 for row in rows)
    assert (
        capsys.readouterr().out == (tmp_path / "table.md").read_text() == f"{format_rows(rows)}\n"
    )


def test_the_table_compares_with_torch_at_the_same_workers():
    rows = [
        {"source": "a", "what": "pipeline", "workers": 2, "images_per_s": [30.0, 10.0, 20.0]},
        {"source": "a", "what": "torch DataLoader", "workers": 2, "images_per_s": [8.0]},
        {"source": "a", "what": "data wait", "workers": 2, "share": [0.01, 0.03, 0.02]},
    ]
    lines = format_rows(rows).splitlines()
    assert lines[4] == "| a | pipeline | 2 | 20.0 (10.0 to 30.0) | 2.50x |"
    assert lines[6] == "| a | data wait | 2 | 2.0 % (1.0 to 3.0) |  |"


@pytest.mark.parametrize(
    "wrong", [["--images=2"], ["--rounds=0"], ["--workers", "-1"], ["--rounds=many"]]
)
def test_mistakes(wrong, capsys):
    assert main(wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
