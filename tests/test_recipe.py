"""Recipes: strict schema, overrides, messages in terms of the file's keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from maskft.errors import RecipeError
from maskft.methods import (
    FullMethod,
    HiraMethod,
    LoraMethod,
    ProjectorMethod,
    UniLoraMethod,
)
from maskft.recipe import EasyVqaData, FilesData, MaskMethod, Recipe, load_recipe, method_settings
from maskft.tuner import MaskConfig

ROOT = Path(__file__).parents[1]
SHIPPED = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if p.parent.name != "distributed"]
DATA = "data: {kind: easy-vqa}\n"


@pytest.fixture
def load(tmp_path: Path):
    def _load(text: str, overrides: Sequence[str] = ()) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return _load


@pytest.fixture
def message(load):
    def _message(text: str, overrides: Sequence[str] = ()) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text, overrides)
        return str(caught.value)

    return _message


TRAINING = ("memory", "relative_step", "fixed", "train_projector", "projector_learning_rate")
"""Keys of the method that say how it is trained, and not what the adapter is."""


class TestDefaults:
    def test_data_is_all_that_is_needed(self, load) -> None:
        recipe = load(DATA)
        assert recipe.model.base == "embedded"
        assert isinstance(recipe.method, MaskMethod)
        assert recipe.data == EasyVqaData(kind="easy-vqa")
        assert recipe.training == {}

    def test_method_has_the_defaults_of_the_adapter(self, load) -> None:
        config, plain = load(DATA).method.config(), MaskConfig(gate="soft")
        assert config.to_dict() == plain.to_dict()

    def test_method_name_defaults_to_mask(self, load) -> None:
        method = load(DATA + "method: {gate: soft, init_gate: 0.9}").method
        assert (method.name, method.gate, method.init_gate) == ("mask", "soft", 0.9)

    def test_every_method_field_reaches_the_adapter(self, load) -> None:
        fields = {
            "gate": "topk",
            "temperature": 2.0,
            "init_gate": 0.7,
            "straight_through": True,
            "keep_ratio": 0.5,
            "ranking": "global",
            "score_layout": "block",
            "rank": 2,
            "block_size": 4,
            "score_dtype": "bfloat16",
            "scope": ["vision"],
            "modules": "mlp",
            "layers": "0-1",
            "target_modules": ["a", "b"],
            "init_weights": "random",
            "storage": "bits",
        }
        assert set(fields) | {"name", *TRAINING} == set(MaskMethod.model_fields)
        config = load(DATA, [f"method.{key}={value}" for key, value in fields.items()]).method.config()
        assert {**{key: getattr(config, key) for key in fields}, "target_modules": ["a", "b"]} == fields
        assert config.target_modules == {"a", "b"}

    def test_projector_method(self, load) -> None:
        assert load(DATA + "method: {name: projector}").method == ProjectorMethod(name="projector")

    def test_files(self, load) -> None:
        data = load("data: {kind: files, train: a.json, split: {validation: 0.1}}").data
        assert isinstance(data, FilesData)
        assert (data.train.name, data.test, data.split.validation, data.split.test) == ("a.json", None, 0.1, 0.0)


class TestRoundTrip:
    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_shipped_recipes(self, path: Path, load) -> None:
        recipe = load_recipe(path)
        assert load(recipe.to_yaml()) == recipe

    def test_there_are_shipped_recipes(self) -> None:
        assert {"quickstart.yaml", "stage1-projector.yaml"} <= {path.name for path in SHIPPED}

    @pytest.mark.parametrize(
        "text",
        [
            DATA,
            DATA + "method: {gate: topk, layers: [0, 3], target_modules: [q_proj]}",
            DATA + "method: {init_weights: false, layers: 0-3}",
            DATA + "method: {init_weights: random, gate: topk}",
            DATA + "method: {name: projector}",
            DATA + "method: {name: lora, variant: dora, rank: 4, alpha: 8, scope: [language], train_projector: true}",
            DATA + "method: {name: unilora, vector_length: 1000, target_modules: [q_proj]}",
            DATA + "method: {name: hira, dropout: 0.1, layers: 0-3}",
            DATA + "method: {name: full, modules: attn, layers: [0, 1]}",
            DATA + "method: {fixed: random, keep_ratio: 0.5}",
            DATA + "method: {fixed: magnitude}",
            "data: {kind: files, train: a b/ü.json, image_root: /x, format: llava, split: {test: 0.25, seed: 3}}",
            DATA + "training: {run_name: '1e3', a: '1.0', b: 'true', c: 'null', d: '2024-01-01', e: 'off', f: '0x1'}",
            DATA + "training: {learning_rate: 1e-3, report_to: [], nested: {a: 1}, none: null, flag: 'no'}",
        ],
    )
    def test_to_yaml_reloads_equal(self, text: str, load) -> None:
        recipe = load(text)
        again = load(recipe.to_yaml())
        assert again == recipe
        assert again.to_yaml() == recipe.to_yaml()


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("1e-3", 1e-3), ("1E5", 1e5), ("-2e+3", -2e3), ("1.5e-4", 1.5e-4), ("1.0e-3", 1e-3), ("+1e2", 100.0)],
    )
    def test_exponents_are_numbers(self, text: str, expected: float, load) -> None:
        for value in (
            load(DATA + f"training: {{learning_rate: {text}}}").training["learning_rate"],
            load(DATA, [f"training.learning_rate={text}"]).training["learning_rate"],
        ):
            assert isinstance(value, float)
            assert value == expected

    @pytest.mark.parametrize("text", ["1e", "e3", "1e3x", "a1e3"])
    def test_words_stay_words(self, text: str, load) -> None:
        assert load(DATA + f"training: {{run_name: {text}}}").training["run_name"] == text

    def test_safe_yaml_elsewhere_is_untouched(self, load) -> None:
        import yaml

        assert yaml.safe_load("1e-3") == "1e-3"
        assert load(DATA).method.temperature == 1.0


class TestOverrides:
    def test_values_are_yaml(self, load) -> None:
        overrides = [
            "model.dtype=float32",
            "method.gate=soft",
            "method.init_gate=0.9",
            "method.scope=[language, vision]",
            "method.straight_through=true",
            "data.limits.train=24",
            "training.max_steps=50",
            "training.run_name=a=b",
            "training.none=",
            "evaluation.batch_size=4",
        ]
        recipe = load(DATA + "method: {gate: topk, modules: mlp}\n", overrides)
        assert recipe.model.dtype == "float32"
        assert isinstance(recipe.method, MaskMethod)
        assert (recipe.method.gate, recipe.method.init_gate, recipe.method.modules) == ("soft", 0.9, "mlp")
        assert recipe.method.scope == ["language", "vision"]
        assert recipe.method.straight_through is True
        assert recipe.data.limits == {"train": 24}
        assert recipe.training == {"max_steps": 50, "run_name": "a=b", "none": None}
        assert recipe.evaluation.batch_size == 4

    def test_the_last_one_counts(self, load) -> None:
        assert load(DATA, ["training.seed=1", "training.seed=2"]).training == {"seed": 2}

    @pytest.mark.parametrize("override", ["max_steps", "", "=1", "training.=1", ".seed=1", "training..seed=1"])
    def test_syntax_errors(self, override: str, message) -> None:
        assert f"'{override}' is not an override; write key=value" in message(DATA, [override])

    @pytest.mark.parametrize("text", ["[1", "a: b: c", "!!timestamp 2024-99-99"])
    def test_value_that_is_not_yaml(self, text: str, message) -> None:
        assert f"the value of 'training.a={text}' is not valid YAML" in message(DATA, [f"training.a={text}"])

    def test_path_through_a_value(self, message) -> None:
        assert "'model.base.name=x': 'base' holds a value, not a section" in message(
            DATA + "model: {base: embedded}", ["model.base.name=x"]
        )

    def test_unknown_key(self, message) -> None:
        assert "unknown key 'method.temprature'. Did you mean 'temperature'?" in message(DATA, ["method.temprature=1"])


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("text", "key", "meant"),
        [
            (DATA + "modle: {}", "modle", "model"),
            (DATA + "model: {dtpe: float32}", "model.dtpe", "dtype"),
            (DATA + "method: {name: mask, init_gat: 0.9}", "method.init_gat", "init_gate"),
            (DATA + "method: {init_gat: 0.9}", "method.init_gat", "init_gate"),
            (DATA + "method: {name: projector, nam: 1}", "method.nam", "name"),
            ("data: {kind: easy-vqa, limit: {train: 3}}", "data.limit", "limits"),
            ("data: {kind: files, train: a, imag_root: b}", "data.imag_root", "image_root"),
            ("data: {kind: files, train: a, split: {validaton: 0.1}}", "data.split.validaton", "validation"),
            (DATA + "evaluation: {batch: 4}", "evaluation.batch", "batch_size"),
        ],
    )
    def test_are_named_with_the_nearest_valid_one(self, text: str, key: str, meant: str, message) -> None:
        problem = message(text)
        assert f"unknown key '{key}'. Did you mean '{meant}'?" in problem
        assert "Allowed there: " in problem

    def test_mask_fields_are_not_offered_for_the_projector(self, message) -> None:
        problem = message(DATA + "method: {name: projector, gate: soft}")
        assert "unknown key 'method.gate'." in problem
        assert problem.endswith("Allowed there: name.")

    def test_all_are_gathered(self, message) -> None:
        problem = message(DATA + "model: {dtpe: 1}\nevaluation: {batch: 4}\nextra: 1")
        assert problem.count("unknown key") == 3


class TestWrongValues:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (DATA + "model: {dtype: float8}", "'model.dtype' is 'float8'"),
            (DATA + "method: {gate: hard}", "'method.gate' is 'hard'"),
            (DATA + "method: {temperature: warm}", "'method.temperature' is 'warm'"),
            (DATA + "method: {scope: [speech]}", "'method.scope.0' is 'speech'"),
            (DATA + "evaluation: {batch_size: 0}", "'evaluation.batch_size' is 0"),
            (DATA + "training: 3", "'training' is 3"),
            (DATA + "model: embedded", "'model' is 'embedded'"),
            ("data: {kind: easy-vqa, part: photos}", "'data.part' is 'photos'"),
            ("data: {kind: easy-vqa, limits: {train: 0}}", "'data.limits.train' is 0"),
            ("data: {kind: files, train: a, split: {test: 1.0}}", "'data.split.test' is 1.0"),
            ("data: {kind: files, train: a, format: csv}", "'data.format' is 'csv'"),
            ("data: {kind: files}", "'data.train' is missing"),
            (DATA + "method: {temperature: 0}", "temperature is 0.0; it must be above 0"),
            (DATA + "method: {init_gate: 1.0}", "init_gate is 1.0"),
            (DATA + "method: {keep_ratio: 0}", "keep_ratio is 0.0"),
            (DATA + "method: {layers: 3}", "'method.layers' is 3"),
            (DATA + "method: {init_weights: zeros}", "'method.init_weights' is 'zeros'"),
            (DATA + "method: soft", "'method' is 'soft'"),
            ("data: pictures", "'data' is 'pictures'"),
        ],
    )
    def test_are_named(self, text: str, expected: str, message) -> None:
        assert expected in message(text)

    def test_missing_data_section(self, message) -> None:
        assert "'data' is missing" in message("model: {base: embedded}")

    def test_missing_kind(self, message) -> None:
        assert "'data.kind' is missing; it must be one of 'easy-vqa', 'files'" in message("data: {part: vqa}")

    def test_wrong_kind(self, message) -> None:
        assert "'data.kind' is easy_vqa; it must be one of 'easy-vqa', 'files'" in message("data: {kind: easy_vqa}")

    def test_wrong_name(self, message) -> None:
        assert "'method.name' is loar; it must be one of 'mask', 'lora', 'unilora', 'hira', 'full', 'projector'" in (
            message(DATA + "method: {name: loar}")
        )

    def test_file_is_named(self, message, tmp_path: Path) -> None:
        assert str(tmp_path / "recipe.yaml") in message("model: {base: embedded}")


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
            load_recipe(tmp_path / "none.yaml")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            load_recipe(tmp_path)

    @pytest.mark.parametrize(
        "text", ["data: [1", "a: b: c", "a: !!timestamp 2024-99-99", "\tdata: x", "!!python/object:os.system {}"]
    )
    def test_invalid_yaml(self, text: str, message) -> None:
        assert "is not valid YAML" in message(text)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(b"\xff\xfe\x00data")
        with pytest.raises(RecipeError, match="is not valid YAML"):
            load_recipe(path)

    @pytest.mark.parametrize("text", ["", "- a\n- b", "text", "3"])
    def test_no_mapping(self, text: str, message) -> None:
        assert "must hold a mapping with the keys model, method, data, training, evaluation" in message(text)


class TestMethods:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{name: lora}", LoraMethod(name="lora", rank=16, alpha=32, variant="lora")),
            ("{name: unilora}", UniLoraMethod(name="unilora", rank=4, vector_length=524288)),
            ("{name: hira}", HiraMethod(name="hira", rank=16, dropout=0.0)),
            ("{name: full}", FullMethod(name="full", modules="all")),
        ],
    )
    def test_need_no_more_than_their_name(self, load, text: str, expected: object) -> None:
        assert load(DATA + f"method: {text}").method == expected

    @pytest.mark.parametrize(("fixed", "start"), [("random", "random"), ("magnitude", True)])
    def test_a_fixed_mask_is_hard(self, load, fixed: str, start: object) -> None:
        config = load(DATA + f"method: {{fixed: {fixed}, keep_ratio: 0.7}}").method.config()
        assert (config.gate, config.init_weights, config.keep_ratio) == ("topk", start, 0.7)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{name: lora, rnk: 4}", "unknown key 'method.rnk'. Did you mean 'rank'?"),
            ("{name: hira, alpha: 4}", "unknown key 'method.alpha'."),
            ("{name: full, rank: 4}", "unknown key 'method.rank'."),
            ("{name: lora, rank: 0}", "'method.rank' is 0: Input should be greater than 0"),
            ("{name: lora, alpha: 0}", "'method.alpha' is 0"),
            ("{name: lora, dropout: 1.0}", "'method.dropout' is 1.0"),
            ("{name: lora, variant: qlora}", "'method.variant' is 'qlora'"),
            ("{name: lora, modules: all}", "'method.modules' is 'all'"),
            ("{name: unilora, vector_length: 0}", "'method.vector_length' is 0"),
            ("{name: lora, target_modules: '(a+)+'}", "target_modules repeats a group"),
            ("{name: full, target_modules: '('}", "target_modules is no regular expression"),
            (
                "{name: lora, train_projector: true}",
                "method.train_projector is true, but method.scope has",
            ),
            ("{train_projector: true}", "method.train_projector is true, but method.scope has"),
            ("{fixed: random, gate: soft}", "but method.gate is 'soft'"),
            ("{fixed: random, init_weights: true}", "method.init_weights True. Leave those two out"),
            ("{fixed: some}", "'method.fixed' is 'some'"),
            ("{fixed: random, scope: [language], train_projector: true}", "method.fixed trains nothing"),
            ("{name: full, layers: 0-3}", "method.modules is 'all', which trains whole parts"),
            ("{name: lora, projector_learning_rate: 0}", "'method.projector_learning_rate' is 0"),
        ],
    )
    def test_refuse(self, message, text: str, expected: str) -> None:
        assert expected in message(DATA + f"method: {text}")

    @pytest.mark.parametrize("name", ["unilora", "hira", "full", "projector"])
    def test_quantised_bases_are_for_masks_and_lora(self, load, message, name: str) -> None:
        quantised = DATA + "model: {quantization: nf4}\n"
        assert load(quantised + "method: {name: lora}").model.quantization == "nf4"
        assert f"train '{name}' with none" in message(quantised + f"method: {{name: {name}}}")


class TestTrainingOfTheMethod:
    @pytest.mark.parametrize("memory", ["balanced", "tight"])
    def test_low_memory_modes_keep_scores_in_bf16(self, load, memory: str) -> None:
        assert load(DATA, [f"method.memory={memory}"]).method.config().score_dtype == "bfloat16"

    def test_fast_leaves_the_dtype_to_its_key(self, load) -> None:
        assert load(DATA, ["method.score_dtype=bfloat16"]).method.config().score_dtype == "bfloat16"

    @pytest.mark.parametrize(
        ("settings", "lr"),
        [
            (["method.gate=soft", "method.init_gate=0.98", "method.temperature=1"], 0.1),
            (["method.gate=soft", "method.init_gate=0.9", "method.temperature=2"], 0.04),
            (["method.gate=soft", "method.init_gate=0.9", "method.straight_through=true"], 0.02),
            (["method.gate=normalized", "method.init_gate=0.98"], 0.1),
            (["method.gate=centered", "method.temperature=0.5"], 0.002),
        ],
    )
    def test_relative_step_sets_the_learning_rate(self, load, settings: list[str], lr: float) -> None:
        recipe = load(DATA, [*settings, "method.relative_step=0.002"])
        assert method_settings(recipe) == {"learning_rate": pytest.approx(lr)}

    @pytest.mark.parametrize(("gate", "lr"), [("soft", 0.1), ("normalized", 0.1), ("centered", 0.004), ("topk", 0.1)])
    def test_without_it_each_gate_learns_at_a_rate_of_its_own(self, load, gate: str, lr: float) -> None:
        assert method_settings(load(DATA, [f"method.gate={gate}"])) == {"learning_rate": pytest.approx(lr)}

    def test_other_methods_keep_theirs(self, load) -> None:
        assert method_settings(load(DATA + "method: {name: projector}")) == {}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["method.relative_step=0.1", "training.learning_rate=1"], "both set the learning rate"),
            (["method.relative_step=0.1", "method.gate=topk"], "no meaning for the gate 'topk'"),
            (["method.relative_step=0.1", "method.gate=threshold"], "no meaning for the gate 'threshold'"),
            (["method.memory=tight", "training.optim=sgd"], "training.optim is 'sgd'. Give one of them"),
        ],
    )
    def test_contradictions_are_refused(self, load, settings: list[str], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            method_settings(load(DATA, settings))


def test_recipes_cannot_be_changed(load) -> None:
    recipe = load(DATA)
    with pytest.raises(ValueError, match="frozen"):
        recipe.model.base = "other"


def test_the_schema_names_the_gates_and_fields_of_mask_config() -> None:
    from dataclasses import fields
    from typing import get_args

    from maskft.recipe import MaskMethod
    from maskft.tuner.config import GATES, MaskConfig

    assert get_args(MaskMethod.model_fields["gate"].annotation) == tuple(GATES)
    assert set(MaskMethod.model_fields) - {"name", *TRAINING} <= {field.name for field in fields(MaskConfig)}
    assert MaskMethod(gate="centered").config().to_dict() == MaskConfig().to_dict()
