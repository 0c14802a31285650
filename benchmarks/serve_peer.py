"""What `serve.py` starts inside an environment with xllamacpp: llama.cpp's own server, as that package brings it, until it is told to stop.

PEER/bin/python serve_peer.py MODEL.gguf --slots 16 --port 8080
"""

import argparse
import os
import signal

import xllamacpp

PLACES = 1024
"""Tokens that a slot has room for: more than the longest prompt and its answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames, params.port, params.ui = ["127.0.0.1"], options.port, False
    params.n_parallel, params.n_ctx = options.slots, options.slots * PLACES
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)
    print(xllamacpp.get_system_info(), server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # what is under way is not waited for


if __name__ == "__main__":
    main()
