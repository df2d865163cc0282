"""The tiny static model behind OpenAI's protocol: in this process, or `python tests/served_model.py HF PORT`."""

import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import openai_stand_in
import tiny
import tiny_world

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.distill.builtin_engine import BuiltinEngine


class Model:
    """What stands behind the servers: the static model of the world."""

    def __init__(self, hf_folder):
        self.tokenizer = load_tokenizer(hf_folder)
        hf = tiny.hf_model(std=0.1, **tiny_world.MODEL)
        ends, pad = self.tokenizer.eos_ids, self.tokenizer.pad_id
        self.engine = BuiltinEngine(tiny.megatron_model(hf), ends, pad, 256, self.tokenizer.vocab_size)
        self.tells, self.strict, self.prefix = True, False, ""
        self.lock, self.dies_at, self.count = threading.Lock(), None, 0

    def __call__(self, path, order):
        if self.strict and order.get("return_token_ids"):
            return 400, "unknown field return_token_ids"
        with self.lock:
            self.count += order["max_tokens"] > 1
            if self.dies_at is not None and self.count > self.dies_at:
                return 503, "gone"
            chat = path.endswith("/chat/completions")
            prompt = order["messages"] if chat else order["prompt"]
            if chat:
                prompt = self.tokenizer.render_chat(prompt, add_generation_prompt=True)
            ids = prompt if isinstance(prompt, list) else self.tokenizer.encode(self.prefix + prompt)
            sampling = openai_stand_in.sampling_of({"top_p": 1.0, **order, "top_k": 0})
            (made,) = self.engine.generate([ids], sampling, [order.get("seed", 0)])
        choice = {"finish_reason": made.finish_reason, "stop_reason": None}
        text = self.tokenizer.decode(made.response_ids)
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.tells:
            choice |= {"prompt_token_ids": ids, "token_ids": made.response_ids}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 5}}


def main() -> None:
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.runtime.process_groups import started

    with started(ParallelConfig()):
        server = openai_stand_in.Server(complete=Model(sys.argv[1]), port=int(sys.argv[2]))
        server.thread.join()


if __name__ == "__main__":
    main()
