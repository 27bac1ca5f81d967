"""The samples that the quality is judged by, drawn by one process or by all that a launcher has started.

`accelerate launch -m dpctl bench ...` runs the command several times. The first process measures and writes; the others
sleep until there are samples to draw. Noise belongs to the seed and the sample's index and the batches are cut in the
same places, so the images are those of one process. Tasks go over torch's key-value store, images over files.
"""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpctl import progress
from dpctl.bench import quality, subjects
from dpctl.bench.process import Worker
from dpctl.bench.quality import Samples
from dpctl.bench.result import INEXACT, OWN_WEIGHTS, FewerSteps, Model
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe

if TYPE_CHECKING:
    from dpctl.bench.measuring import Run

# How often a waiting process looks: a wait inside the store would hear no signal and log every second.
LOOK_EVERY_S = 0.2
# How long the first process stays for the others to read that it is done, where the store ends with it.
PATIENCE_S = 5.0
END: dict[str, Any] = {}


class Crew:
    """The processes of one launch: the first asks the others to draw. `drawn` counts images by process."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self.drawn = [0] * size
        self._store, self._tasks = store, 0

    def ask(self, task: Mapping[str, Any]) -> int:
        """Give the others a task, `END` to dismiss them, and return its number."""
        number, self._tasks = self._tasks, self._tasks + 1
        if self.size > 1:
            self._store.set(f"task/{number}", json.dumps(task))
        return number

    def answers(self, number: int) -> list[dict[str, Any]]:
        """Wait for what the others have to say to a task, in the order of their ranks."""
        return [json.loads(self.wait(f"answer/{number}/{rank}")) for rank in range(1, self.size)]

    def say(self, word: str) -> None:
        """Let the first process know `word` of this one."""
        self._store.set(f"{word}/{self.rank}", "1")

    def hear(self, word: str, patience_s: float | None = None) -> None:
        """Wait until every other process has said `word`."""
        for rank in range(1, self.size):
            self.wait(f"{word}/{rank}", patience_s)

    def wait(self, key: str, patience_s: float | None = None) -> bytes:
        """Sleep until `key` is there and return its value; empty where patience has run out."""
        until = None if patience_s is None else time.monotonic() + patience_s
        try:
            while not self._store.check([key]):
                if until is not None and time.monotonic() > until:
                    return b""
                time.sleep(LOOK_EVERY_S)
            return bytes(self._store.get(key))
        except RuntimeError as problem:  # torch's DistError among others: the store has gone with the process it was in
            got = str(problem).splitlines()[0]
            raise DpctlError("the other processes of this launch are gone", got, "see what they said, above") from None

    def follow(self) -> None:
        """Draw what the first process asks for until it is done. Every failure is an answer: it then draws itself."""
        choose_gpu()
        self.say("here")
        with ExitStack() as stack:
            hand = stack.enter_context(Hand(f"process {self.rank}"))
            for number in itertools.count():
                task = json.loads(self.wait(f"task/{number}"))
                if task == END:
                    break
                self._store.set(f"answer/{number}/{self.rank}", json.dumps(hand.draw(**task, rank=self.rank)))
        self.say("left")


class Hand:
    """What draws in a process that does not measure: a worker as in the first, opened anew for another subject."""

    def __init__(self, name: str) -> None:
        self._name, self._opening = name, dict[str, Any]()
        self._worker: Worker | None = None

    def __enter__(self) -> "Hand":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def draw(
        self, opening: dict[str, Any], parts: Sequence[dict[str, Any]], shares: int, rank: int
    ) -> dict[str, str | None]:
        """Draw this process's share of the parts; the answer holds why it could not, or None."""
        try:
            for part in parts[rank::shares]:
                self._opened(opening).ask("draw", **part)
        except DpctlError as problem:
            self.__exit__()
            return {"failure": f"{problem.failed} ({problem.got})"}
        return {"failure": None}

    def _opened(self, opening: dict[str, Any]) -> Worker:
        if self._worker is None or self._opening != opening:
            self.__exit__()
            self._worker, self._opening = Worker(self._name, opening["threads"]), opening
            self._worker.ask("open", **opening)
        return self._worker


@contextmanager
def crew() -> Iterator[Crew]:
    """Gather the processes that a launcher started for this command; just this one without a launcher.

    However the first one ends, the others are dismissed. One that dies is the launcher's business: it ends them all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Crew()
        return
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    found = Crew(rank, size, PrefixStore("dpctl-bench", store))
    if rank > 0:
        yield found
        return
    try:
        found.hear("here")
        yield found
    finally:
        with suppress(DpctlError, RuntimeError):
            found.ask(END)
            found.hear("left", PATIENCE_S)


def choose_gpu() -> None:
    """Show this process's workers one GPU alone, its own: the backends take the first that they see."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = own_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count(), seen)
    if mine is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = mine


