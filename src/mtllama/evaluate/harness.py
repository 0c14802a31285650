"""Our engine as a model of lm-evaluation-harness, so that every one of its tasks runs on it; needs the extra `harness`.

Text becomes ids as lm-eval's own `hf` model makes them (prompt and continuation tokenised together, then parted), not as our prompt
formats do: its numbers are to be comparable with its own. Continuations of one prompt are scored as branches of one tree.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model.engine import Branches, Engine, Scored
from mtllama.progress import progress

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"--harness needs lm-eval ({error}); install it with: pip install 'mtllama[harness]'") from error

MAX_NEW_TOKENS = 256
"""Where a task does not say how much may be generated: lm-eval's own number."""


@dataclass
class Boundaries:
    """How often prompt and continuation tokenised apart are other ids than tokenised together."""

    pairs: int = 0
    differing: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    """The first few that differ: the end of the prompt, and the continuation."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """What lm-eval calls a model."""

    backend = "causal"

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.max_length = engine.loaded.max_length
        self.boundaries = Boundaries()
        self._device = engine.device

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return int(self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the folder's own template writes them."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, with BOS where the tokenizer puts it and the text has none yet."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        together: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        # Blanks at the end of a prompt belong to the continuation in both.
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        # The blank before an answer is one that SentencePiece tokenizers put there of their own accord.
        bare = continuation.removeprefix(" ") if self.engine.encoder.dummy_prefix else continuation
        apart = self.tok_encode(bare, add_special_tokens=False)
        self.boundaries.pairs += 1
        if together != (self.tok_encode(context), apart):
            self.boundaries.differing += 1
            if len(self.boundaries.examples) < 10:
                self.boundaries.examples.append((context[-40:], continuation))
        return together

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Continuations of one prompt go together. What is too long loses its beginning.
        trees: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue  # nothing is said, and that is certain
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation has {len(continuation)} tokens, more than the {self.max_length} that the model reads")
            room = self.max_length + 1 - len(continuation)
            trees.setdefault(tuple(context[-room:]), []).append(number)
        items = [Branches(list(context), [requests[number][2] for number in numbers]) for context, numbers in trees.items()]
        with progress("score", len(items)) as advance:
            judged: list[list[Scored]] = self.engine.judge(items, advance)
        for numbers, answers in zip(trees.values(), judged, strict=True):
            for number, answer in zip(numbers, answers, strict=True):
                results[number] = sum(answer.log_probs), answer.greedy
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's length that each token is predicted in once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)
            for part in parts:
                context, continuation = utils.make_disjoint_window(part)
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the first of the stop strings that each request names."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with progress("generate", len(requests)) as advance:
            for numbers in alike.values():
                prompts = [requests[number].args[0] for number in numbers]
                found = self._generate(prompts, requests[numbers[0]].args[1], advance)
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _generate(self, prompts: Sequence[str], options: dict[str, Any], advance: Callable[[int], None]) -> list[str]:
        if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
            raise UserError("the task asks for sampled text, and the engine's is greedy; give generation settings with do_sample: false")
        until = options.get("until") or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limit = int(next((options[name] for name in names if options.get(name) is not None), MAX_NEW_TOKENS))
        room = self.max_length - limit
        if room < 1:
            raise UserError(f"the task asks for {limit} new tokens, and the model reads {self.max_length} in all; ask for fewer")

        def cut(new: list[int]) -> tuple[str, bool]:
            text = self.tokenizer.decode([token for token in new if token != self.eot_token_id], skip_special_tokens=True)
            ends = [text.index(s) for s in stop if s in text]
            return (text[: min(ends)], True) if ends else (text, False)

        ids = [self.tok_encode(prompt)[-room:] for prompt in prompts]
        found = self.engine.continue_ids(ids, max_new_tokens=limit, ended=lambda new: cut(new)[1], advance=advance)
        return [cut(new)[0] for new in found]


def run_harness(
    engine: Engine,
    tasks: Sequence[str],
    limit: int | None = None,
    out: Path | None = None,
    *,
    include: Path | None = None,
    num_fewshot: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run lm-eval's `tasks` with our engine; into the folder `out` go `results_<date>.json` and `samples_<task>_<date>.jsonl`.

    The layout is lm-eval's own, written by its own code. `include` is a folder of further task files (YAML). Returns the results, with
    how many continuations are other ids when tokenised apart from their prompt (`boundaries`).
    """
    # lm-eval reads thousands of files to know its own tasks: half a minute, which a task of one's own need not wait for.
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise UserError(f"lm-eval has no task {', '.join(unknown) or 'of no name'}; `lm_eval ls tasks` lists those that it has")
    if out is not None:
        folders.require_new(out, overwrite=overwrite)
    model = EngineLM(engine)
    try:
        results = simple_evaluate(
            model, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager, log_samples=out is not None
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise UserError(f"lm-eval could not run {', '.join(tasks)}: {' '.join(str(error).split())[:300]}") from error
    assert results is not None
    samples = results.pop("samples", None)
    results["config"] |= {"model": "mtllama", "model_args": str(engine.loaded.source.name), "model_dtype": str(engine.loaded.dtype)}
    results["mtllama"] = {**engine.loaded.describe(), "boundaries": vars(model.boundaries), "versions": folders.versions()}
    if out is not None:
        with folders.new_folder(out, overwrite=overwrite) as folder:
            _write(results, samples, folder, str(engine.loaded.source.name))
    return dict(results)


def _write(results: dict[str, Any], samples: dict[str, Any] | None, out: Path, name: str) -> None:
    """By lm-eval's own tracker, so that what reads its folders reads this one."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(out))
    tracker.general_config_tracker.model_source = "mtllama"
    tracker.general_config_tracker.model_name = name
    tracker.general_config_tracker.model_name_sanitized = ""
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=rows)
