"""A vision-language model behind the OpenAI chat protocol as a reward model: "Is the task done?",
read from the probabilities of its first token."""

import base64
import hashlib
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mbpo_jax.training.metrics import continue_records, read_metrics

QUESTION = "A robot was told to: {instruction}. Is the task done? Answer Yes or No."
RETRIES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds to wait
LONGEST_WAIT = 60.0
ANSWERS = ("yes", "no")


class ServerError(ValueError):
    """The server cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Server:
    """`url` ends before "/chat/completions", as in http://127.0.0.1:8000/v1; `timeout` is in
    seconds, of one request."""

    url: str
    model: str
    api_key: str = ""
    timeout: float = 60.0
    retries: Sequence[float] = RETRIES


def probability_of_yes(log_probs: Sequence[Mapping[str, Any]]) -> float:
    """P(Yes) among Yes and No, Σ p(yes) / (Σ p(yes) + Σ p(no)), summed over the ways to write them
    that are among the likeliest first tokens.

    Args:
        log_probs: the protocol's `top_logprobs`, each {"token", "logprob"}.

    Raises:
        ValueError: neither is listed.
    """
    total = dict.fromkeys(ANSWERS, 0.0)
    for entry in log_probs:
        word = entry["token"].strip(" \n\t▁Ġ.").lower()
        if word in total:
            total[word] += math.exp(entry["logprob"])
    if not sum(total.values()):
        likeliest = ", ".join(repr(entry["token"]) for entry in log_probs[:3])
        raise ValueError(f"neither Yes nor No is among the likeliest tokens: {likeliest}")
    return total["yes"] / sum(total.values())


def request_body(model: str, instruction: str, images: Sequence[bytes]) -> bytes:
    """The JSON of a question about a moment, with one PNG for each camera."""
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(image)}"}}
        for image in images
    ]
    text = {"type": "text", "text": QUESTION.format(instruction=instruction)}
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": [*pictures, text]}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ).encode()


def ask_all(
    server: Server,
    moments: Sequence[tuple[str, Sequence[np.ndarray]]],
    cache: Path,
    concurrency: int = 8,
) -> np.ndarray:
    """P(Yes) [N] of moments, each an instruction and a frame uint8 [H, W, 3] per camera. Answers
    are kept in the file `cache` by what was asked, so that a stopped run goes on.

    Raises:
        ServerError: no server, one that refuses, or one that keeps failing.
    """
    bodies = [request_body(server.model, text, [png(x) for x in views]) for text, views in moments]
    keys = [hashlib.sha256(body).hexdigest() for body in bodies]
    records = read_metrics(cache)
    known = {record["key"]: record["probability"] for record in records}
    missing = {key: body for key, body in zip(keys, bodies) if key not in known}
    with continue_records(cache, records) as file, ThreadPoolExecutor(concurrency) as pool:
        answers = _in_order(pool, server, missing)
        for key, probability in tqdm(answers, "asking", len(missing), unit="frame"):
            known[key] = probability
            file.write(json.dumps({"key": key, "probability": probability}) + "\n")
    return np.array([known[key] for key in keys])


def _in_order(
    pool: ThreadPoolExecutor, server: Server, missing: Mapping[str, bytes]
) -> Iterator[tuple[str, float]]:
    asked = {key: pool.submit(ask, server, body) for key, body in missing.items()}
    try:
        for key, answer in asked.items():
            yield key, answer.result()
    finally:
        for answer in asked.values():
            answer.cancel()


def ask(server: Server, body: bytes) -> float:
    """P(Yes) of one question; what may pass (a timeout, too many requests, a server's own error, an
    answer that is no JSON) is asked again.

    Raises:
        ServerError: as `ask_all`.
    """
    for wait in (*server.retries, None):
        try:
            answer = _post(server, body)
            content = answer["choices"][0]["logprobs"]["content"][0]
            return probability_of_yes(content["top_logprobs"])
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {_text(error)}"
            if error.code != 429 and error.code < 500:
                raise ServerError(
                    f"{server.url} refuses the model {server.model!r} or the question ({problem})"
                ) from error
            wait = _asked_to_wait(error, wait)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                raise ServerError(
                    f"there is no server at {server.url} ({error.reason}): start one, or mend --url"
                ) from error
            problem = str(error.reason)
        except json.JSONDecodeError as error:
            problem = f"the answer is no JSON ({error})"
        except (TypeError, KeyError, IndexError) as error:
            raise ServerError(
                f"{server.url} answers without log-probabilities ({error!r}): it has to support "
                "`logprobs` and `top_logprobs`, as vLLM and SGLang do"
            ) from error
        except ValueError as error:
            raise ServerError(f"{server.url}, {server.model!r}: {error}") from error
        except OSError as error:  # among them a timeout while reading
            problem = str(error) or type(error).__name__
        if wait is not None:
            time.sleep(wait)
    raise ServerError(
        f"{server.url} failed {len(server.retries) + 1} times, at last with {problem}; the same "
        "command goes on with what is missing"
    )


def _post(server: Server, body: bytes) -> Any:
    headers = {"Content-Type": "application/json"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    url = f"{server.url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=server.timeout) as response:
        return json.loads(response.read().decode("utf-8", errors="replace"))


def _asked_to_wait(error: urllib.error.HTTPError, wait: float | None) -> float | None:
    after = error.headers.get("Retry-After", "")
    if wait is None or not after.isdecimal():
        return wait
    return min(float(after), LONGEST_WAIT)


def _text(error: urllib.error.HTTPError) -> str:
    return error.read().decode("utf-8", errors="replace").strip()[:300]


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
