"""Command lines of the data commands: a configuration with its overrides, and mistakes told in one
line.
"""

from pathlib import Path

import pytest

from data.command import ConfigParser, data_config
from dsct_jax.cli import run_command

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


def test_status_of_a_command(capsys):
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_command(lambda: 1 // 0)
