"""A server that speaks OpenAI's protocol, in this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.evaluation.answering.engine import Request


def sampling_of(order):
    return SamplingConfig(order["max_tokens"], order["temperature"], order["top_p"], order["top_k"], 0)


class Server(ThreadingHTTPServer):
    """Speaks the protocol around an engine of evaluation, or a function (path, order) -> (code, reply); can be busy,
    broken, or name a reasoning part."""

    def __init__(self, engine=None, complete=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.complete = engine, complete
        self.lock, self.seen, self.busy = threading.Lock(), [], 0
        self.models, self.metrics, self.reply, self.redirect = ["tiny"], "", None, None
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, code: int, value) -> None:
        data = value.encode() if isinstance(value, str) else value
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def redirected(self) -> bool:
        if self.server.redirect is None:
            return False
        self.send_response(self.server.redirect[0])
        self.send_header("Location", self.server.redirect[1])
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def do_GET(self):
        if self.redirected():
            return
        if self.path == "/metrics":
            self.say(200, self.server.metrics)
        else:
            self.say(
                200,
                {"data": [name if isinstance(name, dict) else {"id": name} for name in self.server.models]},
            )

    def do_POST(self):
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.redirected():
            return None
        with self.server.lock:
            self.server.seen.append((order, dict(self.headers)))
            if self.server.busy:
                self.server.busy -= 1
                return self.say(503, "busy")
            if self.server.reply is not None:
                return self.say(*self.server.reply)
            if self.path.endswith("/chat/completions") and self.server.engine:
                answer = self.server.engine.answer(
                    [Request(order["messages"], order["seed"])], sampling_of(order)
                )[0]
            else:
                return self.say(*self.server.complete(self.path, order))
        usage = {"completion_tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens}
        usage["zero_share"] = answer.zero_share
        choice = {"message": {"role": "assistant", "content": answer.text}, "finish_reason": answer.finish}
        return self.say(200, {"choices": [choice], "usage": usage})
