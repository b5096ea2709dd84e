"""The zoo is complete, and its page is as it was printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peft import LoraConfig, PeftType

from adapters.errors import CURES
from tests.support import trainer, zoo
from tests.support.zoo import GROUPS, NOT_MADE, SPECIMENS

PAGE = Path(__file__).parents[3] / "docs" / "zoo.md"

# Fields of PEFT's config that say where an adapter comes from, and those that a way of training sets.
BOOKKEEPING = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
SET_BY_A_WAY = {
    "corda_config": "init_lora_weights",
    "eva_config": "init_lora_weights",
    "loftq_config": "init_lora_weights",
    "lora_ga_config": "init_lora_weights",
    "kasa_config": "kasa",
    "monteclora_config": "monteclora",
    "use_bdlora": "bdlora",
    "velora_config": "velora",
}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == zoo.table(), "python -m tests.support.zoo > docs/zoo.md"


def test_every_option_of_lora_is_there() -> None:
    options = {name for one in SPECIMENS.values() for name in one.options}
    seen = options | {one.way for one in SPECIMENS.values()} | zoo.DEFAULTS.keys()
    missing = {
        field.name
        for field in dataclasses.fields(LoraConfig)
        if field.name not in seen | BOOKKEEPING and SET_BY_A_WAY.get(field.name) not in seen
    }
    assert missing == set()


def test_every_tuner_of_peft_is_there() -> None:
    assert {one.tuner for one in SPECIMENS.values()} | NOT_MADE == {kind.value for kind in PeftType}


def test_every_name_of_a_way_is_known_and_used() -> None:
    assert {one.way for one in SPECIMENS.values()} == trainer.WAYS.keys()
    assert {one.style for one in SPECIMENS.values()} - {""} == trainer.STYLES.keys()
    assert {one.code for one in SPECIMENS.values()} - {None} <= CURES.keys()


def test_there_are_enough_of_them() -> None:
    served = [one for one in SPECIMENS.values() if one.code is None]
    assert len(SPECIMENS) == sum(map(len, GROUPS.values())), "a name is there twice"
    assert len(SPECIMENS) >= 160
    assert len(served) >= 80
