"""Benchmarks on a tiny model: several adapters in one pass, resuming, several processes, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskft.cli import main
from maskft.errors import AdapterError, DataError, ModelError, RunError, UserError
from maskft.evaluation import candidates, run_benchmarks
from maskft.evaluation.benchmarks import BENCHMARKS
from maskft.evaluation.candidates import find_candidates, wearing
from maskft.fingerprint import fingerprint
from maskft.vlm.load import load_model
from maskft.whole import find_projector

from .eval_folder import QUESTIONS, write_eval_folder
from .tiny import tiny_adapter, tiny_base

SETTINGS = ("--dtype", "float32", "--max-new-tokens", "4", "--batch-size", "5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eval_folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, other/ (another base), adapters a/ and b/, and run/ with a recipe beside adapter a."""
    folder = tmp_path_factory.mktemp("models")
    tiny_base(folder / "base")
    tiny_base(folder / "other", seed=5)
    tiny_adapter(folder / "base", folder / "a", seed=1)
    tiny_adapter(folder / "base", folder / "b", seed=2)
    shutil.copytree(folder / "a", folder / "run")
    section = f"{{base: {folder / 'base'}, dtype: float32}}"
    (folder / "run" / "recipe.yaml").write_text(f"model: {section}\ndata: {{kind: easy-vqa}}\n")
    return folder


