"""The resume file of an unfinished fold: all that an exact continuation needs. Used by 01_train_fold.py.

A fold that was killed at any moment and is started again ends with the same bytes as one that ran through. So the file
holds the weights, the optimiser with what its state_dict leaves out, schedule, GradScaler, every random state, and how
far the fold has come. Its last 32 bytes are the SHA-256 of the others.
"""

import hashlib
import os
import pickle
import random
import time

import numpy as np
import torch

import distributed
from common import RANK, STARTED, replacing, say

DIGEST = 32  # bytes of a SHA-256


class ResumeFile:
    """foldK.resume.pt. `owner` (a dict) says whose state it is; at least `minutes` lie between two saves within an
    epoch, and with 0 nothing is saved. `stop_after` seconds from the process' start, or None, the work should stop."""

    def __init__(self, path, minutes, owner, stop_after=None):
        self.path, self.minutes, self.owner, self.stop_after, self.parts = path, minutes, owner, stop_after, {}
        self.last_save = time.monotonic()

    def due(self):
        """Whether it is time to save within the epoch."""
        return self.time_is_up() or (self.minutes > 0 and time.monotonic() - self.last_save >= 60 * self.minutes)

    def time_is_up(self):
        return self.stop_after is not None and time.monotonic() - STARTED >= self.stop_after

    def save(self, progress):
        """Writes the state of everything; `progress` is a dict of tensors, numbers, strings, lists and dicts. The first
        of several processes writes: they are equal but for their random states."""
        randoms = distributed.gather(random_states())
        if self.minutes == 0 or RANK > 0:
            return
        state = dict(
            owner=self.owner,
            progress=progress,
            parts={name: part.state_dict() for name, part in self.parts.items()},
            attributes=plain_attributes(self.parts["optimizer"]),
            random=randoms,
        )
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)
            file.write(hashed.sha256.digest())
        self.last_save = time.monotonic()

    def load(self, **parts):
        """Takes charge of `parts`, the objects with a state_dict, of which `optimizer` is one, and puts everything back
        as it was when the file was saved. → progress, or None where there is nothing to go on from.

        A damaged file, or one of other settings, is named and set aside, and the fold starts over.
        """
        self.parts, self.last_save = parts, time.monotonic()
        if RANK > 0:
            distributed.from_first(0)  # until the first process has looked at the file
        progress = self._load()
        if RANK == 0:
            distributed.from_first(0)
        return progress

    def _load(self):
        if not self.path.exists():
            return None
        try:
            state = read_checked(self.path)
            if state["owner"] != self.owner:
                raise ValueError("it was made with other settings")
        except (ValueError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            aside = self.path.with_suffix(".damaged")
            os.replace(self.path, aside)
            say(f"{self.path} can't be used ({error}): set aside as {aside.name}, the fold starts over")
            return None
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        vars(self.parts["optimizer"]).update(state["attributes"])
        if len(state["random"]) > RANK:
            restore_random_states(state["random"][RANK])
        return state["progress"]

    def remove(self):
        self.path.unlink(missing_ok=True)


class _Hashed:
    """A file whose bytes are hashed as they are written."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def read_checked(path):
    """Reads a resume file. Raises ValueError where a byte of it has changed, or some are missing."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - DIGEST
        while left > 0:
            block = file.read(min(left, 2**22))
            if not block:
                break
            sha256.update(block)
            left -= len(block)
        if left or file.read() != sha256.digest():
            raise ValueError("it is damaged: its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def plain_attributes(optimizer):
    """The optimiser's own numbers and flags: Ranger21 keeps lookahead_step and its warm-up there and leaves them out of
    its state_dict."""
    return {key: value for key, value in vars(optimizer).items() if isinstance(value, (bool, int, float))}


def random_states():
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(torch=torch.get_rng_state(), cuda=cuda, numpy=[kind, keys.tolist(), *rest], python=random.getstate())


def restore_random_states(states):
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    random.setstate(states["python"])
