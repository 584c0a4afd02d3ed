"""The checkpoint file: tensors by name and a JSON header, written whole or not at all, read with every byte
checked. It is data: torch.load(weights_only=True) executes nothing."""
import contextlib
import errno
import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch

from data.binfile import DataError, explain, replacing
from data.tokenizers import Tokenizer
from runtime import memory
from runtime.config import from_tables

FORMAT = 1
DTYPES = {"float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}


class CheckpointError(RuntimeError):
    """A run folder or checkpoint that cannot be used; the message names the file and the remedy."""
    status = 1


class Checkpoint(NamedTuple):
    """What a file holds. header: format, tensors (see table), step, tokens, seconds, val_loss, config,
    tokenizer, ancestry."""
    header: dict
    model: dict                         # name -> tensor
    optimizer: dict                     # "parameter name/state name" -> tensor; empty in ckpt_best


def there(path):
    """Whether something lies at a path. Raises CheckpointError where that cannot be known."""
    try:
        os.stat(path)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as e:
        raise CheckpointError(explain(e, path, done="read", remedy="give another path")) from e


@contextlib.contextmanager
def written(path, needed=0):
    """data.binfile.replacing for what lies in a run folder: its failures are CheckpointErrors."""
    try:
        with replacing(path, needed) as file:
            yield file
    except DataError as e:
        raise CheckpointError(str(e)) from None


def write_text(path, text):
    """Writes a small text file atomically. Raises CheckpointError."""
    with written(path) as file:
        file.write(text.encode())


def table(part):
    """{name: [dtype, shape]} of tensors by name."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in part.items()}


def save(path, header, model_state, optimizer_state=None):
    """Writes a checkpoint so that `path` holds the old one or the new one, never a part.

    Raises CheckpointError if the disk is full or the folder cannot be written; the old file then stays.
    """
    parts = dict(model=model_state, optimizer=optimizer_state or {})
    header = dict(header, format=FORMAT, tensors={name: table(part) for name, part in parts.items()})
    needed = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    with written(path, needed) as file:
        try:
            torch.save(dict(header=json.dumps(header), **parts), file)
        except RuntimeError as e:                           # torch's own, raised over the OSError of the file
            raise e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e))


class Outline(NamedTuple):
    """A tensor that save_each has yet to write; names with one key share its numbers."""
    key: str
    dtype: torch.dtype
    shape: tuple


class Outlines(pickle.Pickler):
    """Writes an Outline as torch.save writes a contiguous tensor whose numbers lie elsewhere in the file."""

    def persistent_id(self, obj):
        if isinstance(obj, torch.UntypedStorage):                       # one that stands for an outline's
            return self.storage
        return None

    def reducer_override(self, obj):
        if not isinstance(obj, Outline):
            return NotImplemented
        kind = torch.storage._dtype_to_storage_type_map()[obj.dtype]
        self.storage = "storage", getattr(torch, kind), obj.key, "cpu", math.prod(obj.shape)
        stride = [math.prod(obj.shape[i + 1:]) for i in range(len(obj.shape))]
        return torch._utils._rebuild_tensor_v2, (torch.UntypedStorage(0), 0, obj.shape, tuple(stride), False,
                                                 OrderedDict())


def save_each(path, header, outlines, tensors):
    """Like save(), of a model that need not fit into memory: outlines {name: Outline}; tensors yields one for
    each key, in the order in which the keys come first. It uses what torch.save itself writes with, which torch
    does not promise to keep: it is the same in torch 2.11, 2.13 and 2.14."""
    stated = {name: [str(o.dtype).removeprefix("torch."), list(o.shape)] for name, o in outlines.items()}
    header = dict(header, format=FORMAT, tensors=dict(model=stated, optimizer={}))
    data, keys = io.BytesIO(), {o.key: o for o in outlines.values()}
    Outlines(data, protocol=2).dump(dict(header=json.dumps(header), model=outlines, optimizer={}))
    sizes = {key: math.prod(o.shape) * o.dtype.itemsize for key, o in keys.items()}
    with written(path, sum(sizes.values())) as file:
        try:
            archive = torch._C.PyTorchFileWriter(file)
            archive.write_record("data.pkl", data.getvalue(), len(data.getvalue()))
            archive.write_record("byteorder", sys.byteorder, len(sys.byteorder))
            for (key, o), t in zip(keys.items(), tensors, strict=True):
                own = t.clone(memory_format=torch.contiguous_format)
                assert (own.dtype, tuple(own.shape)) == (o.dtype, o.shape)
                archive.write_record(f"data/{key}", own.untyped_storage(), sizes[key])
            archive.write_end_of_file()
        except RuntimeError as e:                           # as in save()
            raise e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e))


def load(path, device="cpu", mapped=False):
    """The Checkpoint in a file, every byte checked. mapped: its tensors are views of the file, of which memory
    holds what is used. Raises CheckpointError if it is missing, unreadable, damaged or foreign."""
    if not there(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb"):
            pass
        with zipfile.ZipFile(path) as archive:         # torch itself does not compare the checksums it stores
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        checkpoint = Checkpoint(json.loads(content["header"]), content["model"], content["optimizer"])
        if (version := checkpoint.header["format"]) == FORMAT:
            check_content(checkpoint)
    except (zipfile.BadZipFile, EOFError) as e:
        raise CheckpointError(f"{path}: damaged or cut short ({e}); delete it, or copy it again") from None
    except Exception as e:                              # unpickling a foreign file can raise anything at all
        if isinstance(e, OSError) and e.errno != errno.EINVAL:      # that: it names a place before its begin
            raise CheckpointError(explain(e, path, done="read", remedy="move it away")) from e
        if short := memory.shortage(e):
            raise CheckpointError(f"{path}: {short}") from None
        why = f"{type(e).__name__}: {e}".strip().split("\n")[0]
        raise CheckpointError(f"{path}: not a checkpoint of this program ({why})") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: has format {version}, this code reads format {FORMAT}; use the code "
                              "that wrote it")
    return checkpoint


def check_content(checkpoint):
    """Raises some exception unless all is there that is read later, and the settings are known here."""
    from_tables(checkpoint.header["config"])
    Tokenizer.from_dict(checkpoint.header["tokenizer"])
    whole = isinstance(checkpoint.header["step"], int) and "ancestry" in checkpoint.header
    if not whole or not all(isinstance(t, torch.Tensor) for part in checkpoint[1:] for t in part.values()):
        raise ValueError("parts of it are missing")
    stated = checkpoint.header.get("tensors")                   # older files have no table
    for name, part in (("model", checkpoint.model), ("optimizer", checkpoint.optimizer)):
        check_tensors(part, stated and stated[name])


def check_tensors(part, stated):
    """Raises ValueError for a tensor that is no plain one, or not as the header states it."""
    for name, t in part.items():
        kinds = dict(sparse=t.layout != torch.strided, quantized=t.is_quantized, complex=t.is_complex(),
                     meta=t.device.type == "meta")
        if odd := [kind for kind, is_so in kinds.items() if is_so]:
            raise ValueError(f"the tensor {name} is {odd[0]}, not a plain one")
        if str(t.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"the tensor {name} has the dtype {t.dtype}")
    found = table(part)
    if stated is not None and found != stated:
        name = next(n for n in [*stated, *found] if stated.get(n) != found.get(n))
        is_so, says = (" ".join(map(str, of.get(name, ["missing"]))) for of in (found, stated))
        raise ValueError(f"the tensor {name} is {is_so}, in the header {says}")
