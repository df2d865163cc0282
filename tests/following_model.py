"""A stand-in for a vLLM server that follows a student: transformers answers, weights come from folders."""

import shutil
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from zeda_megatron.serving.load import load_zero_expert_model

MISSING = 404, "no such path"
LOADING = threading.Lock()
"""transformers replaces methods of its classes while it opens a model: two at a time would leave them replaced."""


class FollowingModel:
    """What a server of an exported folder does with the requests of `distill.student_servers`.

    Attributes:
        version: of its weights. updates: how often it took new ones. asked: seeds of the questions, in their order.
        refuses: paths that it does not know.
    """

    def __init__(self, export: Path, work: Path):
        self.export, self.folder = export, work
        shutil.copytree(export, work)
        self.lock, self.refuses = threading.RLock(), ()
        self.updates, self.asked, self.said = 0, [], []
        self.start()

    def start(self) -> None:
        """As it comes up: its own weights, and no word of an update."""
        with self.lock:
            self._load(self.export, [])
            self.version, self.active, self.paused = "default", False, False

    def __call__(self, path, order):
        with self.lock:
            self.said.append(path)
            if path in self.refuses:
                return MISSING
            if path == "/inference/v1/generate":
                return self._generate(order)
            return self._control(path.partition("?")[0], order)

    def _control(self, path, order):
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/start_weight_update":
            if self.active:
                return 500, "start_weight_update called while a weight update is already active"
            self.active = True
        elif path == "/update_weights":
            update = order["update_info"]
            if not list(Path(update["folder"]).glob("*.safetensors")):
                self.active = False
                return 500, f"{update['folder']}: no weights here"
            self._load(Path(update["folder"]), update.get("dials", []))
        elif path == "/finish_weight_update":
            assert self.active and self.paused
            self.version, self.active, self.updates = order["weight_version"], False, self.updates + 1
        else:
            return MISSING
        return 200, {"message": "done"}

    def _load(self, folder, dials) -> None:
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        with LOADING:
            self.model = load_zero_expert_model(self.folder, dtype=torch.float32).eval()
        if dials:
            self.model.set_zero_threshold(dials)

    @torch.no_grad()
    def _generate(self, order):
        how = order["sampling_params"]
        self.asked.append(how["seed"])
        ids, made, logprobs = list(order["token_ids"]), [], []
        draw = torch.Generator().manual_seed(how["seed"])
        reason = "length"
        while len(made) < how["max_tokens"]:
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            for token, bias in how.get("logit_bias", {}).items():
                logits[int(token)] += bias
            logp = (logits / how["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=draw))
            made.append(token)
            ids.append(token)
            logprobs.append({"token_id": token, "logprob": float(logp[token])})
            if token in how["stop_token_ids"]:
                reason = "stop"
                break
        spans = [{"version": self.version, "start": 0, "end": len(made)}]
        choice = {"token_ids": made, "finish_reason": reason, "weight_versions": spans}
        return 200, {"choices": [choice | {"logprobs": {"content": logprobs}}]}
