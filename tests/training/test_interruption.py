import signal
import subprocess
import sys
import textwrap

DEAF = """
    import time
    from mbpo_jax.training.interruption import interruptible

    with interruptible("until then"):
        print("ready", flush=True)
        while True:
            try:
                time.sleep(0.01)
            except BaseException:  # as a callback of the garbage collector does
                pass
"""


def test_sigterm_is_heard_where_exceptions_are_lost():
    command = [sys.executable, "-c", textwrap.dedent(DEAF)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "until then\n"
    assert process.returncode == 0
