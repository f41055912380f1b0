"""Command lines: what all commands share, a configuration with its overrides, and mistakes reported
in one line.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.command import ConfigParser, data_config
from dsct_jax.__main__ import main
from dsct_jax.cli import progress, run_command, try_output, whole_file
from dsct_jax.commands.parsers import COMMANDS
from dsct_jax.errors import UserError
from dsct_jax.weights.hub import local_path

DEBUG = Path(__file__).parents[2] / "configs/debug.py"


def test_overrides_change_the_data_section_and_the_classes():
    config = data_config(
        DEBUG, ["--config.data.train=7", "--config.data.cache=True", "--config.multi_label=True"]
    )
    assert (config.train, config.val, config.cache, config.multi_label) == ("7", "4", True, True)
    assert config.class_names == ("Anger", "Fear", "Happy", "Sad") and config.buckets == ((80, 80),)


def test_a_command_adds_its_own_flags():
    parser = ConfigParser(None)
    parser.add_argument("-n", type=int, default=24)
    arguments = parser.parse_args([f"--config={DEBUG}", "-n", "3", "--config.data.test=9"])
    assert (arguments.n, arguments.data.test) == (3, "9")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--config"),
        ([f"--config={DEBUG}.yaml"], "no such file"),
        ([f"--config={DEBUG}", "--config.data.trian=3"], "did you mean --config.data.train"),
        ([f"--config={DEBUG}", "--config.data.cache=perhaps"], "config.data.cache"),
        ([f"--config={DEBUG}", "--config.data.source=cocoo"], "config.data.source='cocoo'"),
        ([f"--config={DEBUG}", "extra"], "extra: unexpected argument"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, says, capsys):
    assert run_command(lambda: ConfigParser(None).parse_args(argv) and None) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and says in captured.err
        and captured.err.count("\n") == 1
        and not captured.out
    )


def test_the_home_folder_and_variables_are_expanded_in_fields_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHOTOS", "mine")
    overrides = ["--config.data.data_dir=~/d/$PHOTOS", "--config.data.train=$PHOTOS:~/a.json"]
    config = data_config(DEBUG, overrides)
    (file,) = config.annotation_files("train")
    assert config.root == tmp_path / "d/mine"
    assert (file.path, file.root) == (tmp_path / "a.json", tmp_path / "d/mine/mine")
    arguments = ConfigParser(None).parse_args([f"--config={DEBUG}", "--config.data.data_dir=~"])
    assert arguments.data.root == tmp_path
    assert local_path("~/runs/a") == tmp_path / "runs/a"


def test_the_command_says_where_the_tools_of_data_run(capsys):
    assert main(["--help"]) == 0
    assert "python -m data COMMAND" in capsys.readouterr().out
    assert main(["check"]) == 2
    assert "python -m data COMMAND" in capsys.readouterr().err


def test_status_of_a_command(capsys):
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_command(lambda: 1 // 0)


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def unwritable() -> None:
    Path("/proc/nothing").write_text("")


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (full_disk, "error: No space left on device\n"),
        (unwritable, "error: /proc/nothing: No such file or directory\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(run, line, capsys):
    assert run_command(run) == 2
    assert capsys.readouterr().err == line


def test_a_bug_is_no_matter_of_jax_platforms(monkeypatch):
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(broken)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_devices_that_jax_does_not_have_are_one_line(platform):
    program = (
        "import jax, sys; from dsct_jax.cli import run_command; "
        "sys.exit(run_command(lambda: print(jax.devices('cpu' if jax.devices() else ''))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        pytest.skip(f"this machine has {platform}")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and lines[0].startswith(f"error: JAX_PLATFORMS={platform}: "), done.stderr
    assert "Traceback" not in done.stderr


def test_trying_an_output_leaves_nothing(tmp_path):
    try_output(tmp_path / "a" / "b", folder=True)
    try_output(tmp_path / "a" / "b.json", folder=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"--report=.*: is a folder"):
        try_output(tmp_path, folder=False, flag="--report")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    with whole_file(tmp_path / "x" / "a.txt") as file:
        file.write("first")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "x" / "a.txt") as file:
        file.write(str(1 // 0))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.txt"]
    assert (tmp_path / "x" / "a.txt").read_text() == "first"


def test_the_commands_are_listed(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main([]) == 2
    assert main(["predcit"]) == 2
    assert capsys.readouterr().err == "error: predcit: unknown command; did you mean predict?\n"
    with pytest.raises(SystemExit):
        main(["model-card", "--help"])
    assert "usage: python -m dsct_jax model_card" in capsys.readouterr().out


def test_progress_gives_the_same_things():
    assert list(progress(iter("abc"), total=3)) == ["a", "b", "c"]
