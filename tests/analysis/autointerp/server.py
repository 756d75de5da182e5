"""A scripted judge over real HTTP on the loopback, in OpenAI's chat format."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Script:
    """``answer(question, messages, number)`` returns a text, or a dict of what to do instead (see ``_Handler``)."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = Counter()
        """How often each chat was received."""
        self.answered = Counter()
        """How often each chat was answered with status 200 in full."""
        self.number = 0
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.times = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        script = self.server.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = json.dumps(body["messages"], sort_keys=True)
        with script.lock:
            script.number += 1
            number = script.number
            script.asked[chat] += 1
            script.at_once += 1
            script.most_at_once = max(script.most_at_once, script.at_once)
            script.times.append(time.monotonic())
        try:
            said = script.answer(body["messages"][-1]["content"], body["messages"], number)
        finally:
            with script.lock:
                script.at_once -= 1
        said = {"text": said} if isinstance(said, str) else said
        if said.get("sleep"):
            time.sleep(said["sleep"])
        status = said.get("status", 200)
        message = {"role": "assistant", "content": said.get("text"), "refusal": said.get("refusal")}
        choice = {"index": 0, "message": message, "finish_reason": said.get("finish", "stop")}
        if said.get("logprobs") is not None:
            choice["logprobs"] = {"content": said["logprobs"]}
        reply = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }  # fmt: skip
        data = json.dumps(reply if status == 200 else {"error": {"message": said.get("text", "no")}}).encode()
        if said.get("raw") is not None:
            data = said["raw"]
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if "retry_after" in said:
                self.send_header("Retry-After", str(said["retry_after"]))
            self.send_header("Content-Length", str(len(data) + said.get("missing", 0)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()
            if said.get("missing"):
                self.close_connection = True
            elif status == 200 and said.get("raw") is None:
                with script.lock:
                    script.answered[chat] += 1
        except (BrokenPipeError, ConnectionResetError):
            pass


@contextmanager
def serve(answer):
    """Run a server; yields its script and base URL."""
    script = Script(answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.script = script
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
