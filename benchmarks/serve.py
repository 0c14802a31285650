"""Serving beside `transformers serve` and llama.cpp's server: tokens a second, one request after the other and together; time to first token.

    python benchmarks/serve.py [--model smollm2-135m] [--requests 32] [--concurrent 16] [--new-tokens 64] [--llama PEER/bin/python] [--out FILE]

Every server runs in a process of its own, one at a time, on the same folder, in the same dtype (bf16 where the processor multiplies it, else
float32), on a loopback port, and is asked over HTTP the same prompts of the embedded data through `/v1/completions`, greedy and streamed:

mtllama              `mtllama serve --no-page`
transformers         `transformers serve` with its defaults: one request after the other
transformers, cb     `transformers serve --continuous-batching`, with blocks and tokens a batch given, since it has no defaults for a CPU
llama.cpp, f16       llama.cpp's own server out of the package xllamacpp (`serve_peer.py`), with as many slots as --concurrent; the same weights in
                     float16, written here from the GGUF that the model came from. The package's wheels are built for AVX2: without AVX-512 and AMX
llama.cpp, Q4_1      the same server on that GGUF as it is: the same weights in four bits, which is how its users would serve them

The last two need `--llama`, the Python of an environment with xllamacpp, and the model smollm2-135m: it is the one with a GGUF.

`alone` is one request after the other; `together` keeps --concurrent requests under way, with other prompts: a server that remembers what it has
read (transformers' blocks) would not have to read them. Tokens are counted from the text that came, by the
model's own tokenizer, in the same way for all, so that a server that counts otherwise gains nothing. Time to first token is the client's: from
before it connects and sends a request, once it is that request's turn, to the arrival of the first piece of text that is not empty; where a server's
first token is no text yet, it is that of the first that is. Its p95 is the nearest rank, the smallest time that at least 95% of the requests
need no longer than: of 16 or 32 requests the longest and the second-longest. `median_seconds` is that of whole requests. How many of the texts are the same when the first prompts are asked again together is told, too: in bf16 they need
not be. The floor of a lone token is reading the weights once, at the rate at which this machine reads memory. A server that does not answer
is told as such. The last line of the output is one JSON document.
"""

import argparse
import asyncio
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import httpx
import psutil

from train import FailedError, hardware, say

START, ANSWER = 180.0, 300.0
"""Seconds that a server has to start, and to answer."""
WARM = 2
"""Requests before anything is timed, of prompts that are not asked again."""
BUFFER = 2**28
"""Bytes that are read to measure memory."""


@dataclass
class Answered:
    """One request's text and times (seconds)."""

    text: str
    first: float
    whole: float
    error: str | None = None
    pieces: int = 0
    began: float = field(default=0.0)


def prompts(count: int) -> list[str]:
    """The first 10 to 150 words of passages of the embedded data: a model goes on with them, where it ends an answer after a word."""
    from mtllama.tasks.catalog import catalog, load_rows, sampler_dir

    rows = [row for name in ("adversarial_qa_dbert", "quoref", "squad") for row in load_rows(catalog()[name], sampler_dir()).rows]
    passages = list(dict.fromkeys(" ".join(row["context"].split()) for row in rows))
    return [" ".join(passages[index % len(passages)].split()[: 10 + 53 * index % 141]) for index in range(count)]


