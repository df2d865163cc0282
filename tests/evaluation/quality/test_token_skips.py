"""Which tokens skip: tables and correlations, on made tokens and on a measured model."""

import json

import pytest
import torch

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.distill.teacher import Teacher
from zeda_megatron.evaluation.quality.heldout import load_held_out
from zeda_megatron.evaluation.quality.measure import measure
from zeda_megatron.evaluation.quality.scored_tokens import ScoredTokens
from zeda_megatron.evaluation.quality.token_skips import spearman, token_skips
from zeda_megatron.models.load import load_model
from zeda_megatron.moe.pick_rules import DynamicSkipping, StaticTopK
from zeda_megatron.moe.router_dials import set_dials
from zeda_megatron.moe.stats import routers

TABLES = ("by_kind", "by_position", "by_entropy", "by_class")
SEQ_LENGTH = 128


def made(skipped, entropy=None, gap=None, position=None, kind=None) -> ScoredTokens:
    """Tokens with these values; what is not given is constant."""
    n = len(skipped)
    floats = [torch.tensor(v or [1.0] * n, dtype=torch.float64) for v in (skipped, entropy, gap)]
    return ScoredTokens(*floats, torch.tensor(position or [0] * n), torch.tensor(kind or [1] * n))


@pytest.fixture(scope="module")
def held_out(world, tmp_path_factory):
    """Conversations of two kinds of text, no questions."""
    lines = [json.loads(line) for line in world.rollouts.read_text().splitlines()[:20]]
    file = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    file.write_text(
        "".join(
            json.dumps({**line, "kind": ("prose", "code")[i % 3 == 0]}) + "\n" for i, line in enumerate(lines)
        )
    )
    return load_held_out(str(file), load_tokenizer(world.hf), SEQ_LENGTH)


@pytest.fixture
def models(world, one_process):
    """Teacher and dynamic student, loaded anew: tests set masks and rules on them."""
    return load_model(str(world.static)), load_model(str(world.dynamic))


def measured(teacher, student, held_out) -> dict:
    made = Teacher([teacher.chunk], "own")
    return measure(student.chunk, made, held_out, teacher.arch.vocab_size, teacher.tokenizer, SEQ_LENGTH, 8)


def count_picks(model) -> list[torch.Tensor]:
    """Fills with one [S] tensor per pass and layer of the student: picks that real experts compute."""
    seen = []

    def look(router, _inputs, output):
        if not router.dials.zero_mask:  # the teacher's passes
            seen.append(output[1].sum(1))

    for router in routers(model):
        router.register_forward_hook(look)
    return seen


def skipped_by_kind(seen, held_out, layers=2, topk=3) -> dict:
    """{kind: [T] skipped shares}, from what the hooks saw."""
    passes, found = torch.stack(seen).view(-1, layers, SEQ_LENGTH).sum(1), {}
    for kind, rows in held_out.rows_by_kind.items():
        mine, passes = passes[: len(rows)], passes[len(rows) :]
        scored = torch.cat([row.loss_mask for row in rows]) > 0
        found[kind] = 1 - mine[scored].double() / (layers * topk)
    return found


def test_every_scored_token_is_counted_once_in_each_table(models, held_out):
    tokens = measured(*models, held_out)["tokens"]
    rows = [row for some in held_out.rows_by_kind.values() for row in some]
    scored = sum(int(row.loss_mask.sum()) for row in rows)
    assert tokens["all"]["tokens"] == scored > 500
    for table in TABLES:
        assert sum(bucket["tokens"] for bucket in tokens[table].values()) == scored
    for kind, some in held_out.rows_by_kind.items():
        assert tokens["by_kind"][kind]["tokens"] == sum(int(row.loss_mask.sum()) for row in some)


def test_the_mean_of_each_table_weighted_by_tokens_is_the_zero_share_of_scored_tokens(models, held_out):
    seen = count_picks(models[1].chunk)
    tokens = measured(*models, held_out)["tokens"]
    expected = skipped_by_kind(seen, held_out)
    share = float(torch.cat(list(expected.values())).mean())
    assert 0.1 < share < 0.9
    assert tokens["all"]["skipped"] == pytest.approx(share, abs=1e-12)
    for kind, skipped_T in expected.items():
        assert tokens["by_kind"][kind]["skipped"] == pytest.approx(float(skipped_T.mean()), abs=1e-12)
    for table in TABLES:
        buckets = [b for b in tokens[table].values() if b["tokens"]]
        total = sum(b["tokens"] * b["skipped"] for b in buckets)
        assert total / tokens["all"]["tokens"] == pytest.approx(share, abs=1e-12)


def test_a_student_that_is_the_teachers_own_module_is_counted_alone(world, one_process, held_out):
    static = load_model(str(world.static))
    set_dials(static.chunk, pick_rule=DynamicSkipping(0.8))
    seen = count_picks(static.chunk)
    result = measured(static, static, held_out)
    expected = torch.cat(list(skipped_by_kind(seen, held_out).values()))
    assert result["tokens"]["all"]["skipped"] == pytest.approx(float(expected.mean()), abs=1e-12)
    assert result["kl_to_teacher"] > 0 and 0 < expected.mean() < 1 and expected.std() > 0
    for found in result["tokens"]["correlations"].values():
        assert -1 <= found["all"] <= 1 and set(found["by_kind"]) == {"prose", "code"}


def test_a_mask_routes_all_so_nothing_is_skipped(models, held_out):
    set_dials(models[1].chunk, zero_mask=True)
    tokens = measured(*models, held_out)["tokens"]
    assert tokens["all"]["skipped"] == 0.0 and tokens["correlations"] is None
    for table in TABLES:
        assert {bucket["skipped"] for bucket in tokens[table].values()} <= {0.0, None}