def call(*arguments: object) -> int:
    """Run `maskft evaluate` in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["maskft", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def whole(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the base and two adapters on all six."""
    output = tmp_path_factory.mktemp("out") / "whole"
    adapters = ("--adapters", f"{models / 'a'},{models / 'b'}")
    assert call(models / "base", *adapters, "--benchmark", "all", "--data", data, "--output", output, *SETTINGS) == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_six_are_answered_and_scored(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert list(results) == ["base", "a", "b"]
    for name, row in results.items():
        assert sorted(row) == sorted(BENCHMARKS)
        for bench, entry in row.items():
            assert 0 <= entry["score"] <= (2000 if bench == "mme" else 100)
            assert entry["details"]
            lines = (whole / bench / "answers" / f"{name}.jsonl").read_text().splitlines()
            assert len(lines) == QUESTIONS[bench]
            assert {json.loads(line)["model_id"] for line in lines} == {name}
    texts = {name: (whole / "pope" / "answers" / f"{name}.jsonl").read_text() for name in results}
    assert len({text.replace(name, "") for name, text in texts.items()}) == 3  # each adapter was in place


def test_an_adapter_answers_alone_as_among_others(whole: Path, models: Path, data: Path, tmp_path: Path) -> None:
    assert call(models / "b", "--benchmark", "mme,textvqa", "--data", data, "--output", tmp_path, *SETTINGS) == 0
    for bench in ("mme", "textvqa"):
        name = Path(bench) / "answers" / "b.jsonl"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    together = json.loads((whole / "results.json").read_text())
    alone = json.loads((tmp_path / "results.json").read_text())
    assert alone == {"b": {bench: together["b"][bench] for bench in ("mme", "textvqa")}}


def test_a_run_answers_as_its_adapter_with_its_recipes_dtype(
    whole: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--benchmark", "pope", "--data", data, "--max-new-tokens", "4", "--batch-size", "5", "--json")
    assert call(models / "run", *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    output = models / "run" / "benchmarks"
    assert printed["output"] == str(output)
    assert printed["answered"] == {"run": {"pope": 12}}
    assert printed["results"] == json.loads((output / "results.json").read_text())
    texts = [
        [json.loads(line)["text"] for line in file.read_text().splitlines()]
        for file in (Path(printed["answers"]["run"]["pope"]), whole / "pope" / "answers" / "a.jsonl")
    ]
    assert texts[0] == texts[1]
    shutil.rmtree(output)


def test_batches_of_mixed_length_and_kind_answer_as_single_questions(
    whole: Path, models: Path, data: Path, tmp_path: Path
) -> None:
    """fp32; the random model's answers hang on every logit. Batches mix questions with and without picture."""
    run_benchmarks.run_benchmarks(
        str(models / "base"), ["all"], data, output=tmp_path, batch_size=1, dtype="float32", max_new_tokens=4
    )
    for bench in BENCHMARKS:
        name = Path(bench) / "answers" / "base.jsonl"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_repeated_call_loads_no_model(
    whole: Path, models: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    (whole / "results.json").unlink()
    monkeypatch.setattr(run_benchmarks, "load_model", None)
    adapters = ("--adapters", models / "a", "--adapters", models / "b")
    assert call(models / "base", *adapters, "--benchmark", "all", "--data", data, "--output", whole, *SETTINGS) == 0
    assert contents(whole) == before
    shown = capsys.readouterr().out
    assert "MME perception, points" in shown
    assert "{base,a,b}.jsonl" in shown
    assert "at most 4 tokens" in shown


def test_results_of_earlier_calls_are_kept(models: Path, data: Path, tmp_path: Path) -> None:
    for bench in ("pope", "gqa"):
        assert call(models / "base", "--benchmark", bench, "--data", data, "--output", tmp_path, *SETTINGS) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())["base"]) == ["pope", "gqa"]


def test_two_processes_end_with_the_files_of_one(whole: Path, models: Path, data: Path, tmp_path: Path) -> None:
    """They start with what interruptions may leave: nothing, part of a batch, part files. They talk through gloo."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "results.json").unlink()
    for file in output.rglob("base.json*"):
        file.unlink()
    for file in output.rglob("a.jsonl"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * 2 // 3])
    for file in output.rglob("b.jsonl"):
        answers = [json.loads(line) for line in file.read_text().splitlines()]
        file.with_name("b.jsonl.part-1").write_text(json.dumps({"batch": 0, "answers": answers[:5]}) + "\n" + "{")
        file.unlink()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "maskft.cli", "evaluate", models / "base", "--adapters", f"{models / 'a'},{models / 'b'}"),
        *("--benchmark", "all", "--data", data, "--output", output, *SETTINGS),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results  ") == 1  # one process reports
    assert contents(output) == contents(whole)


def test_limit_answers_the_first_questions_and_gives_no_score(
    whole: Path, models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--benchmark", "mme", "--data", data, "--output", tmp_path, "--limit", "7", *SETTINGS)
    assert call(models / "base", *arguments) == 0
    answers = (tmp_path / "mme" / "answers" / "base-limit-7.jsonl").read_text()
    assert (
        (whole / "mme" / "answers" / "base.jsonl").read_text().startswith(answers[: answers.rindex('{"question_id"')])
    )
    assert answers.count("\n") == 7
    assert not (tmp_path / "results.json").exists()
    shown = capsys.readouterr().out
    assert "base answered 7 questions of mme" in shown
    assert "no score with --limit" in shown


def test_the_base_is_bare_again_after_each(models: Path) -> None:
    model = load_model(str(models / "base"), dtype="float32")
    before = fingerprint(model.state_dict())
    for candidate in find_candidates(str(models / "base"), [str(models / "a"), str(models / "b")]):
        with wearing(model, candidate) as worn:
            assert (worn is model) == (candidate.folder is None)
        assert fingerprint(model.state_dict()) == before
        assert not [name for name, _ in model.named_modules() if "base_layer" in name]


@pytest.fixture
def projector_run(models: Path, tmp_path: Path) -> Path:
    """A finished stage 1 run: the projector's weights doubled."""
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        f"model: {{base: {models / 'base'}}}\nmethod: {{name: projector}}\ndata: {{kind: easy-vqa}}\n"
    )
    model = load_model(str(models / "base"), dtype="float32")
    state = find_projector(model).state_dict()
    save_file({name: 2 * tensor for name, tensor in state.items()}, folder / "projector.safetensors")
    return folder


def test_a_projector_is_put_in_and_taken_out(models: Path, projector_run: Path) -> None:
    model = load_model(str(models / "base"), dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, candidate = find_candidates(str(models / "base"), [str(projector_run)])
    with wearing(model, candidate) as worn:
        for name, tensor in worn.state_dict().items():
            assert torch.equal(tensor, before[name] * (2 if "projector" in name else 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save_file({"linear_1.weight": torch.zeros(1)}, projector_run / "projector.safetensors")
    with pytest.raises(AdapterError, match="does not fit the base"), wearing(model, candidate):
        pass


def test_names_are_told_apart_by_the_folders_above(models: Path, tmp_path: Path) -> None:
    for above in ("x", "y"):
        shutil.copytree(models / "a", tmp_path / above / "a")
    found = find_candidates(str(models / "base"), [str(tmp_path / above / "a") for above in ("x", "y")])
    assert [candidate.name for candidate in found] == ["base", "x-a", "y-a"]


def test_what_a_name_stands_for(models: Path) -> None:
    names = {
        "embedded": ("embedded", "embedded", None),
        "llava-hf/llava-1.5-7b-hf": ("llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf", None),
        str(models / "base"): ("base", str(models / "base"), None),
        str(models / "a"): ("a", str(models / "base"), models / "a"),
        str(models / "run"): ("run", str(models / "base"), models / "run"),
    }
    for given, (name, base, folder) in names.items():
        found = candidates.find_candidate(given)
        assert (found.name, found.model.base, found.folder) == (name, base, folder)
    assert candidates.find_candidate(str(models / "run")).model.dtype == "float32"


def test_a_hub_id_is_told_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Config:
        _commit_hash = "c0ffee"

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: Config)
    assert candidates.base_identity(candidates.find_candidate("org/name").model) == "org/name@c0ffee"


def test_a_moved_base_can_be_given_with_its_adapter(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "moved")
    shutil.copytree(models / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for recorded in (str(models / "base"), str(tmp_path / "gone" / "base")):
        config["base_model_name_or_path"] = recorded
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        found = find_candidates(str(tmp_path / "moved"), [str(tmp_path / "a")])
        assert found[1].model.base == str(tmp_path / "moved")
    with pytest.raises(ModelError, match="give it as MODEL and the adapter with --adapters"):
        candidates.base_identity(candidates.find_candidate(str(tmp_path / "a")).model)


def broken(models: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(models / "a", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_folders_that_are_no_model_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model './nowhere'.*recipe\.yaml.*adapter_config\.json"):
        candidates.find_candidate("./nowhere")
    with pytest.raises(AdapterError, match="names no base"):
        candidates.find_candidate(str(broken(models, tmp_path / "1", base_model_name_or_path=None)))
    (broken(models, tmp_path / "2") / "adapter_config.json").write_text("[")
    with pytest.raises(AdapterError, match="cannot be read as an adapter's configuration"):
        candidates.find_candidate(str(tmp_path / "2"))
    (tmp_path / "2" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        candidates.find_candidate(str(tmp_path / "2"))
    shutil.copytree(models / "run", tmp_path / "3")
    (tmp_path / "3" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="has not finished"):
        candidates.find_candidate(str(tmp_path / "3"))


def test_adapters_that_do_not_belong_together_are_refused(models: Path, tmp_path: Path, projector_run: Path) -> None:
    other = tiny_adapter(models / "other", tmp_path / "c")
    with pytest.raises(AdapterError, match=r"trained on another base \(.*other\) than .*base"):
        find_candidates(str(models / "base"), [str(other)])
    with pytest.raises(AdapterError, match="is a whole model"):
        find_candidates(str(models / "base"), [str(models / "other")])
    with pytest.raises(UserError, match="given twice"):
        find_candidates(str(models / "a"), [str(models / "b"), str(models / "a")])
    recipe = projector_run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(models / "base"), "org/name"))
    with pytest.raises(AdapterError, match="trained on another base"):
        find_candidates(str(models / "base"), [str(projector_run)])


def test_an_adapter_of_an_unknown_base_is_refused_before_any_question(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base is gone, so only the fingerprint tells."""
    tiny_adapter(models / "other", tmp_path / "c")
    path = tmp_path / "c" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    output = tmp_path / "out"
    arguments = ("--benchmark", "gqa", "--data", data, "--output", output, *SETTINGS)
    assert call(models / "base", "--adapters", tmp_path / "c", *arguments) == 2
    assert "trained on another base" in capsys.readouterr().err
    assert not list(output.rglob("*.jsonl"))


def test_a_resume_with_another_setting_is_refused(
    whole: Path, models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    asked = ("--benchmark", "gqa", "--data", data, "--output", whole, "--max-new-tokens", "4")
    assert call(models / "base", *asked, "--dtype", "bfloat16", "--batch-size", "6") == 2
    message = capsys.readouterr().err
    assert "batch_size: 5 there, 6 now" in message
    assert "dtype: 'float32' there, 'bfloat16' now" in message
    assert "Give another --output, or remove" in message
    tiny_adapter(models / "base", tmp_path / "a", seed=9)
    assert call(models / "base", "--adapters", tmp_path / "a", *asked, "--dtype", "float32", "--batch-size", "5") == 2
    assert "learnt: " in capsys.readouterr().err
    assert contents(whole) == before


def test_missing_images_are_named_before_the_model_is_loaded(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "eval")
    for file in (tmp_path / "eval" / "MME").rglob("*.png"):
        file.unlink()
    monkeypatch.setattr(run_benchmarks, "load_model", None)
    with pytest.raises(DataError, match="14 images of the benchmarks are missing") as error:
        run_benchmarks.run_benchmarks(str(models / "base"), ["mme", "gqa"], tmp_path / "eval", output=tmp_path / "o")
    assert str(error.value).count("mme: ") == 10
    assert "... and 4 more" in str(error.value)
    assert not (tmp_path / "o").exists()


def test_annotations_of_other_questions_are_found_before_the_model_is_loaded(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "eval")
    file = tmp_path / "eval" / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(run_benchmarks, "load_model", None)
    with pytest.raises(DataError, match="do not match the questions of GQA"):
        run_benchmarks.run_benchmarks(str(models / "base"), ["gqa"], tmp_path / "eval", output=tmp_path / "o")


@pytest.mark.parametrize("content", ["{", "[]", '{"base": 3}'])
def test_results_that_are_something_else_are_not_overwritten(
    content: str, models: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json.*Remove it, or give another --output"):
        run_benchmarks.run_benchmarks(str(models / "base"), ["gqa"], data, output=tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_too_little_memory_is_said_so(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> list[str]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run_benchmarks, "generate_answers", full)
    with pytest.raises(RunError, match="out of memory with 16 questions together"):
        run_benchmarks.run_benchmarks(str(models / "base"), ["gqa"], data, output=tmp_path)


def test_a_second_process_on_the_same_output_stops(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = run_benchmarks.generate_answers

    def disturbed(*arguments: object, **settings: object) -> list[str]:
        with (tmp_path / "gqa" / "answers" / "base.jsonl").open("a") as file:
            file.write("\n")
        return generate(*arguments, **settings)

    monkeypatch.setattr(run_benchmarks, "generate_answers", disturbed)
    with pytest.raises(RunError, match="being written by another process"):
        run_benchmarks.run_benchmarks(str(models / "base"), ["gqa"], data, output=tmp_path, max_new_tokens=1)


MISTAKES = {
    "no such benchmark": (("--benchmark", "popee", "--data", "."), "Did you mean 'pope'"),
    "no benchmark": (("--benchmark", ",", "--data", "."), "--benchmark names none"),
    "no data": (("--benchmark", "pope"), "--benchmark needs --data"),
    "no such data": (("--benchmark", "pope", "--data", "nowhere"), "nowhere/pope/llava_pope_test.jsonl"),
    "no such type": (("--benchmark", "pope", "--data", ".", "--dtype", "int8"), "--dtype is 'int8'"),
    "held-out options": (("--benchmark", "pope", "--data", ".", "--split", "test"), "--split can be used only without"),
    "benchmark options": (("--data", ".", "--batch-size", "4"), "--batch-size can be used only with"),
    "no question": (("--benchmark", "pope", "--data", ".", "--limit", "0"), "--limit"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistaken_arguments(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    assert call(models / "base", *arguments) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_default_output_of_a_base_is_below_runs(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(models / "base", "--benchmark", "gqa", "--data", data, *SETTINGS) == 0
    assert (tmp_path / "runs" / "benchmarks" / "base" / "gqa" / "answers" / "base.jsonl").is_file()
