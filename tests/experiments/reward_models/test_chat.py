"""A reward model behind the chat protocol: the arithmetic, and a server in all its moods."""

import base64
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from experiments.reward_models import chat

YES = [{"token": "Yes", "logprob": math.log(0.6)}, {"token": "No", "logprob": math.log(0.2)}]


def answer(top=YES):
    return json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]})


class StandIn:
    """A server on a port of its own. `moods` holds what the next requests get, each a status, a
    body and headers, or seconds of silence; after them all is well."""

    def __init__(self):
        self.moods, self.bodies, self.headers = [], [], []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    outer.bodies.append(json.loads(body))
                    outer.headers.append(dict(self.headers))
                    mood = outer.moods.pop(0) if outer.moods else (200, answer(), {})
                if isinstance(mood, float):
                    time.sleep(mood)
                    mood = (200, answer(), {})
                status, text, headers = mood
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stand_in():
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def server(stand_in):
    return chat.Server(stand_in.url, "tiny", timeout=0.5, retries=(0.01, 0.01))


def frames(n):
    rng = np.random.default_rng(0)
    return [("stack", [rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)]) for _ in range(n)]


def test_the_probability_is_that_of_yes_among_both():
    assert chat.probability_of_yes(YES) == pytest.approx(0.75, abs=1e-9)
    spelled = [
        {"token": " yes", "logprob": math.log(0.1)},
        {"token": "YES", "logprob": math.log(0.2)},
        {"token": "Maybe", "logprob": math.log(0.5)},
        {"token": "no", "logprob": math.log(0.1)},
    ]
    assert chat.probability_of_yes(spelled) == pytest.approx(0.75, abs=1e-9)
    assert chat.probability_of_yes(YES[1:]) == 0
    with pytest.raises(ValueError, match="Maybe"):
        chat.probability_of_yes(spelled[2:3])


def test_the_question_carries_instruction_and_pictures(stand_in, server, tmp_path):
    moment = ("stack the cups", [np.full((4, 5, 3), value, np.uint8) for value in (7, 200)])
    probability = chat.ask_all(server, [moment], tmp_path / "cache.jsonl")
    assert probability.tolist() == [pytest.approx(0.75)]
    (body,) = stand_in.bodies
    assert (body["model"], body["max_tokens"], body["logprobs"]) == ("tiny", 1, True)
    *pictures, text = body["messages"][0]["content"]
    assert "stack the cups" in text["text"]
    for picture, frame in zip(pictures, moment[1], strict=True):
        data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        np.testing.assert_array_equal(seen, frame)
    assert "Authorization" not in stand_in.headers[0]


def test_what_is_known_is_not_asked_again(stand_in, server, tmp_path):
    first = chat.ask_all(server, frames(3), tmp_path / "cache.jsonl")
    more = chat.ask_all(server, frames(4), tmp_path / "cache.jsonl")
    assert len(stand_in.bodies) == 4
    np.testing.assert_array_equal(more[:3], first)
    other = chat.Server(server.url, "another", timeout=0.5)
    chat.ask_all(other, frames(1), tmp_path / "cache.jsonl")
    assert len(stand_in.bodies) == 5


@pytest.mark.parametrize(
    "mood",
    [
        (429, "slow down", {"Retry-After": "0"}),
        (500, "oh", {}),
        (503, "busy", {}),
        (200, '{"choices": [', {}),
        2.0,
    ],
    ids=["too many", "broken", "busy", "no JSON", "silence"],
)
def test_what_may_pass_is_asked_again(stand_in, server, tmp_path, mood):
    stand_in.moods = [mood]
    probability = chat.ask_all(server, frames(1), tmp_path / "cache.jsonl")
    assert probability == pytest.approx(0.75)
    assert len(stand_in.bodies) == 2


def test_the_server_says_how_long_to_wait(stand_in, tmp_path):
    patient = chat.Server(stand_in.url, "tiny", retries=(30.0,))
    stand_in.moods = [(429, "", {"Retry-After": "1"})]
    started = time.monotonic()
    chat.ask_all(patient, frames(1), tmp_path / "cache.jsonl")
    assert 1 <= time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("moods", "asked", "hint"),
    [
        ([(500, "oh dear", {})] * 3, 3, "oh dear"),
        ([(200, "<html>", {})] * 3, 3, "no JSON"),
        ([(404, "no such model", {})], 1, "no such model"),
        ([(401, "who are you", {})], 1, "who are you"),
        ([(200, '{"choices": [{"message": {"content": "Yes"}}]}', {})], 1, "logprobs"),
        ([(200, '{"choices": [{"logprobs": null}]}', {})], 1, "logprobs"),
        ([(200, answer([{"token": "Perhaps", "logprob": 0.0}]), {})], 1, "Perhaps"),
    ],
)
def test_what_does_not_pass_is_one_error(stand_in, server, tmp_path, moods, asked, hint):
    stand_in.moods = moods
    with pytest.raises(chat.ServerError, match=hint):
        chat.ask_all(server, frames(1), tmp_path / "cache.jsonl", concurrency=1)
    assert len(stand_in.bodies) == asked


def test_no_server_is_told_at_once(stand_in, tmp_path):
    stand_in.close()
    gone = chat.Server(stand_in.url, "tiny")
    with pytest.raises(chat.ServerError, match="no server at"):
        chat.ask_all(gone, frames(1), tmp_path / "cache.jsonl")
