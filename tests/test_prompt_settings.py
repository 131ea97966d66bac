"""Settings of learned prompts: what goes together, and what a method does not read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fourbit.errors import InputError
from fourbit.prompts import PromptSettings, prompt_parameters
from fourbit.settings import Resolved, dump_settings, load_settings
from fourbit.training.config import TrainConfig
from fourbit.training.prompts import settle


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"prompt_tuning_init": "text"}, "needs prompt_tuning_init_text"),
        ({"prompt_tuning_init": "text", "prompt_tuning_init_text": "  "}, "needs"),
        ({"prompt_tuning_init_text": "Answer:"}, "needs prompt_tuning_init: text"),
        ({"encoder_num_layers": 3}, "lstm"),
        ({"encoder_dropout": 0.1}, "lstm"),
        ({"encoder_reparameterization_type": "lstm", "num_virtual_tokens": 1}, "2 or more"),
        (
            {
                "encoder_reparameterization_type": "lstm",
                "encoder_num_layers": 1,
                "encoder_dropout": 0.1,
            },
            "encoder_num_layers is 1",
        ),
        ({"encoder_reparameterization_type": "gru"}, "lstm"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values, part):
    with pytest.raises(ValidationError, match=part):
        PromptSettings(**values)


def test_pefts_own_spelling_is_understood():
    settings = PromptSettings(
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Answer:",
        encoder_reparameterization_type="LSTM",
    )
    assert settings.prompt_tuning_init == "text"
    assert settings.encoder_reparameterization_type == "lstm"


def load(*pairs: tuple[str, str]) -> TrainConfig:
    return load_settings(TrainConfig, path=None, overrides=pairs).value


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("qlora", "prompt.num_virtual_tokens", "8"),
        ("lora", "prompt.prompt_tuning_init", "random"),
        ("full", "prompt.num_virtual_tokens", "8"),
        ("full", "lora.r", "8"),
        ("full", "quant.quant_type", "fp4"),
        ("lora", "quant.blocksize", "128"),
        ("prompt_tuning", "lora.r", "8"),
        ("p_tuning", "lora.target_modules", "q_proj"),
        ("prompt_tuning", "prompt.encoder_hidden_size", "8"),
        ("p_tuning", "prompt.prompt_tuning_init", "random"),
    ],
)
def test_a_setting_the_method_does_not_read_is_refused_in_one_line(method, key, value):
    with pytest.raises(InputError) as caught:
        load(("method", method), (key, value))
    assert caught.value.line() == (
        f"error[bad-value] command line: {key}: not read by method {method}; remove it"
    )


@pytest.mark.parametrize("method", ["qlora", "lora", "full", "prompt_tuning", "p_tuning"])
def test_a_written_out_configuration_loads_again(method, tmp_path):
    config, _ = settle(load(("method", method)))
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(Resolved(config, {})))
    again = load_settings(TrainConfig, path=path).value
    assert again == config
    assert settle(again) == (config, [])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_packing_goes_off_by_itself_and_is_refused_when_asked_for(method):
    config, notes = settle(load(("method", method)))
    assert not config.data.packing
    assert [note.key for note in notes] == ["optim.lr", "data.packing"]
    assert not settle(load(("method", method), ("data.packing", "false")))[0].data.packing
    with pytest.raises(InputError, match="packing: true does not go with method"):
        load(("method", method), ("data.packing", "true"))


def test_the_learning_rate_that_was_asked_for_stays():
    config, notes = settle(load(("method", "p_tuning"), ("optim.lr", "2e-4")))
    assert config.optim.lr == 2e-4
    assert [note.key for note in notes] == ["data.packing"]
    assert settle(load()) == (load(), [])


def test_counts_by_hand():
    assert prompt_parameters(20, 576) == 11520
    # embedding, then 8 -> 3 -> 3 -> 8 with biases
    assert prompt_parameters(5, 8, encoder="mlp", hidden_size=3) == 40 + 27 + 12 + 32
