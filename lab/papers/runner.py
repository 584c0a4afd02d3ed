"""Runs the arms of an experiment: parents first, several at a time, each at most once (lab/jobs.py)."""
import os
import signal
import sys
import time

from tqdm import tqdm

from runtime import checkpoint
from runtime.config import load_config
from data.prepare import find_or_prepare
from lab.papers.arms import ROOT, config_path
from lab.papers.jobs import Job, changes, is_done, read_record, steps_done

POLL = 0.1                              # seconds between looks at the processes


class Runner:
    """Runs arms, `jobs` at a time, each on an equal part of the cores.

    Use: with Runner(arms, jobs, after) as runner; after() is called when an arm is done. The first SIGINT or
    SIGTERM lets the processes save and end, the second ends them.
    """

    def __init__(self, arms, jobs, after, quiet=False):
        self.arms, self.jobs, self.after, self.quiet = arms, jobs, after, quiet
        self.active, self.failed, self.stopped, self.waiting = [], {}, None, set()

    def __enter__(self):
        self.old = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for job in self.active:
            job.process.kill()
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = signal.Signals(number).name
        for job in self.active:
            job.process.terminate()

    def say(self, text, error=False):
        if error or not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def run(self):
        """True if every arm is done; what failed is in self.failed, {label: why}."""
        todo = [arm for arm in self.arms if not is_done(arm, read_record(arm))]
        for arm in todo:
            if why := changes(arm, read_record(arm)):
                self.say(f"{arm.label}: runs again, changed: {why}")
        self.done = {arm.label for arm in self.arms} - {arm.label for arm in todo}
        if self.done:
            self.say(f"{len(self.done)} of {len(self.arms)} runs are done already")
        self.since = time.time()
        self.made = {arm.label: 0 if changes(arm, read_record(arm)) else steps_done(arm) for arm in todo}
        bar = tqdm(total=sum(arm.steps for arm in todo), initial=sum(self.made.values()), unit="step",
                   disable=self.quiet or not sys.stderr.isatty(), dynamic_ncols=True, file=sys.stderr,
                   bar_format="{n_fmt}/{total_fmt} steps |{bar}| {elapsed}, {remaining} left{postfix}")
        with bar:
            self.loop(todo, bar)
        return not self.failed and not self.stopped

    def loop(self, todo, bar):
        left, environment, shown = list(todo), surroundings(self.jobs), 0.0
        while self.active or left and not self.stopped:
            for arm in [arm for arm in left if any(parent.label in self.failed for parent in arm.parents)]:
                self.fail(arm, "skipped, since an arm that it comes from failed")
                left.remove(arm)
            ready = [arm for arm in left if all(parent.label in self.done for parent in arm.parents)]
            for arm in ready:
                if not self.stopped and len(self.active) < self.jobs and self.is_free(arm):
                    self.active.append(Job(arm, environment))
                    left.remove(arm)
            for job in list(self.active):
                if (problem := job.poll()) is not None:
                    self.finish(job, problem, todo)
            if not bar.disable and time.time() - shown > 1:
                bar.n, shown = self.count(todo), time.time()
                bar.set_postfix_str(" " + ", ".join(job.arm.label for job in self.active))
            time.sleep(POLL)

    def is_free(self, arm):
        """False if a process that an earlier, killed runner started is still at work; it is waited for."""
        try:
            with checkpoint.Lock(arm.folder):
                return True
        except checkpoint.CheckpointError:
            if arm.label not in self.waiting:
                self.say(f"{arm.label}: another process is at work in {arm.folder}; waiting for it")
                self.waiting.add(arm.label)
            return False

    def finish(self, job, problem, todo):
        self.active.remove(job)
        if problem:
            return self.stopped or self.fail(job.arm, f"failed: {problem} ({job.arm.folder}/errors.txt)")
        self.done.add(job.arm.label)
        self.after()
        loss, seconds = job.record["row"]["val_loss"], job.record["seconds"]
        self.say(f"{job.arm.label}: val_loss {loss:.4f}, {seconds:.0f} s; {len(self.done)} of "
                 f"{len(self.arms)} runs done{self.time_left(todo)}")

    def fail(self, arm, why):
        self.failed[arm.label] = why
        self.say(f"{arm.label}: {why}", error=True)

    def count(self, todo):
        """Steps made, earlier calls included."""
        at_work = {job.arm.label for job in self.active}
        return sum(arm.steps if arm.label in self.done else steps_done(arm) if arm.label in at_work
                   else self.made[arm.label] for arm in todo if arm.label not in self.failed)

    def time_left(self, todo):
        """", about 12 min left", from the pace of this call's steps."""
        all_steps = sum(arm.steps for arm in todo if arm.label not in self.failed)
        before = sum(made for label, made in self.made.items() if label not in self.failed)
        now = self.count(todo)
        if now <= before or now >= all_steps:
            return ""
        minutes = (all_steps - now) * (time.time() - self.since) / (now - before) / 60
        return f", about {max(1, minutes):.0f} min left"

    def measure_speed(self, seeds=1):
        """Some steps of each trained arm of the first seeds, alone and on all cores. True if all ran."""
        first = list(dict.fromkeys(arm.seed for arm in self.arms))[:seeds]
        for arm in self.arms:
            if arm.make or arm.seed not in first or "speed" in read_record(arm) or self.stopped:
                continue
            job = Job(arm, surroundings(1), speed=True)
            self.active = [job]
            while (problem := job.poll()) is None:
                time.sleep(POLL)
            self.active = []
            if problem and not self.stopped:
                self.fail(arm, f"no speed: {problem} ({arm.folder}/errors.txt)")
        return not self.failed and not self.stopped


def surroundings(jobs):
    """Environment of a process: an equal part of the cores, the repository's modules."""
    threads = str(max(1, cores() // jobs))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, PYTHONPATH=path)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_corpora(arms, quiet=False):
    """Prepares what is missing before any process starts, so that no two do it at once. Raises DataError."""
    seen = set()
    for arm in arms:
        if arm.make:
            continue
        d = load_config(config_path(arm.config, arm.name), arm.settings.items()).data
        for names in (d.name, arm.evaluation["corpora"]):
            what = str(names), d.tokenizer, d.vocab_size, d.dir, d.max_tokens
            if names and what not in seen:
                seen.add(what)
                find_or_prepare(names, d.tokenizer, d.vocab_size, d.dir or None, d.max_tokens, quiet)
