"""A Qwen3-VL of random weights behind the OpenAI chat protocol, on the CPU: what
`experiments.reward_models` meets at a real server, at no cost and with no sense. Runs in the
environment of requirements.txt, where this project is not installed."""

import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

NAME = "tiny"
SPECIAL = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
WORDS = ("Yes", "No", "Maybe", "The", "I", "It", "Done", "yes", "no", "A")
VOCABULARY = 256  # the rest are the words of a question, by their hash
PATCH, MERGE = 16, 2


def make_model() -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0, 1],
        },
        vision_start_token_id=0,
        image_token_id=1,
        vision_end_token_id=2,
        video_token_id=3,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def patches(image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Rows [patches, 3 * 2 * 16 * 16] in the order of the merged patches, and the grid (1, h, w):
    the picture at the nearest multiple of 32, in -1..1, twice (a still is two equal frames)."""
    side = PATCH * MERGE
    width, height = (max(side, round(size / side) * side) for size in image.size)
    x = np.asarray(image.convert("RGB").resize((width, height)), np.float32) / 127.5 - 1
    h, w = height // PATCH, width // PATCH
    x = x.transpose(2, 0, 1).reshape(3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)[..., None, :, :].repeat(2, axis=-3)
    return x.reshape(h * w, -1), (1, h, w)


class Handler(BaseHTTPRequestHandler):
    model: Qwen3VLForConditionalGeneration

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != NAME:
            return self._send(404, {"error": {"message": f"the model is called {NAME!r}"}})
        tokens, rows, grids = [], [], []
        for part in body["messages"][0]["content"]:
            if part["type"] == "text":
                tokens += [
                    len(SPECIAL) + len(WORDS) + sum(word.encode()) % 200
                    for word in part["text"].split()
                ]
                continue
            data = part["image_url"]["url"].partition("base64,")[2]
            row, grid = patches(Image.open(io.BytesIO(base64.b64decode(data))))
            tokens += [0, *[1] * (len(row) // MERGE**2), 2]
            rows.append(row)
            grids.append(grid)
        ids = torch.tensor([tokens])
        with torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == 1).int(),
                pixel_values=torch.from_numpy(np.concatenate(rows)),
                image_grid_thw=torch.tensor(grids),
            )
        log_probs = out.logits[0, -1].log_softmax(-1)
        first = range(len(SPECIAL), len(SPECIAL) + len(WORDS))
        top = [{"token": word, "logprob": float(log_probs[i])} for word, i in zip(WORDS, first)]
        top = sorted(top, key=lambda entry: -entry["logprob"])[: body["top_logprobs"]]
        content = [{**top[0], "top_logprobs": top}]
        message = {"role": "assistant", "content": top[0]["token"]}
        choice = {"index": 0, "message": message, "logprobs": {"content": content}}
        return self._send(200, {"model": NAME, "choices": [choice]})

    def _send(self, status: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    Handler.model = make_model()
    print(f"http://127.0.0.1:{port}/v1, model {NAME!r}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
