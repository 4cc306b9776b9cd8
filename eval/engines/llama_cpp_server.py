"""llama.cpp's server, as the package xllamacpp carries it. Runs in that package's environment, alone.

python llama_cpp_server.py FILE.gguf --port P [--host H] [--context N] [--parallel N] [--threads N]
"""

import argparse
import threading

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a request at most")
    parser.add_argument("--parallel", type=int, default=1, help="requests at a time")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = asked.model
    params.hostnames = [asked.host]
    params.port = asked.port
    params.n_parallel = asked.parallel
    params.n_ctx = asked.context * asked.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.threads
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.__version__, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
