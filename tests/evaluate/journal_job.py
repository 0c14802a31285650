"""What another process does for test_journal.py: python journal_job.py MODEL OUT [BLOCKS]

It evaluates; with BLOCKS it is killed by SIGKILL when that many blocks are written, in the middle of the next one's line. Under
torchrun it is one of several ranks.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mtllama.evaluate import journal, runner
from mtllama.evaluate.items import EvalConfig
from mtllama.evaluate.protocols import Record
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model

BLOCK = 4
CONFIG = EvalConfig(tasks=("squad", "sst2", "copa"), limit=10, protocols=("all",))


def main(model: str, out: str, blocks: str = "") -> None:
    runner.BLOCK = BLOCK
    if blocks:
        append, left = journal.Journal.append, int(blocks)

        def killed(self: journal.Journal, records: Sequence[Record]) -> None:
            nonlocal left
            if left == 0:
                with open(self._own, "a", encoding="utf-8") as handle:
                    handle.write(journal.json_line(records[0]) + journal.json_line(records[1])[:40])
                    handle.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            append(self, records)

        journal.Journal.append = killed  # type: ignore[method-assign]
    with journal.joined() as ranks:
        engine = Engine(load_model(find_model(model), dtype="float32"))
        runner.evaluate(engine, CONFIG, Path(out), ranks=ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
