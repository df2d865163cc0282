"""Words of communication libraries about a process that does not answer, in one line of ours."""

import pytest
import torch

from zeda_megatron.runtime.lost_peer import lost_peer
from zeda_megatron.runtime.worker import run_worker

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
WAITED = f"{GLOO}unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"
GONE = f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:49833"


def test_a_timeout_names_the_limit_and_what_to_do():
    told = str(lost_peer(RuntimeError(WAITED)))
    assert "did not answer within --distributed-timeout-minutes 0.25" in told and "py-spy" in told
    assert "start the same command again" in told and "\n" not in told


def test_the_second_collective_after_a_timeout_is_told_as_one_too():
    assert "did not answer" in str(lost_peer(RuntimeError("Application timeout caused pair closure")))


def test_a_closed_connection_says_that_a_process_is_gone():
    told = str(lost_peer(RuntimeError(GONE)))
    assert "another process of this run is gone" in told and "start the same command again" in told


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        RuntimeError("the download timed out"),
        RuntimeError("gloo: unsupported data type"),
        ValueError(WAITED),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error, out of memory"),
    ],
)
def test_other_errors_stay_what_they_are(error, monkeypatch):
    assert lost_peer(error) is None

    def fail():
        raise error

    with pytest.raises(type(error), match=r"."):
        run_worker(fail)


def test_the_run_ends_with_a_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run"])
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "ZEDA_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def fail():
        raise RuntimeError(GONE)

    with pytest.raises(SystemExit) as end:
        run_worker(fail)
    assert end.value.code == 3
    assert capsys.readouterr().err.startswith("error: a collective: another process of this run is gone")
