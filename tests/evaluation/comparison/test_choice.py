"""What would I choose: each outcome of the rule, on figures where it must appear."""

import pytest

from zeda_megatron.evaluation.comparison.choice import MARGIN, choose


def arm(value, half, flops=0.5, weights=1.0, zero_experts=True, steps=100) -> dict:
    gap = {"value": value, "low": value - half, "high": value + half}
    told = {"zero_experts": zero_experts, "adapted_steps": steps}
    return {"difference": gap, "expert_flops": flops, "expert_weights": weights, **told}


def figures(**arms) -> dict:
    teacher = {"difference": None, "expert_flops": 1.0, "expert_weights": 1.0}
    return {"teacher": "teacher", "arms": {"teacher": teacher, **arms}}


def test_the_good_arm_that_saves_most_is_chosen():
    made = choose(figures(paired_kl=arm(-0.005, 0.01, 0.5), zeda_stage1_kl=arm(0.0, 0.01, 0.7)))
    assert (made.verdict, made.arm) == ("arm", "paired_kl")
    assert "-0.5 points" in made.sentence and "50% of the expert FLOPs" in made.sentence
    assert "from -1.5 to +0.5" in made.sentence


def test_an_arm_whose_loss_is_not_ruled_out_is_not_chosen():
    made = choose(figures(paired_kl=arm(-0.005, 0.02, 0.3), zeda_stage1_kl=arm(0.0, 0.01, 0.7)))
    assert made.arm == "zeda_stage1_kl"


def test_less_work_decides_between_arms_that_save_alike():
    two = figures(zeda_stage2=arm(0.001, 0.01, 0.49), paired_untrained=arm(-0.005, 0.01, 0.51, steps=0))
    made = choose(two)
    assert made.arm == "paired_untrained" and "zeda_stage2 saves as much and takes more work" in made.sentence
    same = choose(figures(zeda_stage1_kl=arm(-0.005, 0.01), paired_kl=arm(0.001, 0.01)))
    assert same.arm == "paired_kl" and "is no better" in same.sentence


def test_a_baseline_that_does_as_well_wins_and_is_called_simpler():
    made = choose(figures(net_kl=arm(0.0, 0.01, 0.5, zero_experts=False), paired_kl=arm(-0.04, 0.01, 0.5)))
    assert (made.verdict, made.arm) == ("simpler", "net_kl")
    assert "simpler than zero experts" in made.sentence


def test_pruning_is_chosen_for_memory_when_nothing_saves_flops():
    made = choose(figures(reap_25=arm(-0.001, 0.01, 1.0, 0.75, False, 0), paired_kl=arm(-0.05, 0.01)))
    assert (made.verdict, made.arm) == ("weights", "reap_25")
    assert "75% of the expert weights" in made.sentence and "100% of the expert FLOPs" in made.sentence


def test_too_few_questions_give_no_choice_and_say_how_many_are_missing():
    made = choose(figures(paired_kl=arm(-0.01, 0.03), net_kl=arm(-0.05, 0.01)))
    assert (made.verdict, made.arm) == ("undecided", None)
    assert "the best guess is paired_kl" in made.sentence and "about 9 times as many" in made.sentence
    hopeless = choose(figures(paired_kl=arm(-0.03, 0.02)))
    assert hopeless.verdict == "undecided" and "times as many" not in hopeless.sentence


def test_the_teacher_stays_when_every_arm_loses():
    made = choose(figures(paired_kl=arm(-0.06, 0.01), net_kl=arm(-0.05, 0.02)))
    assert (made.verdict, made.arm) == ("teacher", "teacher")
    assert "the closest is net_kl" in made.sentence


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            {"teacher": "teacher", "arms": {"paired_kl": arm(0.0, 0.01)}},
            "no run of the teacher (--teacher names it)",
        ),
        (figures(), "no arm that has answered the teacher's questions"),
        (
            figures(paired_kl={**arm(0, 0), "difference": None}),
            "no arm that has answered the teacher's questions",
        ),
    ],
)
def test_without_a_comparison_nothing_is_chosen(what, said):
    made = choose(what)
    assert made.verdict == "nothing" and said in made.sentence


def test_an_arm_that_saves_nothing_is_not_chosen():
    assert choose(figures(paired_kl=arm(0.0, 0.01, 0.99))).verdict == "undecided"


def test_the_margin_can_be_moved():
    what = figures(paired_kl=arm(-0.01, 0.03))
    assert choose(what, MARGIN).verdict == "undecided" and choose(what, 0.05).verdict == "arm"


def test_what_an_arm_is_stands_in_its_facts_and_not_in_its_name():
    trained, fitted = arm(0.0, 0.01, steps=900), arm(-0.001, 0.01, steps=0)
    made = choose(figures(my_run=trained, other=fitted))
    assert made.arm == "other" and "my_run saves as much and takes more work" in made.sentence
    made = choose(figures(paired_untrained=trained, zeda_stage2_4x=fitted))
    assert (
        made.arm == "zeda_stage2_4x" and "paired_untrained saves as much and takes more work" in made.sentence
    )
    for name in ("my_cut", "zeda_stage1_kl"):
        made = choose(figures(**{name: arm(0.001, 0.01, 0.4, zero_experts=False)}, my_run=trained))
        assert (made.verdict, made.arm) == ("simpler", name) and "simpler than zero experts" in made.sentence


def test_an_arm_of_which_nobody_knows_counts_as_trained_for_longest_and_as_with_zero_experts():
    unknown, plain = arm(0.002, 0.01, zero_experts=None, steps=None), arm(0.001, 0.01, steps=100_000)
    made = choose(figures(static_topk_half=unknown, my_run=plain))
    assert made.arm == "my_run" and "static_topk_half saves as much and takes more work" in made.sentence
    assert choose(figures(net_kl=unknown)).verdict == "arm"


def test_the_teacher_may_have_any_name():
    what = figures(mine=arm(-0.06, 0.01))
    what = {"teacher": "base", "arms": {"base": what["arms"]["teacher"], "mine": what["arms"]["mine"]}}
    assert (choose(what).verdict, choose(what).arm) == ("teacher", "base")
