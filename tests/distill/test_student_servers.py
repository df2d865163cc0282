"""Stage 2 on servers that follow the student: their answers are its own, whatever happens to a server."""

import threading

import openai_stand_in
import pytest
import tiny_world
from following_model import FollowingModel

from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.models.live_weights import LiveWeights
from zeda_megatron.training import main

pytestmark = pytest.mark.usefixtures("one_process")
STEPS = {"train_iters": 4, "global_batch_size": 4, "samples_per_prompt": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def exports(world, tmp_path_factory):
    """What servers start from: the student of shared zero experts, and a fitted one."""
    root = tmp_path_factory.mktemp("exports")
    tiny_world.fit(world, root / "fitted", fit_target="effect", zero_experts_type="low_rank")
    for name, source in (("shared", world.dynamic), ("fitted_hf", root / "fitted")):
        megatron_to_hf(source, world.hf, root / name)
    return root


@pytest.fixture
def serve(exports, tmp_path, monkeypatch):
    monkeypatch.setattr("zeda_megatron.runtime.openai_server.time.sleep", lambda seconds: None)
    made = []

    def start(export="shared", complete=None):
        model = FollowingModel(exports / export, tmp_path / f"server{len(made)}")
        server = openai_stand_in.Server(complete=complete(model) if complete else model)
        made.append(server)
        return model, server

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def run(world, folder, *servers, **changes):
    """Lines of metrics of a run of stage 2."""
    fields = {"stage": "2", "rollout_engine": "openai", "rollout_url": [one.url for one in servers]}
    fields |= {"rollout_tries": 2, "loss_chunk_tokens": 32}
    tiny_world.start(world, save=folder, **(STEPS | fields | changes)).run()
    return tiny_world.read_metrics(folder)


def test_every_step_trains_on_answers_of_the_newest_student(world, serve, tmp_path):
    (one, first), (other, second) = serve(), serve()
    lines = run(world, tmp_path / "run", first, second)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(abs(line["logp_gap"]) < 1e-4 and line["rollout_lag"] == 0 for line in lines)
    assert (one.updates, other.updates) == (4, 4)
    asked = one.asked + other.asked
    assert len(asked) == 16 == len(set(asked)) and one.asked and other.asked
    assert not list((tmp_path / "run" / "rollout_weights").iterdir())


def test_a_fitted_student_hands_over_its_thresholds_too(world, serve, exports, tmp_path):
    _, server = serve("fitted_hf")
    fields = {"pretrained_checkpoint": exports / "fitted", "moe_router_load_balancing_type": "none"}
    lines = run(world, tmp_path / "run", server, target_zero_share=0.3, **fields)
    assert all(abs(line["logp_gap"]) < 1e-4 for line in lines)
    assert (
        lines[-1]["zero_share"] < 0.5
    )  # thresholds moved, or the last gap would not be small for the right reason


def test_a_round_ahead_is_one_update_old_and_a_resumed_run_asks_nothing_twice(world, serve, tmp_path):
    model, server = serve()
    ahead = {"rollout_ahead": 1, "save_interval": 2}
    whole = run(world, tmp_path / "whole", server, **ahead)
    assert [line["rollout_lag"] for line in whole] == [0, 1, 1, 1]
    asked = list(model.asked)
    assert len(asked) == 16 == len(set(asked))

    model.asked.clear()
    run(world, tmp_path / "parts", server, exit_interval=2, **ahead)
    parts = run(world, tmp_path / "parts", server, load=tmp_path / "parts", **ahead)
    assert parts == whole and sorted(model.asked) == sorted(asked)


def test_a_server_that_was_started_again_is_told_anew_and_its_answers_are_not_taken(
    world, serve, tmp_path, capfd
):
    def forgetful(model):
        def complete(path, order):
            if path == "/inference/v1/generate" and len(model.asked) == 6:
                model.start()
            return model(path, order)

        return complete

    model, server = serve(complete=forgetful)
    lines = run(world, tmp_path / "run", server, rollout_concurrency=1)
    assert all(abs(line["logp_gap"]) < 1e-4 for line in lines)
    assert model.updates == 5 and len(model.asked) == 17
    assert "answers with other weights (default); told anew" in capfd.readouterr().err


def test_a_server_that_goes_leaves_its_questions_to_the_others_and_may_come_back(
    world, serve, tmp_path, capfd
):
    gone = []

    def leaves(model):
        def complete(path, order):
            if path == "/inference/v1/generate" and len(model.asked) == 3 and len(gone) < 2:
                gone.append(path)
                return 503, "gone"
            return model(path, order)

        return complete

    (model, server), (other, second) = serve(complete=leaves), serve()
    lines = run(world, tmp_path / "run", server, second, rollout_concurrency=1)
    assert all(abs(line["logp_gap"]) < 1e-4 for line in lines)
    assert len(model.asked) + len(other.asked) == 16 and len(model.asked) > 3
    said = capfd.readouterr().err
    assert "1 servers go on without it" in said and f"{server.url}: is back" in said


def test_a_run_that_ended_in_the_middle_of_a_round_asks_for_nothing_that_has_come(
    world, serve, tmp_path, capfd
):
    whole_model, server = serve()
    whole = run(world, tmp_path / "whole", server, save_interval=2)

    def dies(model):
        def complete(path, order):
            if path == "/inference/v1/generate" and len(model.asked) >= model.last:
                return 503, "gone"
            return model(path, order)

        return complete

    model, server = serve(complete=dies)
    model.last = 14  # in the round of step 4; the checkpoint is of step 2
    with pytest.raises(UserError, match="no server is left, the same command goes on"):
        run(world, tmp_path / "parts", server, save_interval=2, rollout_concurrency=1)
    threading.Event().wait(1)  # whoever was asking has heard of the end
    model.last = 99
    parts = run(world, tmp_path / "parts", server, save_interval=2, load=tmp_path / "parts")
    assert parts == whole
    assert sorted(model.asked) == sorted(whole_model.asked), "asked twice, or not at all"
    said = capfd.readouterr().err
    assert "4 of 4 answers are in" in said and "2 of 4 answers are in" in said


def test_an_update_that_a_killed_run_left_open_is_ended(world, serve, tmp_path):
    model, server = serve()
    model.active = True
    assert len(run(world, tmp_path / "run", server, train_iters=1)) == 1
    (tmp_path / "run" / "rollout_weights" / "weights-dead-1").mkdir()
    run(world, tmp_path / "again", server, train_iters=1, rollout_weights=tmp_path / "run/rollout_weights")
    assert not list((tmp_path / "run" / "rollout_weights").iterdir())


@pytest.mark.parametrize("path", ["/pause?mode=wait", "/start_weight_update"])
def test_a_server_that_takes_no_weights_is_told_how_to_start(world, serve, tmp_path, path):
    model, server = serve()
    model.refuses = (path,)
    with pytest.raises(UserError, match=r"takes no weights: .*404.*VLLM_SERVER_DEV_MODE=1 vllm serve EXPORT"):
        run(world, tmp_path / "run", server)


def test_a_folder_that_the_server_does_not_see_is_named(world, serve, tmp_path):
    def blind(model):
        def complete(path, order):
            if path == "/update_weights":
                return model(path, {"update_info": {"folder": "/nowhere"}})
            return model(path, order)

        return complete

    _, server = serve(complete=blind)
    with pytest.raises(UserError, match=r"takes no weights: .*/nowhere: no weights here.*no server is left"):
        run(world, tmp_path / "run", server)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing_replay": True}, "--routing-replay: servers do not tell"),
        ({"rollout_api": "chat"}, "--rollout-api chat is for stage 0"),
        ({"rollout_ahead": 2}, "--rollout-ahead 2: one round"),
        ({"rollout_ahead": 1, "rollout_engine": "builtin", "rollout_url": None}, "--rollout-ahead is for"),
        ({"rollout_ahead": 1, "max_staleness": 0}, "--max-staleness 0: .* up to 1 updates old"),
        ({"max_staleness": 0, "rollout_batch_size": 4}, "--max-staleness 0: .* up to 1 updates old"),
        ({"save": None}, "--rollout-weights is missing"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_is_asked(world, tmp_path, changes, message):
    fields = {"stage": "2", "rollout_engine": "openai", "rollout_url": ["http://127.0.0.1:9/v1"]}
    with pytest.raises(UserError, match=message):
        tiny_world.start(world, **({"save": tmp_path / "run"} | STEPS | fields | changes))


@pytest.mark.parametrize(("stage", "size"), [("2", 2), ("0", 1)])
def test_the_student_keeps_its_layout_where_stage_0_has_none(world, tmp_path, monkeypatch, stage, size):
    seen = []

    def started(parallel, _seed):
        seen.append(parallel.expert_model_parallel_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(main.process_groups, "started", started)
    fields = {"stage": stage, "rollout_engine": "openai", "rollout_url": ["http://127.0.0.1:9/v1"]}
    fields |= {"expert_model_parallel_size": 2, "rollout_path": tmp_path / "a.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        main.train(tiny_world.options(world, **fields))
    assert seen == [size]


def test_weights_are_written_in_parts_that_are_small(world, serve, tmp_path, monkeypatch):
    """Nothing is held but the part that is being written."""
    monkeypatch.setattr("zeda_megatron.models.live_weights.SHARD_BYTES", 20_000)
    seen = []

    def watching(model):
        def complete(path, order):
            if path == "/update_weights":
                folder = order["update_info"]["folder"]
                seen.extend(file.stat().st_size for file in (tmp_path / folder).glob("*.safetensors"))
            return model(path, order)

        return complete

    _, server = serve(complete=watching)
    run(world, tmp_path / "run", server, train_iters=1)
    largest = max(t.nbytes for _, t in LiveWeights(*_student(world)).tensors())
    assert len(seen) > 5 and max(seen) < 20_000 + largest + 5_000


def _student(world):
    from zeda_megatron.models.load import load_model

    model = load_model(str(world.dynamic))
    return [model.chunk], model.arch
