"""The scripts in recipes/launch: what they would run is read by accelerate and by the command line."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
from accelerate.commands.launch import launch_command_parser

from maskft.cli.app import app
from maskft.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RECIPE = "recipes/quickstart.yaml"
OVERRIDES = ("training.max_steps=3", "data.limits={train: 8}")


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call a script from the repository's folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def printed(script: str, *arguments: str, **environment: str) -> list[str]:
    """The command a script would run, without the interpreter and its -m."""
    done = run(script, *arguments, DRY_RUN="1", PYTHON="some-python", **environment)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["some-python", "-m"]
    return words[2:]


def check_train(words: list[str]) -> None:
    """Words of `maskft train` as the command line reads them."""
    assert words[0] == "train"
    commands: Any = typer.main.get_command(app)
    read = commands.commands["train"].make_context("train", words[1:]).params
    assert str(read["recipe"]) == RECIPE
    assert read["overrides"] == list(OVERRIDES)
    assert str(read["output"]) == "runs/here"
    load_recipe(ROOT / read["recipe"], read["overrides"])


GIVEN = (RECIPE, *OVERRIDES, "--output", "runs/here")


def test_there_are_scripts() -> None:
    assert {path.stem for path in SCRIPTS} >= {"one-gpu", "eight-gpus-ddp", "eight-gpus-fsdp2", "eight-gpus-zero3"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_bash_reads_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK)


def test_one_gpu() -> None:
    words = printed("one-gpu.sh", *GIVEN)
    assert words[0] == "maskft.cli"
    check_train(words[1:])


@pytest.mark.parametrize(
    ("script", "environment", "processes", "machines"),
    [
        ("eight-gpus-ddp.sh", {}, 8, None),
        ("eight-gpus-fsdp2.sh", {}, 8, None),
        ("eight-gpus-zero3.sh", {}, 8, None),
        ("slurm.sh", {}, 16, 2),
        ("slurm.sh", {"SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "4", "KIND": "ddp"}, 16, 4),
    ],
)
def test_accelerate_reads_it(script: str, environment: dict[str, str], processes: int, machines: int | None) -> None:
    module, *words = printed(script, *GIVEN, **environment)
    assert module == "accelerate.commands.launch"
    read = launch_command_parser().parse_args(words)
    assert (read.num_processes, read.num_machines) == (processes, machines)
    assert (ROOT / read.config_file).is_file()
    assert (read.module, read.training_script) == (True, "maskft.cli")
    check_train(read.training_script_args)


def test_slurm_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    """With stand-ins for Slurm's programs and for the interpreter, which repeat what they are given."""
    programs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "some-python": 'printf "%s\\n" "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    places = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run("slurm.sh", *GIVEN, PATH=places, PYTHON="some-python", SLURM_JOB_NODELIST="node[7-8]")
    assert done.returncode == 0, done.stderr
    dash_m, module, *words = done.stdout.splitlines()
    assert (dash_m, module) == ("-m", "accelerate.commands.launch")
    read = launch_command_parser().parse_args(words)
    assert (read.machine_rank, read.num_machines, read.main_process_ip) == (1, 2, "node7")
    check_train(read.training_script_args)


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "expected"),
    [
        ("one-gpu.sh", (), {}, "usage: launch.sh GPUS KIND RECIPE"),
        ("eight-gpus-ddp.sh", ("nowhere.yaml",), {}, "there is no recipe nowhere.yaml"),
        ("launch.sh", ("8", "fsdp3", RECIPE), {}, "KIND is ddp, fsdp2, zero3 or none"),
        ("slurm.sh", (), {}, "usage: sbatch slurm.sh RECIPE"),
        ("slurm.sh", (RECIPE,), {"KIND": "fsdp3"}, "there is no recipes/distributed/fsdp3.yaml"),
        ("slurm.sh", ("nowhere.yaml",), {}, "there is no nowhere.yaml"),
    ],
)
def test_mistakes(script: str, arguments: tuple[str, ...], environment: dict[str, str], expected: str) -> None:
    done = run(script, *arguments, **environment)
    assert done.returncode == 2
    assert expected in done.stderr
