"""--profile: a recording of the steps that were asked for, which tools can read."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from jax.profiler import ProfileData

ROOT = Path(__file__).parents[2]
HALVES = ("PjitFunction(_predict)", "PjitFunction(_finish_whole)")  # of a step


def outermost(spans: list[tuple[float, float]]) -> int:
    """How many of these spans of time lie in no other: a call may be recorded within itself."""
    ends, count = 0.0, 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        count += start >= ends
        ends = max(ends, end)
    return count


def test_the_steps_that_were_asked_for_are_recorded(tmp_path):
    command = [
        sys.executable,
        "train.py",
        "--config=configs/debug.py",
        f"--workdir={tmp_path}",
        "--config.train.steps=6",
        "--profile=3:2",
    ]
    # of two flags, the last counts
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"profile of steps 3 to 4: {tmp_path / 'profile'}" in done.stdout
    (traces,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    (packed,), (planes,) = traces.glob("*.trace.json.gz"), traces.glob("*.xplane.pb")
    shown = json.loads(gzip.decompress(packed.read_bytes()))["traceEvents"]
    recorded = [
        event
        for plane in ProfileData.from_file(str(planes)).planes
        for line in plane.lines
        for event in line.events
    ]
    for half in HALVES:
        assert (
            outermost(
                [
                    (event["ts"], event["ts"] + event["dur"])
                    for event in shown
                    if event.get("name") == half
                ]
            )
            == 2
        )
        assert (
            outermost([(event.start_ns, event.end_ns) for event in recorded if event.name == half])
            == 2
        )
