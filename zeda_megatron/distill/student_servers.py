"""Answers from vLLM servers that follow the student which trains elsewhere.

Before a round the student's weights go into a folder that trainer and servers see, and every server is told to load it
(`serving.vllm.weight_folder`, through vLLM's interface of weight updates). Every answer says which weights gave it: a
server that was started again in between, or that follows somebody else, is told again and asked again.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ..config.generate import GenerateOptions, SamplingConfig
from ..config.zero_experts import ZeroExpertConfig
from ..data.chat_tokenizer import ChatTokenizer
from ..durable_file import writing
from ..errors import UserError
from ..models.architecture import Architecture
from ..models.live_weights import LiveWeights, write_weights
from ..runtime.agreement import from_rank0, on_rank0, rank, world_size
from ..runtime.openai_server import NoAnswer, OpenAIServer, brief, choice_of
from ..strict_json import is_int, is_number
from .answers import Deal, Generation, check_prompts
from .server_pool import FLAGS, ServerPool, open_servers
from .vllm_engine import check_student, check_temperature, sampling_fields

_NEWS = 20.0
"""Seconds after which the other processes hear that answers are still on their way."""
_ANSWER_TRIES = 3
"""So often is a question asked whose answers come from other weights."""


def server_command(length: int) -> str:
    """What starts a server that can follow a student."""
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve EXPORT --max-model-len {length} --generation-config vllm "
        '--enable-scale-out --logprobs-mode processed_logprobs --weight-transfer-config \'{"backend": "zeda_folder"}\''
    )


class StudentServers:
    """Answers prompts on servers; a `RolloutEngine` that can also begin a round and collect it later.

    Rank 0 talks to the servers; all ranks walk through the weights together.

    Args:
        chunks: bare model chunks of this rank. zero: its zero experts.
        tokenizer: its ids may be sampled, and it says what ends an answer. max_length: of prompt and answer.
        folder: for weights on their way, of this run alone; trainer and servers see it under the same path.
        say: gets a line about a server that is gone, or that had other weights.

    Raises:
        UserError: no server, a student without zero experts, or a pick rule.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        arch: Architecture,
        zero: ZeroExpertConfig,
        tokenizer: ChatTokenizer,
        max_length: int,
        options: GenerateOptions,
        folder: Path,
        say: Callable[[str], None],
    ):
        check_student(options.rollout_engine, chunks, zero)
        self.deal = Deal.of_groups(world_size())
        self.weights, self.folder, self.max_length = LiveWeights(chunks, arch), folder, max_length
        self.ends = sorted(tokenizer.eos_ids)
        self.banned = {str(token): -100 for token in range(tokenizer.vocab_size, arch.vocab_size)}
        self.run, self.rounds = from_rank0(secrets.token_hex(4)), 0
        self.label = ""
        self._begun: tuple[list[list[int]], list[int]] | None = None
        self._asking: _Asking | None = None
        self._told: Counter[OpenAIServer] = Counter()
        self._lock, self._dials = threading.Lock(), []
        self.pool: ServerPool | None = None

        def start():
            servers = open_servers(options, max_length, server_command(max_length))
            self.pool = ServerPool(servers, options.rollout_concurrency, say)
            with writing(str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                for left in folder.glob("weights-*"):  # of a run that was killed
                    shutil.rmtree(left)

        on_rank0(start)

    def begin(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        heard: Callable[[int, Generation], None] = lambda number, made: None,
    ) -> None:
        """Hand over the weights and ask; `generate` with the same prompts collects. All ranks call it.

        Args:
            heard: gets every answer as it comes, from a thread of its own on rank 0.
        """
        check_prompts(prompts, self.max_length)
        check_temperature(sampling)
        self._hand_over()

        def start():
            self.pool.look_again()
            self.pool.each(self._tell)
            one = partial(self._one, self.label, prompts, sampling, stream_ids)
            self._asking = _Asking(self.pool.share_out(len(prompts), one), heard)

        on_rank0(start)
        self._begun = (prompts, stream_ids)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        record_routing: bool = False,
    ) -> list[Generation]:
        """Answer prompts; see `RolloutEngine`. Ranks that do not speak get an empty list."""
        if record_routing:
            raise ValueError("servers do not tell routed experts")
        if self._begun != (prompts, stream_ids):
            self.begin(prompts, sampling, stream_ids)
        self._begun = None
        # Nobody waits longer in a collective than it takes to say that there is nothing new.
        while not on_rank0(lambda: self._asking.ended(_NEWS)):
            pass
        if not self.deal.speaks:
            return []
        made, self._asking = self._asking.made, None
        shutil.rmtree(self.folder / self.label, ignore_errors=True)
        return [made[number] for number in range(len(prompts))]

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Write the weights into a new folder."""
        self.rounds += 1
        self.label = f"weights-{self.run}-{self.rounds}"
        whole, partial_ = self.folder / self.label, self.folder / f"{self.label}.partial"
        first = rank() == 0
        with writing(str(partial_)):
            if first:
                partial_.mkdir()
            write_weights(self.weights.tensors(), partial_ if first else None)
            if first:
                partial_.rename(whole)
        self._dials = self.weights.settings().get("zce_threshold", [])

    def _tell(self, server: OpenAIServer) -> None:
        """Make a server take the newest weights; what it has under way ends before."""
        say = partial(server.call, base=server.root, tries=1)
        update = {"folder": str((self.folder / self.label).resolve()), "dials": self._dials}
        try:
            say("/pause?mode=wait", {})
            try:
                _start_update(say)
                say("/update_weights", {"update_info": update})
                say("/finish_weight_update", {"weight_version": self.label})
            finally:
                with suppress(UserError):
                    say("/resume", {})
        except NoAnswer as error:
            raise NoAnswer(f"takes no weights: {error}") from None
        except UserError as error:
            command = server_command(self.max_length)
            raise UserError(f"{FLAGS[0]} takes no weights: {error}; start it: {command}") from None
        self._told[server] += 1

    def _one(
        self,
        label: str,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        server: OpenAIServer,
        number: int,
    ) -> Generation:
        prompt = prompts[number]
        most = min(sampling.max_new_tokens, self.max_length - len(prompt))
        settings = sampling_fields(sampling, stream_ids[number], most, self.ends)
        if self.banned:
            settings["logit_bias"] = self.banned
        where = f"{FLAGS[0]} {server.url}"
        for _ in range(_ANSWER_TRIES):
            told = self._told[server]
            said = server.ask(
                "/inference/v1/generate",
                {"token_ids": prompt, "sampling_params": settings},
                most,
                server.root,
            )
            choice, finish = choice_of(said, where)
            versions = _versions(choice, where)
            if versions <= {label}:
                return _generation(choice, finish, where)
            with self._lock:
                if self._told[server] == told:  # nobody told it meanwhile
                    self.pool.say(
                        f"{where}: answers with other weights ({brief(', '.join(sorted(versions)))}); told anew"
                    )
                    self._tell(server)
        raise NoAnswer(f"{server.url}: does not keep the weights that it is given")


class _Asking:
    """Answers of a round, collected while the caller does something else."""

    def __init__(
        self, coming: Iterator[list[tuple[int, Generation]]], heard: Callable[[int, Generation], None]
    ):
        self.made: dict[int, Generation] = {}
        self._heard = heard
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, args=[coming], daemon=True)
        self._thread.start()

    def _collect(self, coming) -> None:
        try:
            for some in coming:
                for number, made in some:
                    self._heard(number, made)
                    self.made[number] = made
        except BaseException as error:
            self._failure = error

    def ended(self, seconds: float) -> bool:
        """Whether all answers are there, after so many seconds at most; raises what has ended the asking."""
        self._thread.join(seconds)
        if self._failure is not None:
            raise self._failure
        return not self._thread.is_alive()


def _start_update(say) -> None:
    try:
        say("/start_weight_update", {})
    except NoAnswer as error:
        if "already active" not in str(error):
            raise
        # Whoever began an update was killed. One that fails ends it.
        with suppress(UserError):
            say("/update_weights", {"update_info": {"folder": ""}})
        say("/start_weight_update", {})


def _versions(choice: dict, where: str) -> set[str]:
    spans = choice.get("weight_versions")
    if not isinstance(spans, list) or not all(isinstance(one, dict) for one in spans):
        raise UserError(f"{where}: does not say which weights answered; vLLM 0.32 or newer does")
    return {str(one.get("version")) for one in spans}


def _generation(choice: dict, finish: str, where: str) -> Generation:
    ids, told = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
    if not (isinstance(ids, list) and ids and all(is_int(one) and one >= 0 for one in ids)):
        raise UserError(f"{where}: token_ids is not a list of token ids: {brief(ids)}")
    values = [one.get("logprob") for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    if len(values) != len(ids) or not all(is_number(value) for value in values):
        raise UserError(f"{where}: gives no log-probability for every token")
    return Generation(ids, [float(value) for value in values], finish)