def own_gpu(local_rank: int, count: int, seen: str | None) -> str | None:
    """Return the name of the GPU cuda:`local_rank` of `count`, `seen` being CUDA_VISIBLE_DEVICES; None without any.

    More processes than GPUs share them.
    """
    if count == 0:
        return None
    names = seen.split(",")[:count] if seen else [str(number) for number in range(count)]
    return names[local_rank % len(names)].strip()


def draw_samples(
    runs: "Sequence[Run]",
    models: Sequence[Model],
    recipe: BenchRecipe,
    out: Path,
    bar: progress.Bar,
    processes: Crew | None = None,
    fewer: Sequence[FewerSteps] = (),
) -> list[Samples]:
    """Draw every model's samples on one backend, the baseline's at fewer steps too, and every approximation's.

    One backend is enough where its parity with torch has passed: an engine then, since it is faster.
    """
    drawn: list[Samples] = []
    if recipe.samples == 0:
        return drawn
    processes = processes or Crew()
    shortened = {each.fewer: each.num_inference_steps for each in fewer}
    wanted = dict[int, int | None].fromkeys(recipe.num_inference_steps)
    extra = {steps: instead for steps, instead in shortened.items() if steps not in wanted}
    inexact = [run for run in runs if run.entry.backend in INEXACT and run.failure is None]
    count = len(models) * len(wanted) + len(extra) + len(inexact) * len(wanted)
    with bar("sample", recipe.samples * count) as advance:
        for position, model in enumerate(models):
            able = [run for run in runs if run.entry.model is model and run not in inexact and run.failure is None]
            asked = wanted | (extra if position == 0 else {})
            for run in sorted(able, key=lambda run: run.entry.backend in OWN_WEIGHTS):
                found = [
                    Samples(model.name, run.entry.backend, n, f"samples/{position}-{n}-steps.npz", instead)
                    for n, instead in asked.items()
                ]
                if all(_draw(run, recipe, s.num_inference_steps, out, s.file, processes, advance) for s in found):
                    drawn += found
                    break
        for run in inexact:
            position, backend = models.index(run.entry.model), run.entry.backend
            for n in wanted:
                each = Samples(run.entry.model.name, backend, n, f"samples/{position}-{n}-steps-{backend}.npz")
                drawn += [each] if _draw(run, recipe, n, out, each.file, processes, advance) else []
    return drawn


def _draw(
    run: "Run", recipe: BenchRecipe, steps: int, out: Path, file: str, processes: Crew, advance: progress.Advance
) -> bool:
    size = subjects.largest_batch(run.entry, recipe.samples)
    with tempfile.TemporaryDirectory(dir=out, prefix=".parts-") as folder:
        parts: list[dict[str, Any]] = [
            {
                "start": start,
                "stop": min(start + size, recipe.samples),
                "num_inference_steps": steps,
                "file": str(Path(folder).absolute() / f"{start}.npy"),
            }
            for start in range(0, recipe.samples, size)
        ]
        number = processes.ask({"opening": run.opening, "parts": parts, "shares": processes.size})
        able = _draw_parts(run, parts[:: processes.size], processes, advance)
        for rank, answer in enumerate(processes.answers(number), 1):
            theirs = parts[rank :: processes.size]
            here = all(Path(part["file"]).is_file() for part in theirs)
            if answer["failure"] is None and here:
                _count(theirs, rank, run, processes, advance)
                continue
            reason = answer["failure"] or f"its images are not in {folder}, which all machines must share"
            progress.say(f"process {rank} could not draw its share, the first one does: {reason}")
            able = able and _draw_parts(run, theirs, processes, advance)
        if able:
            quality.save_samples(out / file, [np.load(part["file"], allow_pickle=False) for part in parts])
    return able


def _draw_parts(run: "Run", parts: Sequence[dict[str, Any]], processes: Crew, advance: progress.Advance) -> bool:
    """Draw parts in the process that was measured; False once it has failed."""
    for part in parts:
        if run.ask("draw", **part) is None:
            return False
        _count([part], 0, run, processes, advance)
    return True


def _count(parts: Sequence[dict[str, Any]], rank: int, run: "Run", processes: Crew, advance: progress.Advance) -> None:
    count = sum(part["stop"] - part["start"] for part in parts)
    processes.drawn[rank] += count
    advance(count, model=run.entry.name)
