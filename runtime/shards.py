"""safetensors files, one or several shards: read from a folder that strangers wrote, every header
checked before a number is read, and written."""
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from data.binfile import DataError
from data.foreign import MEGABYTE, inside, parsed, read_json
from settings import ConfigError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor of a file, as its header states it."""
    path: Path
    dtype: torch.dtype
    shape: tuple


def needed():
    """The package safetensors. Raises ConfigError with the command that installs it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ConfigError("the package safetensors is not installed: `pip install -r "
                          "requirements-hub.txt` or `uv sync --extra hub`") from None
    return safetensors


def read_header(path):
    """{name: Entry} of a safetensors file: 8 bytes of length, a JSON object, and the numbers,
    without gaps."""
    def wrong(why):
        return DataError(f"{path}: {why}; download it again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 * MEGABYTE):
            raise wrong("damaged or cut short: its header does not fit into it")
        header = parsed(file.read(length), path)
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, about in header.items():
        whole = lambda x: isinstance(x, list) and len(x) < 9 and all(  # noqa: E731
            type(n) is int and 0 <= n < 2**48 for n in x)
        if not isinstance(about, dict) or not whole(about.get("shape")) or not (
                whole(about.get("data_offsets")) and len(about["data_offsets"]) == 2):
            raise wrong(f"the header of tensor {name[:80]} is damaged")
        if str(about.get("dtype")) not in DTYPES:
            raise DataError(f"{path}: tensor {name[:80]} has the dtype "
                            f"{str(about.get('dtype'))[:20]}; read are {', '.join(DTYPES)}")
        found[name] = Entry(path, DTYPES[about["dtype"]], tuple(about["shape"]))
        begin, end = about["data_offsets"]
        spans.append((begin, end))
        if end - begin != math.prod(about["shape"]) * found[name].dtype.itemsize:
            raise wrong(f"tensor {name[:80]} does not have the bytes of its shape {about['shape']}")
    ends = [0, *(end for _, end in sorted(spans))]
    if [begin for begin, _ in sorted(spans)] != ends[:-1] or ends[-1] != size - 8 - length:
        raise wrong("damaged or cut short: its tensors do not fill it")
    return found


def read_headers(folder):
    """{name: Entry} of all safetensors files of a folder, one or those that its index names."""
    single, index = (os.path.lexists(Path(folder) / name) for name in (SINGLE, INDEX))
    if not single and not index:
        raise DataError(f"{folder}: holds no {SINGLE} and no index of several; pickled weights are "
                        "not read")
    if single:
        return read_header(inside(folder, SINGLE))
    stated = read_json(folder, INDEX, 100 * MEGABYTE).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise DataError(f"{folder}/{INDEX}: has no weight_map; download it again")
    files = {}
    for file in dict.fromkeys(map(str, stated.values())):
        if not file.endswith(".safetensors"):
            raise DataError(f"{folder}/{INDEX}: names {file[:80]!r}; only *.safetensors are read")
        files[file] = read_header(inside(folder, file))
    for name, file in stated.items():
        if name not in files[str(file)]:
            raise DataError(f"{folder}/{file}: lacks the tensor {name[:80]}, which {INDEX} places "
                            "there")
    for file, held in files.items():
        for name in held:
            if stated.get(name) != file:
                raise DataError(f"{folder}/{file}: has the tensor {name[:80]}, which {INDEX} does "
                                "not place there")
    return {name: entry for held in files.values() for name, entry in held.items()}


def check(folder, entries, wanted, spare):
    """Raises DataError unless the files hold the tensors wanted {name: shape}, and no others but
    those whose names end with one of the tuple `spare`."""
    for name, shape in wanted.items():
        if name not in entries:
            raise DataError(f"{folder}: lacks the tensor {name}")
        if entries[name].shape != shape:
            raise DataError(f"{folder}: the tensor {name} is {entries[name].shape}, not {shape}")
    for name in entries.keys() - wanted.keys():
        if not name.endswith(spare):
            raise DataError(f"{folder}: has the tensor {name[:80]}, for which there is no place")


def read_tensor(entries, name):
    """A tensor, which stays in its file until it is used."""
    with needed().safe_open(entries[name].path, "pt") as file:
        return file.get_tensor(name)


def write(folder, tensors, most):
    """Writes {name: tensor} as one file or, where they have more than `most` bytes, as several and
    an index."""
    groups, room = [[]], most
    for name, t in tensors.items():
        if groups[-1] and t.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= t.nbytes
    n = len(groups)
    files = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    for group, file in zip(groups, files):
        part = {name: tensors[name].contiguous() for name in group}
        needed().torch.save_file(part, Path(folder) / file, metadata={"format": "pt"})
    if n > 1:
        index = dict(metadata=dict(total_size=sum(t.nbytes for t in tensors.values())),
                     weight_map={name: file for group, file in zip(groups, files)
                                 for name in group})
        (Path(folder) / INDEX).write_text(json.dumps(index, indent=1))
