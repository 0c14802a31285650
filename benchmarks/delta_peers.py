"""What `delta.py` starts inside a peer's own environment. Only the standard library and that peer may be imported.

    PEER/bin/python delta_peers.py code CODEC BASE TARGET WORK     size and speed of coding TARGET, given BASE (safetensors files)
    python -S delta_peers.py command LOG ARGUMENT ...              run a command: its time, peak memory and exit status
    PEER/bin/python delta_peers.py tokenizer FILE PIECES           a sentencepiece model (needs sentencepiece and protobuf)

The last line of the output is one JSON document.
"""

import itertools
import json
import os
import shutil
import statistics
import string
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

THREADS = 2
REPEATS = 3
SLOW = 60.0
"""Seconds of coding and decoding above which one run is enough, without another to warm up."""
FRAME = 16 << 20
"""Bytes of the XOR in a frame of zstandard, so that both threads have something to do."""


@dataclass(frozen=True)
class Coder:
    """One way of coding the target. Nothing but `encode` and `decode` is timed."""

    encode: Callable[[], Any]
    decode: Callable[[Any], bytes | Path]
    size: Callable[[Any], int]
    target: bytes
    """What `decode` must give back."""


def data_of(path: Path) -> bytes:
    """The tensors of a safetensors file, one behind the other."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def zstd(level: int, base: Path, target: Path) -> Coder:
    """Slices of the XOR, each a frame of its own. The compressors are made anew: one of them must not work in two threads."""
    import numpy as np
    import zstandard

    before, after = (np.frombuffer(data_of(path), np.uint8) for path in (base, target))
    starts = range(0, len(after), FRAME)
    pool = ThreadPoolExecutor(THREADS)

    def encode(start: int) -> bytes:
        xor = before[start : start + FRAME] ^ after[start : start + FRAME]
        return zstandard.ZstdCompressor(level=level).compress(xor.data)

    def decode(frames: list[bytes]) -> bytes:
        out = np.empty_like(after)

        def one(start: int, frame: bytes) -> None:
            part = slice(start, start + FRAME)
            np.bitwise_xor(np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8), before[part], out=out[part])

        list(pool.map(one, starts, frames))
        return out.data

    return Coder(lambda: list(pool.map(encode, starts)), decode, lambda frames: sum(map(len, frames)), after.tobytes())


def zipnn(base: Path, target: Path) -> Coder:
    """Its delta mode. A new object for each call, as its own command does."""
    from zipnn import ZipNN

    before, after = data_of(base), data_of(target)
    dtype = {"BF16": "bfloat16", "F16": "float16"}[next(iter(dtypes(target)))]
    options = {"input_format": "byte", "bytearray_dtype": dtype, "delta_compressed_type": "byte", "threads": THREADS}
    return Coder(
        lambda: ZipNN(**options).compress(after, delta_second_data=before),
        lambda coded: ZipNN(**options).decompress(coded, delta_second_data=before),
        len,
        after,
    )


def z4ai(base: Path, target: Path) -> Coder:
    """Its delta of two buffers: a little smaller than its delta of two safetensors files."""
    import z4ai

    before, after = data_of(base), data_of(target)
    dtype = {"BF16": "bf16", "F16": "fp16"}[next(iter(dtypes(target)))]
    return Coder(
        lambda: z4ai.compress_delta(after, before, dtype=dtype, threads=THREADS),
        lambda coded: z4ai.decompress_delta(coded, before),
        len,
        after,
    )


def lmzip(paths: list[Path], work: Path) -> Coder:
    """Its archive of these files; those behind the first are coded against it."""
    import lmz

    folder, archive, out = work / "lmzip", work / "archive.lmz", work / "restored"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(paths):
        os.link(path, folder / f"{number}.safetensors")

    def encode() -> None:
        archive.unlink(missing_ok=True)
        lmz.compress(str(folder), str(archive), workers=THREADS)

    def decode(_: None) -> Path:
        out.mkdir(exist_ok=True)
        lmz.decompress(str(archive), str(out), workers=THREADS, overwrite=True)
        return out / f"{len(paths) - 1}.safetensors"

    return Coder(encode, decode, lambda _: archive.stat().st_size, paths[-1].read_bytes())


def dtypes(path: Path) -> set[str]:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert len(found) == 1, f"{path} has tensors of several dtypes: {sorted(found)}"
    return found


def measure(coder: Coder) -> dict[str, float]:
    """Median seconds of each direction, after a run that is not counted unless it was a slow one."""
    encoding: list[float] = []
    decoding: list[float] = []
    while len(encoding) < REPEATS + 1:
        began = time.perf_counter()
        coded = coder.encode()
        encoding.append(time.perf_counter() - began)
        began = time.perf_counter()
        restored = coder.decode(coded)
        decoding.append(time.perf_counter() - began)
        found = restored.read_bytes() if isinstance(restored, Path) else restored
        assert len(found) == len(coder.target) and memoryview(found) == memoryview(coder.target), "the restored bytes differ"
        if encoding[0] + decoding[0] > SLOW:
            break
    counted = slice(1 if len(encoding) > 1 else 0, None)
    return {
        "bytes": coder.size(coded),
        "encode_seconds": statistics.median(encoding[counted]),
        "decode_seconds": statistics.median(decoding[counted]),
        "runs": len(encoding[counted]),
    }


def code(codec: str, base: Path, target: Path, work: Path) -> dict[str, Any]:
    name, _, level = codec.partition("-")
    package = "zstandard" if name == "zstd" else name
    if name == "lmzip":
        # An archive holds base and target, and decoding restores both: what the base takes alone is taken off.
        alone, both = (measure(lmzip(paths, work)) for paths in ([base], [base, target]))
        found = {key: both[key] - alone[key] for key in ("bytes", "encode_seconds", "decode_seconds")} | {"runs": both["runs"]}
    else:
        found = measure(zstd(int(level), base, target) if name == "zstd" else {"zipnn": zipnn, "z4ai": z4ai}[name](base, target))
    return {"version": metadata.version(package), **found}


def command(log: Path, argv: list[str]) -> dict[str, Any]:
    """Peak memory is that of the largest process among the command and its children (mapped file pages in memory count).

    A process begins with the peak of the one that started it, so this one must be small: no package is imported.
    """
    with open(log, "wb") as file:
        began = time.perf_counter()
        process = os.posix_spawnp(
            argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        )
        _, status, usage = os.wait4(process, 0)
        seconds = time.perf_counter() - began
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }


def tokenizer(path: Path, num_pieces: int) -> dict[str, Any]:
    """A model with LLaMA's special and byte pieces, and strings of letters for the rest."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = num_pieces
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    letters = [*string.ascii_lowercase, "\u2581"]
    words = ("".join(word) for length in itertools.count(2) for word in itertools.product(letters, repeat=length))
    special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    special += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    ordinary = itertools.islice(itertools.chain(words, letters), num_pieces - len(special) - len(letters))
    names = [*special, *((word, kinds.NORMAL) for word in [*ordinary, *letters])]
    for number, (piece, kind) in enumerate(names):
        score = 0.0 if kind != kinds.NORMAL else float(len(special) - number)
        model.pieces.add(piece=piece, score=score, type=kind)
    path.write_bytes(model.SerializeToString())
    return {"pieces": len(model.pieces)}


def main() -> None:
    job, *rest = sys.argv[1:]
    if job == "code":
        result = code(rest[0], *map(Path, rest[1:]))
    elif job == "command":
        result = command(Path(rest[0]), rest[1:])
    else:
        result = tokenizer(Path(rest[0]), int(rest[1]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
