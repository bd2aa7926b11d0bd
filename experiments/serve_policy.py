"""Serves a trained policy to robots, in the protocol of openpi's client.

python -m experiments.serve_policy --checkpoint=runs/libero_long_micro/improve --port=8000

The client is openpi's own (`pip install openpi-client`), or anything that speaks its protocol:

    policy = openpi_client.websocket_client_policy.WebsocketClientPolicy("ws://127.0.0.1", 8000)
    chunk = policy.infer({
        "observation/image": head,             # uint8 [H, W, 3], upright; first camera
        "observation/wrist_image": wrist,      # second camera; any camera as observation/NAME
        "observation/state": state,            # float [P], raw units
        "prompt": "pick up the book",
    })["actions"]                              # float32 [k, A], the robot's units

Images of another size than the policy's are resized and padded to a square. A chunk's noise is
decided by the connection's number and the count of its requests, or, to repeat one, by the whole
numbers "episode" and "chunk_index" in the message. A message with an error is answered with its
text, which openpi's client raises as a RuntimeError. `GET /healthz` answers 200. SIGTERM or Ctrl-C:
what is in work is answered, then the server ends.
"""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from experiments.arguments import number, numbers

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/improve or RUN/sft")
    parser.add_argument(
        "--port", type=number(int, 0, 65_535), default=8000, help="0 for any that is free"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks"
    )
    parser.add_argument("--api_key_file", type=Path, help="file with the key that clients send")
    parser.add_argument(
        "--batch_sizes",
        type=numbers(1, 4096),
        default="1,4,16",
        help="compiled batch sizes; requests are padded to one",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="of RUN/improve: the state of the highest imagined success instead of the last",
    )
    parser.add_argument(
        "--best_of",
        type=number(int, 1, 4096),
        default=1,
        help="above 1: act on the best of so many chunks, by the run's world model and value",
    )
    parser.add_argument(
        "--best_of_chunks",
        type=number(int, 1, 4096),
        default=1,
        help="how far each of them is imagined",
    )
    parser.add_argument("--max_message_mib", type=number(float, 0.001, 2048), default=16.0)
    parser.add_argument(
        "--requests_per_second",
        type=number(float, 0.001),
        default=100.0,
        help="limit of one connection",
    )
    options = parser.parse_args(arguments)
    from mbpo_jax.serving import inference, server  # after the flags, so that --help is instant
    from mbpo_jax.stages.workspace import StageError

    logging.basicConfig(level=logging.WARNING)
    try:
        api_key = options.api_key_file.read_text().strip() if options.api_key_file else None
        if api_key == "":
            raise ValueError(f"{options.api_key_file} holds no key")
        policy_server = server.PolicyServer(
            inference.load(
                options.checkpoint,
                options.batch_sizes,
                options.best_of,
                options.best_of_chunks,
                options.best,
            ),
            api_key=api_key,
            max_message_bytes=int(options.max_message_mib * 2**20),
            requests_per_second=options.requests_per_second,
        )
        if api_key is None and options.host not in LOOPBACK:
            print(f"warning: anyone who reaches {options.host} may use the policy; set a key")
        asyncio.run(_serve(policy_server, options.host, options.port))
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(policy_server, host: str, port: int) -> None:
    stop = asyncio.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    await policy_server.run(
        host, port, stop, lambda port: print(f"serving on ws://{host}:{port}", flush=True)
    )
    print("all requests are answered; stopped")


if __name__ == "__main__":
    sys.exit(main())
