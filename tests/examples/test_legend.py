"""Variants of an arm look like the arm they belong to."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
from report.legend import ARMS, family, legend


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net_kl", "net_kl"),
        ("net_kl_75", "net_kl"),
        ("net_kl_75_seed3", "net_kl"),
        ("zeda_stage1_kl_w0.8", "zeda_stage1_kl"),
        ("beam_kl_lr0.1_4x", "beam_kl"),
        ("paired_kl_4x_seed2", "paired_kl"),
        ("net_range_kl_dial_75", "net_range_kl"),
        ("paired_kl_seed2", "paired_kl"),
        ("zeda_stage1_kl_dial_75", "zeda_stage1_kl"),
        ("mine_v2", "mine_v2"),
    ],
)
def test_a_variant_belongs_to_its_arm(name, expected):
    assert family(name) == expected


def test_variants_of_a_baseline_are_baselines_and_strangers_get_colours_of_their_own():
    known = legend(["net_kl_75", "mine", "yours"])
    assert known["net_kl_75"].note == ARMS["net_kl"].note and known["net_kl_75"].baseline
    assert [arm.place for arm in known.values()] == [0, 1, 2]
    assert known["mine"].light != known["yours"].light
