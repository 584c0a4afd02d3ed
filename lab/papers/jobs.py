"""An arm at work: its processes, and what its run folder says of it.

arm.json holds what was asked for and, once the arm is done, the row of its evaluation and its
thinned curves; output.txt and errors.txt hold what its processes printed. An arm whose arm.json is
done and asks for the same is not run again, one that was interrupted goes on from its checkpoint,
one that was asked for differently starts anew.
"""
import json
import os
import subprocess
import time

from lab.drawing.logs import thin
from lab.papers.arms import ROOT, executable
from lab.papers.provenance import is_of_another_text, origin
from runtime import checkpoint


def read_record(arm):
    """arm.json as a dict; empty if there is none that can be read."""
    try:
        return json.loads((arm.folder / "arm.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_trained(arm, record):
    """Whether its folder holds what is asked for, be it evaluated or not."""
    return is_meant(arm, record) and record.get("trained", False) and (
        checkpoint.has_run(arm.folder) or record.get("self_evaluated", False))


def is_meant(arm, record):
    """Whether an arm.json, or a row of runs.csv, is about what this arm asks for today: the same
    settings on the same text."""
    return record.get("key") == arm.key and not is_of_another_text(arm, record.get("corpus"))


def is_done(arm, record):
    return is_trained(arm, record) and "row" in record and (
        record.get("evaluation") == arm.evaluation or record.get("self_evaluated", False))


def lacks_speed(arms, seeds):
    """The trained arms of the first `seeds` seeds whose finished run has no speed yet."""
    first = list(dict.fromkeys(arm.seed for arm in arms))[:seeds]
    records = [(arm, read_record(arm)) for arm in arms
               if arm.seed in first and not (arm.make or arm.program)]
    return [arm for arm, record in records if is_done(arm, record) and "speed" not in record]


def changes(arm, record):
    """What was asked for differently when this arm was run; empty if nothing."""
    if not record or is_meant(arm, record):
        return ""
    if record.get("key") == arm.key:
        return "the text of its corpora"
    old = record.get("resolved", {})
    keys = [key for key in old.keys() | arm.resolved.keys()
            if old.get(key) != arm.resolved.get(key)]
    if record.get("make", "") != arm.make + arm.program:
        keys.append("make")
    if not keys:
        return "an arm that it comes from"
    more = " ..." if len(keys) > 3 else ""
    return ", ".join(sorted(keys)[:3]) + more


def commit():
    """The commit that the code stands at, with + where code or configs differ from it; empty
    outside git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True,
                              text=True).stdout.strip()
    try:
        head = git("rev-parse", "--short", "HEAD")
        return f"{head}+" if git("status", "--porcelain", "--", "*.py", "configs") else head
    except OSError:
        return ""


def steps_done(arm):
    """The step in the last whole row of its log.csv; 0 if there is none. Reads the end of the file
    only."""
    try:
        with open(arm.folder / "log.csv", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            rows = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    return next((int(row.split(b",")[0]) for row in reversed(rows) if row.split(b",")[0].isdigit()),
                0)


def last_line(path):
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def from_ensemble(found):
    """The row of what grow/ensemble.py measured: means over the corpora, and the loss on each."""
    corpora = found["corpora"]
    row = {f"val_{name}": sum(r[name] for r in corpora.values()) / len(corpora)
           for name in ("loss", "bpb")}
    return row | {f"val_loss_{name}": r["loss"] for name, r in corpora.items()}


class Job:
    """The processes of an arm, one after the other: its command and its evaluation; or its speed
    alone."""

    def __init__(self, arm, environment, speed=False):
        self.arm, self.environment, self.started = arm, environment, time.time()
        self.record = read_record(arm)
        if speed:
            self.start("speed", arm.speed_arguments())
        elif is_trained(arm, self.record):
            self.start("evaluation", arm.evaluate_arguments())
        else:
            self.start("training", self.prepare())

    def prepare(self):
        """The arguments of its command; writes arm.json, which says what it is for."""
        arm = self.arm
        same = is_meant(arm, self.record)
        # From the start: the folder is cleared, and arm.json says for what.
        if not same or arm.make or not checkpoint.can_resume(arm.folder):
            checkpoint.clear_run(arm.folder)
            (arm.folder / "evaluation.json").unlink(missing_ok=True)
            self.record = dict(key=arm.key, resolved=arm.resolved,
                               make=arm.make + arm.program, commit=commit(),
                               seconds=0.0, threads=int(self.environment["OMP_NUM_THREADS"]),
                               **origin(arm))
            self.write()
            return arm.arguments()
        # Interrupted: on from its checkpoint, in which the settings are.
        return arm.resume_arguments()

    def write(self):
        checkpoint.write_text(self.arm.folder / "arm.json", json.dumps(self.record))

    def start(self, stage, words):
        """A process in a group of its own: Ctrl-C in a terminal must reach it once, through the
        runner, since the second one would end it before it has saved."""
        self.stage = stage
        folder = self.arm.folder
        with open(folder / "output.txt", "a") as out, open(folder / "errors.txt", "w") as err:
            self.process = subprocess.Popen(executable(words), stdout=out, stderr=err,
                                            env=self.environment,
                                            start_new_session=True)

    def poll(self):
        """None while it works; then "", or the line that says why it failed."""
        status = self.process.poll()
        if status is None:
            return None
        if self.stage == "training":
            self.record["seconds"] += time.time() - self.started
            self.write()
        if status:
            return last_line(self.arm.folder / "errors.txt") or f"exit status {status}"
        after = {"training": self.after_training, "evaluation": self.after_evaluation,
                 "speed": self.after_speed}
        return after[self.stage]()

    def after_training(self):
        arm = self.arm
        own = (arm.folder / "evaluation.json").exists()     # a program that measures what it makes
        if arm.steps > steps_done(arm):
            return f"stopped after step {steps_done(arm)} of {arm.steps}"
        if not own and not checkpoint.has_run(arm.folder):
            return "left neither a checkpoint nor an evaluation.json"
        log = arm.folder / "log.csv"
        self.record |= dict(trained=True, self_evaluated=own, curve=thin(log) if log.exists()
                            else [])
        self.write()
        if own:
            return self.after_evaluation()
        self.start("evaluation", arm.evaluate_arguments())
        return None

    def after_evaluation(self):
        row = json.loads((self.arm.folder / "evaluation.json").read_text(encoding="utf-8"))
        row = from_ensemble(row) if "corpora" in row else row
        # what a program made may be text, not a model
        if "val_loss" not in row and not self.arm.make:
            return "left an evaluation.json without val_loss"
        self.record["row"] = row
        self.record["evaluation"] = self.arm.evaluation
        self.write()
        return ""

    def after_speed(self):
        found = (self.arm.folder / "speed.json").read_text(encoding="utf-8")
        self.record["speed"] = json.loads(found)
        self.write()
        return ""