async def ask(client: httpx.AsyncClient, url: str, model: str, prompt: str, new_tokens: int) -> Answered:
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    began, first, text, pieces = time.perf_counter(), None, "", 0
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return Answered("", 0.0, 0.0, f"status {answer.status_code}: {(await answer.aread()).decode()[:200]}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Answered("", 0.0, 0.0, str(event["error"])[:200])
                piece = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
                if piece:
                    first, text, pieces = first or time.perf_counter(), text + piece, pieces + 1
    except httpx.HTTPError as error:
        return Answered("", 0.0, 0.0, f"{type(error).__name__}: {error}")
    ended = time.perf_counter()
    return Answered(text, (first or ended) - began, ended - began, None, pieces)


async def load(url: str, model: str, asked: list[str], new_tokens: int, together: int) -> tuple[list[Answered], float]:
    """All prompts, so many under way at a time; their answers and the seconds that all took."""
    gate = asyncio.Semaphore(together)
    async with httpx.AsyncClient(timeout=ANSWER, limits=httpx.Limits(max_connections=together + 2, max_keepalive_connections=0)) as client:

        async def one(prompt: str) -> Answered:
            async with gate:
                return await ask(client, url, model, prompt, new_tokens)

        began = time.perf_counter()
        found = await asyncio.gather(*(one(prompt) for prompt in asked))
        return list(found), time.perf_counter() - began


def nearest_rank(values: list[float], share: float) -> float:
    """The smallest of the values that at least such a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(found: list[Answered], seconds: float, tokenizer: Any) -> dict[str, Any]:
    if errors := [each.error for each in found if each.error]:
        raise FailedError(f"{len(errors)} of {len(found)} requests failed, such as: {errors[0]}")
    tokens = sum(len(tokenizer(each.text, add_special_tokens=False).input_ids) for each in found)
    firsts = [each.first for each in found]
    return {
        "requests": len(found),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_seconds": {"median": round(statistics.median(firsts), 3), "p95": round(nearest_rank(firsts, 0.95), 3)},
        "median_seconds": round(statistics.median(each.whole for each in found), 3),
    }


def measured(
    name: str, argv: list[str], model: str, asked: list[str], options: argparse.Namespace, tokenizer: Any, log: Path
) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, began = f"http://127.0.0.1:{port}", time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen([*argv, "--port", str(port)], stdout=file, stderr=file)
    try:
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.perf_counter() - began > START:
                raise FailedError(f"it did not start: {log.read_text()[-300:]}")
            time.sleep(0.1)
        started = time.perf_counter() - began
        first, others, warming = asked[: options.requests], asked[options.requests : 2 * options.requests], asked[2 * options.requests :]
        warm, _ = asyncio.run(load(url, model, warming, 8, 1))
        if warm[0].error:
            raise FailedError(warm[0].error)
        alone, seconds = asyncio.run(load(url, model, first, options.new_tokens, 1))
        result = {"start_seconds": round(started, 1), "alone": summary(alone, seconds, tokenizer)}
        say(f"{name}, alone: {result['alone']}")
        crowd, seconds = asyncio.run(load(url, model, others, options.new_tokens, options.concurrent))
        result["together"] = summary(crowd, seconds, tokenizer)
        result["times_as_fast_together"] = round(result["together"]["tokens_per_second"] / result["alone"]["tokens_per_second"], 2)
        again, seconds = asyncio.run(load(url, model, first, options.new_tokens, options.concurrent))
        summary(again, seconds, tokenizer)  # which tells of requests that failed
        result["same_text_as_alone"] = sum(a.text == b.text for a, b in zip(alone, again, strict=True))
        result["resident_mb"] = round(psutil.Process(process.pid).memory_info().rss / 1e6)
        say(f"{name}, together: {result['together']}")
        return result
    except FailedError as error:
        say(f"{name}: {error}")
        return {"failed": str(error)[:400]}
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_f16(gguf_file: Path, out: Path) -> None:
    """The same GGUF with every matrix in float16."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(gguf_file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[1] if len(entry.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight.astype(np.float32 if weight.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_rate() -> float:
    """Bytes a second that a product of a matrix with one row reads, the best of some."""
    import torch

    matrix, vector = torch.ones(BUFFER // 4 // 1024, 1024), torch.ones(1024)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        torch.mv(matrix, vector)
        times.append(time.perf_counter() - began)
    return matrix.numel() * 4 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", metavar="MODEL")
    parser.add_argument("--requests", type=int, default=32, metavar="N")
    parser.add_argument("--concurrent", type=int, default=16, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--only", action="append", metavar="NAME", help="this server only; may be repeated")
    parser.add_argument("--llama", metavar="PYTHON", help="of an environment with xllamacpp")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()

    from mtllama.model.convert import NAME, find_gguf
    from mtllama.model.find import find_model, load_tokenizer
    from mtllama.model.load import cpu_has_bf16
    from mtllama.weights.shards import CheckpointReader

    folder = find_model(options.model).folder
    reader, tokenizer = CheckpointReader(folder), load_tokenizer(folder)
    dtype, width = ("bfloat16", 2) if cpu_has_bf16() else ("float32", 4)
    num_bytes = sum(math.prod(reader.info(name).shape) for name in reader) * width
    rate, asked = read_rate(), prompts(2 * options.requests + WARM)
    lengths = [len(tokenizer(prompt).input_ids) for prompt in asked[: 2 * options.requests]]
    bin_dir = Path(sys.executable).parent
    theirs = [str(bin_dir / "transformers"), "serve", str(folder), "--device", "cpu", "--dtype", dtype]
    paged = [
        "--continuous-batching",
        "--cb-block-size",
        "32",
        "--cb-num-blocks",
        "512",
        "--cb-max-batch-tokens",
        "1024",
        "--no-cb-use-cuda-graph",
    ]
    servers = {
        "mtllama": (
            [sys.executable, "-m", "mtllama", "serve", str(folder), "--dtype", dtype, "--name", str(folder), "--no-page"],
            str(folder),
        ),
        "transformers": (theirs, str(folder)),
        "transformers, cb": ([*theirs, *paged], str(folder)),
    }
    work = Path(os.environ.get("TMPDIR", "/tmp"))
    versions = {name: metadata.version(name).split("+")[0] for name in ("mtllama", "torch", "transformers", "fastapi", "uvicorn")}
    if options.llama:
        original, half = find_gguf(), work / "mtllama-bench-f16.gguf"
        if options.model != NAME or original is None:
            parser.error(f"--llama needs the model {NAME} and the package that it comes from")
        version = [options.llama, "-c", "from importlib.metadata import version; print(version('xllamacpp'))"]
        versions["xllamacpp"] = subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip()
        write_f16(original, half)
        peer = [options.llama, str(Path(__file__).with_name("serve_peer.py")), "--slots", str(options.concurrent)]
        servers |= {"llama.cpp, f16": ([*peer, str(half)], str(half)), "llama.cpp, Q4_1": ([*peer, str(original)], str(original))}
    result: dict[str, Any] = {
        "benchmark": "serve",
        "hardware": hardware(),
        "python": sys.version.split()[0],
        "versions": versions,
        "model": options.model,
        "setting": {"requests": options.requests, "concurrent": options.concurrent, "new_tokens": options.new_tokens, "dtype": dtype},
        "prompt_tokens": {"median": statistics.median(lengths), "longest": max(lengths), "sum": sum(lengths)},
        "floor": {
            "read_gb_per_second": round(rate / 1e9, 1),
            "weights_mb": round(num_bytes / 1e6),
            "lone_tokens_per_second": round(rate / num_bytes, 1),
        },
        "results": {},
    }
    try:
        for name, (argv, model) in servers.items():
            if not options.only or name in options.only:
                log = work / f"mtllama-bench-{name.replace(', ', '-')}.log"
                result["results"][name] = measured(name, argv, model, asked, options, tokenizer, log)
    finally:
        if options.llama:
            half.unlink()
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
