"""Every experiment composes with every budget and is valid; every option of every group is well typed."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from eval.measurements import MEASUREMENTS
from replace.compose import CONF, GROUPS, choices, compose, differences, load_config, normalise, select
from replace.config import Config, ModelConfig
from replace.errors import UserError
from replace.loading import check_model
from replace.validation import selected, validate

SMOLLM2 = check_model(ModelConfig())


@pytest.mark.parametrize("budget", choices("budget"))
@pytest.mark.parametrize("experiment", choices("exp"))
def test_every_experiment_composes_with_every_budget(experiment: str, budget: str) -> None:
    config = compose([f"+exp={experiment}", f"budget={budget}"])
    validate(config, SMOLLM2)
    assert config.experiment == experiment
    assert config.budget.name == budget


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "exp"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in choices(group):
        compose([f"{group}={option}"])


def test_every_set_of_measurements_is_an_option() -> None:
    assert {"quick", "perplexity", "recall", "probes"} <= set(choices("eval"))
    for name in choices("eval"):
        chosen = compose([f"eval={name}"]).eval
        assert chosen.name == name
        assert all(callable(MEASUREMENTS.get(more)) for more in chosen.more)


def test_the_groups_are_those_of_the_readme() -> None:
    groups = "model attention layers data stage budget lora eval logger exp"
    assert set(GROUPS) == set(groups.split())


def test_the_default_is_what_the_issue_asks_for() -> None:
    config = compose(["+exp=infini"])
    attention = config.attention
    assert (attention.name, attention.sinks) == ("infini", 4)
    assert (attention.pairs, attention.pairs_score) == (64, "learned")
    assert (attention.feature_map, attention.write_gate, attention.distance_cap) == ("hedgehog", "token", 512)
    assert attention.window + attention.block <= 128
    assert (config.layers.select, config.layers.k, config.layers.rest) == ("retrieval", 10, "sliding_window")
    assert config.budget.name == "quick"
    assert config.budget.eval.episodes >= 8


def test_the_published_form_has_none_of_the_additions() -> None:
    config = compose(["+exp=infini_paper"])
    attention = config.attention
    assert (attention.local, attention.sinks, attention.pairs, attention.distance_cap) == (
        "segment",
        0,
        0,
        None,
    )
    assert (attention.feature_map, attention.gate, attention.write_gate) == ("elu", "head", "none")
    rates = config.stage
    assert (rates.lr_projection1, rates.lr_projection2, rates.lr_stage3) == (5e-5, 5e-5, 1e-5)


def test_the_controls_differ_from_the_default_in_what_they_control() -> None:
    assert {key for key, *_ in differences(compose(["+exp=infini"]), compose(["+exp=infini_linear"]))} == {
        "experiment",
        "attention.pairs",
        "attention.pairs_recent",  # of no pairs there is no share
    }
    assert {key for key, *_ in differences(compose(["+exp=pairs"]), compose(["+exp=window"]))} == {
        "experiment",
        "attention.pairs",
        "attention.pairs_recent",
        "stage.lr_projection1",  # without a score to teach, stage 1 would have nothing to move
    }


@pytest.mark.parametrize(("budget", "every"), [("smoke", 0), ("quick", 0), ("standard", 64), ("paper", 128)])
def test_dev_losses_are_measured_where_they_cost_less_than_a_hundredth(budget: str, every: int) -> None:
    config = compose(["+exp=infini", f"budget={budget}"])
    stage = config.stage
    assert (stage.validate_every, stage.patience) == (every, 0)
    if every:
        for size in (config.budget.stage1, config.budget.stage2, config.budget.stage3):
            steps = size.tokens // (size.batch * size.length)
            assert steps // every >= 4
            assert (1 + steps // every) * stage.validate_rows * 2 < 0.01 * steps * size.batch * 3.5


def test_the_command_line_wins_over_the_experiment() -> None:
    config = compose(["+exp=infini", "layers=all", "attention.pairs=16", "budget=smoke"])
    assert (config.layers.select, config.attention.pairs, config.budget.name) == ("all", 16, "smoke")
    assert selected(config.layers, 30) == list(range(30))


def test_from_and_exp_are_understood() -> None:
    assert normalise(["exp=window", "from=outputs/x", "seed=1"]) == [
        "+exp=window",
        "source=outputs/x",
        "seed=1",
    ]


@pytest.mark.parametrize(
    ("overrides", "indices"),
    [
        (["layers=list", "layers.indices=[9,3]"], [3, 9]),
        (["layers=every", "layers.k=10"], [0, 10, 20]),
        (["layers=first", "layers.k=2"], [0, 1]),
        (["layers=last", "layers.k=2"], [28, 29]),
        (["layers=retrieval"], None),
        (["layers=auto"], None),
    ],
)
def test_layers_are_selected(overrides: list[str], indices: list[int] | None) -> None:
    assert selected(compose(overrides).layers, 30) == indices


def test_a_run_s_config_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = compose(["+exp=infini_paper", "layers=list", "layers.indices=[1,2]", "threads=1"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(tmp_path, "resume") == config


@pytest.mark.parametrize("content", ["{", '{"seed": "x"}', '{"unheard_of": 1}', "[1]"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="resume="):
        load_config(tmp_path, "resume")


def test_a_config_of_an_older_version_is_read_with_defaults(tmp_path: Path, caplog) -> None:
    stored = dataclasses.asdict(compose(["+exp=infini", "seed=3"]))
    del stored["attention"]["pairs"], stored["budget"]["eval"]["episodes"], stored["lora"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = load_config(tmp_path, "resume")
    assert (config.seed, config.lora.kind, config.attention.pairs) == (3, "none", 64)
    assert "lacks has its default: attention.pairs, budget.eval.episodes, lora" in caplog.text


def test_a_config_that_is_no_run_s_says_what_it_lacks(tmp_path: Path) -> None:
    stored = dataclasses.asdict(compose(["+exp=infini"]))
    del stored["seed"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"resume=.* the folder of a run; its config.json lacks seed\."):
        load_config(tmp_path, "resume")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"resume=.* lacks model, attention, .* and \d+ more\."):
        load_config(tmp_path, "resume")


def test_defaults_of_the_dataclasses_are_one_kind_of_run() -> None:
    validate(Config(), SMOLLM2)


def test_conf_is_found_beside_the_package_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compose(["+exp=window"]).experiment == "window"
    assert os.path.isabs(CONF)


def test_the_defaults_of_the_python_api_are_those_of_the_default_files():
    composed = compose(["layers=all"])
    assert composed.attention == Config().attention
    assert composed.stage == Config().stage


OWN = "attention.own.decay_init"


@pytest.mark.parametrize("spelling", [f"{OWN}=0.9", f"+{OWN}=0.9", f"++{OWN}=0.9"])
def test_options_of_a_variant_s_own_need_no_plus(spelling: str, tmp_path: Path) -> None:
    config = compose(["+exp=gated_delta", spelling])
    assert config.attention.own == {"decay_init": 0.9, "step_init": 0.5}
    validate(config, SMOLLM2)
    assert normalise([spelling]) == [f"++{OWN}=0.9"]
    assert select(config, OWN) == 0.9
    assert select(compose(["+exp=window"]), OWN) is None  # what a resumed run asks of another variant
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(tmp_path, "resume") == config


def test_a_file_need_not_name_a_variant_s_own_options() -> None:
    config = compose(["attention=infini", "attention.name=gated_delta", f"{OWN}=0.9"])
    assert config.attention.own == {"decay_init": 0.9}
    validate(config, SMOLLM2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention.own.decay=1"], ["attention.own.decay=1 ", "attention.own.decay_init"]),
        ([f"{OWN}=word"], [f"{OWN}='word'", "a finite number"]),
        ([f"{OWN}=1.5"], [f"{OWN}=1.5", "between 0 and 1"]),
        (["attention.own.decay_init.x=1"], [f"{OWN}", "a finite number"]),
        (["attention.own=3"], ["attention.own=3", "names with values"]),
        (["attention=identity", f"{OWN}=0.9"], [f"{OWN}=0.9", "nothing"]),
        ([f"~{OWN}"], [OWN, "nothing can be deleted"]),
    ],
)
def test_a_variant_s_own_options_are_refused_by_name(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        validate(compose(["attention=gated_delta", *overrides]), SMOLLM2)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_own_options_stay_with_their_variant() -> None:
    """`layers.rest` shares the options of `attention`, except those that only that one has."""
    attention = compose(["+exp=gated_delta"]).attention
    assert attention.shared_with("sliding_window").own == {}
    assert attention.shared_with("gated_delta") == attention
