import dataclasses

import pytest

from trace_jax.config import DEFAULT, Config, Data, config_names, from_command_line, load_config, to_json


def test_every_config_loads_under_its_name():
    assert DEFAULT in config_names()
    for name in config_names():
        assert load_config(name).name == name


def test_overrides_reach_nested_fields():
    config = from_command_line(["emoji_tiny", "--optimizer.learning-rate", "1e-4", "--model.lora.rank", "8"])
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.lora.rank == 8
    assert from_command_line(["--training.steps", "7"]).training.steps == 7


def test_a_weight_may_be_a_fraction_whatever_the_config_writes():
    weights = Config(name="x", data=Data(weights={"t2i": 2})).data.weights
    assert isinstance(weights["t2i"], float)
    weights = load_config("emoji_tiny").data.weights
    changed = load_config("emoji_tiny", ["--data.weights.it2i", "2.25"]).data.weights
    assert changed == {**weights, "it2i": 2.25}


def test_unknown_config_says_what_was_meant():
    with pytest.raises(SystemExit, match="Did you mean 'emoji_tiny'"):
        load_config("emoji_tyny")


def test_unknown_override_is_named(capsys):
    with pytest.raises(SystemExit):
        load_config("emoji_tiny", ["--optimizer.learning-rat", "1"])
    assert "learning-rate" in capsys.readouterr().err


def test_configs_are_frozen_and_plain_json():
    config = load_config("emoji_tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"
    assert to_json(config)["model"]["lora"]["rank"] == config.model.lora.rank
    assert Config(name="x").run_dir == "runs/x"


def test_data_in_a_bucket_is_refused(capsys):
    with pytest.raises(SystemExit):
        load_config("emoji_tiny", ["--data.root", "gs://bucket/data"])
    assert "mount the bucket" in " ".join(capsys.readouterr().err.split())
