"""Two workers share a study through a PostgreSQL server; one of them is killed half-way."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskft.studies.queue import CELL, storage_at
from tests.studies.made import write_study

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
INITDB = shutil.which("initdb", path=os.pathsep.join([str(BINARIES), os.environ["PATH"]]))
TRIALS = 12

pytestmark = pytest.mark.skipif(
    INITDB is None, reason="PostgreSQL is not installed; on Debian: apt-get install postgresql"
)


@pytest.fixture
def server() -> Iterator[str]:
    """URL of a server of our own, on a socket in a folder that vanishes. PostgreSQL refuses to run as root."""
    assert INITDB is not None
    folder = Path(tempfile.mkdtemp(prefix="maskft-pg-"))
    as_user: list[str] = []
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    data, control = str(folder / "data"), str(Path(INITDB).with_name("pg_ctl"))

    def call(*arguments: str) -> None:
        done = subprocess.run([*as_user, *arguments], capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    try:
        call(INITDB, "-D", data, "-U", "maskft", "-A", "trust", "--no-sync")
        call(control, "-D", data, "-l", str(folder / "log"), "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg://maskft@/postgres?host={folder}"
        finally:
            call(control, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def worker(file: Path, output: Path, url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "maskft.cli", "study", str(file), "--json", "--heartbeat", "1"]
    return subprocess.Popen(
        [*command, "--output", str(output), "--storage", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def in_the_middle(output: Path, after: int) -> bool:
    """Whether a worker has finished so many runs and works on another."""
    jobs, results = (len(list(output.glob(f"trials/*/{name}"))) for name in ("job.json", "result.json"))
    return results >= after and jobs > results


def test_no_trial_is_lost_and_none_runs_twice(server: str, tmp_path: Path) -> None:
    file = write_study(tmp_path, seeds=list(range(TRIALS // 2)), measure={"validation": False})
    killed, survivor = worker(file, tmp_path / "killed", server), worker(file, tmp_path / "survivor", server)
    try:
        deadline = time.monotonic() + 120
        while not in_the_middle(tmp_path / "killed", after=2):
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.kill()
        out, err = survivor.communicate(timeout=120)
    finally:
        for process in (killed, survivor):
            process.kill()
            process.communicate()
    assert survivor.returncode == 0, err.decode()

    with storage_at(server) as storage:
        (study,) = storage.get_all_studies()
        trials = storage.get_all_trials(study._study_id)
    states = Counter(trial.state.name for trial in trials)
    complete = Counter(trial.user_attrs[CELL] for trial in trials if trial.state.name == "COMPLETE")
    assert set(complete.values()) == {1}
    assert len(complete) == TRIALS
    assert set(states) == {"COMPLETE", "FAIL"}  # the killed worker's trial, which another one made up for
    runs = json.loads(out)["runs"]
    assert len({(run["variant"], run["seed"]) for run in runs}) == len(runs) == TRIALS
    assert len(list((tmp_path / "survivor" / "results").glob("*.json"))) == TRIALS