def test_arms_in_which_every_token_skips_the_same_have_tables_but_no_correlations(
    world, one_process, held_out
):
    static = load_model(str(world.static))
    set_dials(static.chunk, pick_rule=StaticTopK(1))
    tokens = measured(static, static, held_out)["tokens"]
    assert tokens["correlations"] is None
    assert tokens["all"]["skipped"] == pytest.approx(2 / 3)
    assert len(tokens["by_entropy"]) == 5 and tokens["by_position"]["0-3"]["skipped"] == pytest.approx(2 / 3)


def test_recording_stops_when_measuring_ends(models, held_out):
    measured(*models, held_out)
    for router in routers(models[1].chunk):
        assert not router.routing_stats.recording and router.routing_stats.real_picks_T == []


def test_fifths_of_entropy_are_even_and_say_where_they_lie():
    entropy = [float(i) for i in range(23)]
    table = token_skips({"prose": made([e / 100 for e in entropy], entropy)})["by_entropy"]
    assert [bucket["tokens"] for bucket in table.values()] == [4, 5, 4, 5, 5]
    assert [bucket["from"] for bucket in table.values()] == [0, 3, 8, 12, 17]
    assert [bucket["to"] for bucket in table.values()] == [3, 8, 12, 17, 22]
    assert table["q2"]["skipped"] == pytest.approx(0.06) and table["q5"]["skipped"] == pytest.approx(0.2)


def test_tokens_of_one_entropy_stay_together():
    tokens = made([0.0, 0.5, 1.0, 0.5, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    table = token_skips({"prose": tokens})["by_entropy"]
    assert [bucket["tokens"] for bucket in table.values()] == [5, 0, 0, 0, 1]
    assert [bucket["skipped"] for bucket in table.values()] == [0.4, None, None, None, 1.0]


def test_positions_and_classes_fall_into_their_buckets():
    positions = [0, 3, 4, 15, 16, 63, 64, 999]
    tokens = made([i / 8 for i in range(8)], position=positions, kind=[0, 1, 2, 3, 4, 5, 5, 5])
    block = token_skips({"prose": tokens})
    assert [b["tokens"] for b in block["by_position"].values()] == [2, 2, 2, 2]
    assert block["by_position"]["64+"]["skipped"] == pytest.approx(13 / 16)
    assert {name: b["tokens"] for name, b in block["by_class"].items()} == {
        "digits": 1,
        "letters_begin": 1,
        "letters_inside": 1,
        "punctuation": 1,
        "whitespace": 1,
        "other": 3,
    }


def test_correlations_have_the_sign_of_the_figures_over_all_and_per_kind():
    low = made([0.1, 0.2, 0.3], [3.0, 2.0, 1.0], gap=[0.1, 0.2, 0.3], position=[4, 4, 4])
    high = made([0.7, 0.8, 0.9], [13.0, 12.0, 11.0], gap=[0.4, 0.5, 0.6], position=[5, 5, 5])
    found = token_skips({"prose": low, "code": high})["correlations"]
    assert found["teacher_entropy"]["by_kind"] == {"prose": -1.0, "code": -1.0}
    assert found["teacher_entropy"]["all"] == pytest.approx(19 / 35)
    assert found["log_prob_gap"] == {"all": pytest.approx(1.0), "by_kind": {"prose": 1.0, "code": 1.0}}
    assert found["position"]["by_kind"] == {"prose": None, "code": None} and found["position"]["all"] > 0.8


def test_without_scored_tokens_there_is_no_block():
    assert token_skips({}) is None and token_skips({"prose": made([])}) is None


def ranks(values: list[float]) -> list[float]:
    """By counting: the values below, and half of the ties."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def brute_force(x: list[float], y: list[float]) -> float:
    """Pearson's coefficient of the ranks, as its formula stands."""
    a, b = ranks(x), ranks(y)
    n, mean = len(x), (len(x) + 1) / 2
    cov = sum((p - mean) * (q - mean) for p, q in zip(a, b)) / n
    spread = [(sum((p - mean) ** 2 for p in r) / n) ** 0.5 for r in (a, b)]
    return cov / (spread[0] * spread[1])


@pytest.mark.parametrize("values", [5, 2, 1000], ids=["many ties", "two values", "hardly a tie"])
def test_spearman_equals_brute_force_with_ties(values):
    draw = torch.Generator().manual_seed(values)
    for n in (2, 3, 40, 301):
        x = torch.randint(0, values, (n,), generator=draw).double()
        y = torch.randint(0, 7, (n,), generator=draw) + x.long() % 3
        x[0], x[1], y[0], y[1] = 0, 1, 0, 1
        assert spearman(x, y) == pytest.approx(brute_force(x.tolist(), y.tolist()), abs=1e-12)


def test_only_the_order_counts():
    x = torch.tensor([0.3, -2.0, 7.0, 1.0, 0.4])
    assert spearman(x, x.exp()) == pytest.approx(1.0) and spearman(x, -(x**3)) == pytest.approx(-1.0)


@pytest.mark.parametrize("constant", [torch.zeros(4), torch.full((4,), 0.1, dtype=torch.float64)])
def test_a_constant_has_no_correlation(constant):
    x = torch.arange(4.0)
    assert spearman(constant, x) is None and spearman(x, constant) is None
    assert spearman(x[:0], x[:0]) is None and spearman(x[:1], x[:1]) is None


@pytest.mark.parametrize("other", [torch.arange(3.0), torch.tensor([0.0, 1.0, 2.0, torch.nan]), torch.eye(4)])
def test_what_cannot_be_ranked_is_refused(other):
    with pytest.raises(ValueError, match="rank correlation"):
        spearman(torch.arange(4.0), other)
