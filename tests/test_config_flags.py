"""Flags and -opts over a configuration."""

import argparse

import pytest
from tiny import ROOT, flags, leaves

from replknet_paddle.commands.flags import add_config_flags
from replknet_paddle.config import get_config, update_config
from replknet_paddle.runtime.errors import InputError

CONFIGS = ROOT / "configs"

ALL_FLAGS = {
    "dataset": ("imagenet2012", {"DATA.DATASET": "imagenet2012"}),
    "data_path": ("/d", {"DATA.DATA_PATH": "/d"}),
    "output": ("run", {"SAVE": "run"}),
    "batch_size": ("16", {"DATA.BATCH_SIZE": 16, "DATA.BATCH_SIZE_EVAL": 16}),
    "batch_size_eval": ("8", {"DATA.BATCH_SIZE_EVAL": 8}),
    "image_size": ("96", {"DATA.IMAGE_SIZE": 96}),
    "accum_iter": ("3", {"TRAIN.ACCUM_ITER": 3}),
    "pretrained": ("w.pdparams", {"MODEL.PRETRAINED": "w.pdparams"}),
    "resume": ("run/last", {"MODEL.RESUME": "run/last"}),
    "last_epoch": ("5", {"TRAIN.LAST_EPOCH": 5}),
    "eval": (True, {"EVAL": True}),
    "amp": (True, {"AMP": True}),
}


@pytest.mark.parametrize("flag", ALL_FLAGS)
def test_a_flag_sets_its_keys_and_no_other(flag):
    value, expected = ALL_FLAGS[flag]
    config = get_config()
    before = config.dump()
    absent = dict.fromkeys(ALL_FLAGS) | {"eval": False, "amp": False, "opts": None, "cfg": None}
    updated = update_config(config, flags(**absent | {flag: value}))
    changed = {
        key: value
        for key, value in leaves(updated).items()
        if value != leaves(config)[key] or key in expected
    }
    assert changed == expected
    assert config.dump() == before and config.is_frozen() and updated.is_frozen()


def test_no_flags_change_nothing():
    config = get_config(CONFIGS / "replknet_xl.yaml")
    assert update_config(config, argparse.Namespace()) == config


def test_batch_size_sets_both_and_batch_size_eval_goes_over_it():
    updated = update_config(get_config(), flags(batch_size=32, batch_size_eval=128))
    assert (updated.DATA.BATCH_SIZE, updated.DATA.BATCH_SIZE_EVAL) == (32, 128)


def test_opts_go_over_flags_in_their_order():
    updated = update_config(
        get_config(),
        flags(
            batch_size=32, opts=["DATA.BATCH_SIZE", "4", "SEED", "1", "SEED", "2", "AMP", "false"]
        ),
    )
    assert (updated.DATA.BATCH_SIZE, updated.DATA.BATCH_SIZE_EVAL) == (4, 32)
    assert updated.SEED == 2 and updated.AMP is False


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("TRAIN.BASE_LR", "1e-3", 1e-3),
        ("TRAIN.BASE_LR", "1", 1.0),
        ("TRAIN.LAYER_DECAY", "None", None),
        ("MODEL.LARGE_KERNEL_SIZES", "[13,13,13,13]", [13, 13, 13, 13]),
        ("MODEL.LARGE_KERNEL_SIZES", "13, 13, 13, 13", [13, 13, 13, 13]),
        ("TRAIN.OPTIMIZER.BETAS", "(0.9, 0.95)", [0.9, 0.95]),
        ("MODEL.NAME", "2024", "2024"),
        ("MODEL.PRETRAINED", "a b.pdparams", "a b.pdparams"),
        ("AMP", "True", True),
    ],
)
def test_opts_read_text_as_the_keys_type(key, text, value):
    read = leaves(update_config(get_config(), flags(opts=[key, text])))[key]
    assert read == value and type(read) is type(value)


def test_wrong_flags_and_opts_are_reported_together_by_the_names_that_were_typed():
    with pytest.raises(InputError) as caught:
        update_config(
            get_config(),
            flags(batch_size="0", last_epoch="x", dataset="mnist", opts=["SED", "1", "AMP"]),
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 6  # -batch_size sets two keys
    for part in ("-batch_size: DATA.BATCH_SIZE is '0'", "-batch_size: DATA.BATCH_SIZE_EVAL"):
        assert any(part in line for line in lines)
    for part in ("-last_epoch: ", "-dataset: ", "did you mean SEED?", "AMP has no value"):
        assert any(part in line for line in lines)


@pytest.mark.parametrize("flag", ["batch_size", "batch_size_eval", "image_size", "accum_iter"])
def test_zero_is_a_value_and_a_wrong_one(flag):
    with pytest.raises(InputError, match=f"-{flag}: .* is 0; allowed"):
        update_config(get_config(), flags(**{flag: 0}))


def test_flags_can_contradict_the_file():
    with pytest.raises(InputError, match="MODEL.RESUME"):
        update_config(get_config(), flags(eval=True, resume="run"))
    with pytest.raises(InputError, match="TRAIN.LAST_EPOCH"):
        update_config(get_config(CONFIGS / "replknet_31b_384.yaml"), flags(last_epoch="30"))


def test_every_opts_counts_and_the_later_one_wins():
    parser = argparse.ArgumentParser()
    add_config_flags(parser, required=True)
    epochs, seed = ["-opts", "TRAIN.NUM_EPOCHS", "20", "SEED", "1"], ["--opts", "SEED", "7"]
    args = parser.parse_args(["-cfg=x", *epochs, *seed, "-opts", "DATA.IMAGE_SIZE", "64"])
    config = update_config(get_config(), args)
    assert (config.TRAIN.NUM_EPOCHS, config.SEED, config.DATA.IMAGE_SIZE) == (20, 7, 64)
