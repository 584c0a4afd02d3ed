"""Runs the arms of an experiment: parents first, several at a time, each at most once
(lab/papers/jobs.py)."""
import os
import signal
import sys
import time

from tqdm import tqdm

from data.prepare import prepared
from lab.papers.arms import ROOT
from lab.papers.jobs import Job, changes, lacks_speed, read_record, steps_done
from runtime import checkpoint

POLL = 0.1                              # seconds between looks at the processes


class Runner:
    """Runs arms, `jobs` at a time, each on an equal part of the cores.

    Use: with Runner(arms, todo, jobs, after) as runner. `todo` are those of the arms that must run,
    parents before children; after() is called when an arm is done. The first SIGINT or SIGTERM lets
    the processes save and end, the second ends them.
    """

    def __init__(self, arms, todo, jobs, after, quiet=False):
        self.arms, self.todo, self.jobs, self.after, self.quiet = arms, todo, jobs, after, quiet
        self.active = []                # Jobs at work
        self.done = {arm.label for arm in arms} - {arm.label for arm in todo}
        self.failed = {}                # label -> why
        self.stopped = None             # the name of the signal that stopped it
        self.waiting = set()            # labels of arms in whose folder another process is at work

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
        self.since = time.time()
        self.made = {}                  # label -> steps that earlier calls made
        for arm in self.todo:
            why = changes(arm, read_record(arm))
            if why:
                self.say(f"{arm.label}: runs again, changed: {why}")
            self.made[arm.label] = 0 if why else steps_done(arm)
        if self.done:
            self.say(f"{len(self.done)} of {len(self.arms)} runs are done already")
        bar = tqdm(total=sum(arm.steps for arm in self.todo), initial=sum(self.made.values()),
                   unit="step",
                   disable=self.quiet or not sys.stderr.isatty(), dynamic_ncols=True,
                   file=sys.stderr,
                   bar_format="{n_fmt}/{total_fmt} steps |{bar}| {elapsed}, {remaining} "
                              "left{postfix}")
        with bar:
            self.loop(bar)
        return not self.failed and not self.stopped

    def loop(self, bar):
        left, shown = list(self.todo), 0.0
        environment = surroundings(self.jobs)
        while self.active or left and not self.stopped:
            # A failed arm takes its children with it.
            for arm in [arm for arm in left if any(parent.label in self.failed
                                                   for parent in arm.parents)]:
                self.fail(arm, "skipped, since an arm that it comes from failed")
                left.remove(arm)
            # Start what is ready, as many at a time as there is room for.
            ready = [arm for arm in left if all(parent.label in self.done
                                                for parent in arm.parents)]
            for arm in ready:
                if not self.stopped and len(self.active) < self.jobs and self.is_free(arm):
                    self.active.append(Job(arm, environment))
                    left.remove(arm)
            # See who has finished, and show once a second how far the others are.
            for job in list(self.active):
                problem = job.poll()
                if problem is not None:
                    self.finish(job, problem)
            if not bar.disable and time.time() - shown > 1:
                shown = time.time()
                bar.n = self.count()
                bar.set_postfix_str(" " + ", ".join(job.arm.label for job in self.active))
            time.sleep(POLL)

    def is_free(self, arm):
        """False if a process that an earlier, killed runner started is still at work; it is waited
        for."""
        try:
            with checkpoint.Lock(arm.folder):
                return True
        except checkpoint.CheckpointError:
            if arm.label not in self.waiting:
                self.say(f"{arm.label}: another process is at work in {arm.folder}; waiting for it")
                self.waiting.add(arm.label)
            return False

    def finish(self, job, problem):
        """Takes note of a job that ended; problem is empty if it went well."""
        self.active.remove(job)
        if problem:
            # a process that was told to stop has not failed
            if not self.stopped:
                self.fail(job.arm, f"failed: {problem} ({job.arm.folder}/errors.txt)")
            return
        self.done.add(job.arm.label)
        self.after()
        row, seconds = job.record["row"], job.record["seconds"]
        loss = f"val_loss {row['val_loss']:.4f}, " if "val_loss" in row else ""
        self.say(f"{job.arm.label}: {loss}{seconds:.0f} s; {len(self.done)} of "
                 f"{len(self.arms)} runs done{self.time_left()}")

    def fail(self, arm, why):
        self.failed[arm.label] = why
        self.say(f"{arm.label}: {why}", error=True)

    def count(self):
        """Steps made, earlier calls included; those of failed arms left out."""
        at_work = {job.arm.label for job in self.active}
        steps = 0
        for arm in self.todo:
            if arm.label in self.done:
                steps += arm.steps
            elif arm.label in at_work:
                steps += steps_done(arm)
            elif arm.label not in self.failed:
                steps += self.made[arm.label]
        return steps

    def time_left(self):
        """", about 12 min left", from the pace of this call's steps."""
        all_steps = sum(arm.steps for arm in self.todo if arm.label not in self.failed)
        before = sum(made for label, made in self.made.items() if label not in self.failed)
        now = self.count()
        if now <= before or now >= all_steps:
            return ""
        minutes = (all_steps - now) * (time.time() - self.since) / (now - before) / 60
        return f", about {max(1, minutes):.0f} min left"

    def measure_speed(self, seeds=1):
        """Some steps of each trained arm of the first seeds, alone and on all cores. True if all
        ran."""
        for arm in lacks_speed(self.arms, seeds):
            if self.stopped:
                break
            job = Job(arm, surroundings(1), speed=True)
            self.active = [job]                         # for a signal to reach it
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
    """Prepares what is missing before any process starts, so that no two do it at once. Raises
    DataError."""
    seen = set()
    for arm in arms:
        data = arm.data
        # What an arm trains on, and what it is evaluated on, each once. A program that makes an arm
        # prepares what it needs, and so its children's text where that lies in its folder.
        if data and data.dir in [str(parent.folder) for parent in arm.parents]:
            continue
        for names in (data.name, arm.evaluation["corpora"]) if data else ():
            what = str(names), data.tokenizer, data.vocab_size, data.dir, data.max_tokens
            if names and what not in seen:
                seen.add(what)
                prepared(data, names, quiet)
