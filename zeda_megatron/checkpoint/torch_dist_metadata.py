"""The index of a torch_dist checkpoint, `.metadata`: a pickle, so it is opened without running anything in it.

Only the classes that PyTorch's own index is made of are let in, and only in the sizes that an index has; after that
every number is checked against the files.

Megatron's loader unpickles: on anybody's checkpoint it is given nothing that could be more than data (`data_only`).
"""

from __future__ import annotations

import io
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..errors import UserError
from ..regular_file import read_regular
from ..strict_json import is_int
from .folders import own_file

METADATA_NAME = ".metadata"
MAX_BYTES = 2_000_000_000
"""Longest index; one of a model with a million tensors has a tenth of that."""
_MAX_AXES, _MAX_PATH = 32, 4096


def _size(lengths: tuple = ()) -> torch.Size:
    if not isinstance(lengths, tuple) or len(lengths) > _MAX_AXES:
        raise pickle.UnpicklingError("a shape in it has too many axes")
    return torch.Size(lengths)


def _path(*parts: str) -> PurePosixPath:
    if not all(isinstance(part, str) for part in parts) or sum(map(len, parts)) > _MAX_PATH:
        raise pickle.UnpicklingError("a path in it is too long")
    return PurePosixPath(*parts)


def _empty(*items: object) -> dict:
    if items:
        raise pickle.UnpicklingError("it copies a dictionary")
    return {}


_PLAIN = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "PurePosixPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
    ("collections", "OrderedDict"): _empty,
}
_CLASSES = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata _MEM_FORMAT_ENCODING"
).split()


_OTHERS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")


class _Inert:
    """Stands for classes that savers leave in an index (their plans) and no reader needs: takes all, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Classes:
    """Knows the index's own classes and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == metadata.__name__ and name in _CLASSES:
            return getattr(metadata, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module.startswith(_OTHERS):
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an index has no use for; refused")


class _Fast(_Classes, pickle.Unpickler):
    pass


class _Careful(_Classes, pickle._Unpickler):
    """In Python, many times slower: its memo is a dictionary. The other's is an array, as long as the largest place
    that the file names, so that five bytes could fill the memory."""

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it has an array of bytes, which an index has no use for")

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: refuse}


def _needs_care(data: bytes) -> bool:
    """Whether something in a pickle looks like a place of the memo, or a length, beyond what the file allows."""
    for found in re.finditer(rb"(?s)r(?=(.{4}))|\x96(?=(.{8}))", data):
        if int.from_bytes(found[1] or found[2], "little") > len(data):
            return True
    return re.search(rb"p\d{9,}", data) is not None


def read_metadata(folder: Path) -> Metadata:
    """Read and check the index of a checkpoint folder; no code of the folder is run.

    Raises:
        UserError: missing or damaged index, one that asks for other classes, or one that names places which are not
            in the folder's files.
    """
    path = own_file(folder, METADATA_NAME, folder)
    try:
        data = read_regular(path, MAX_BYTES)
        kind = _Careful if _needs_care(data) else _Fast
        index = kind(io.BytesIO(data)).load()
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing; the checkpoint is incomplete") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from error
    try:
        problem = _problem(index, folder)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
    if problem:
        raise UserError(f"{path}: {problem}")
    return index


def write_metadata(folder: Path, index: Metadata) -> None:
    """Write the index. The same content always gives the same bytes: no random id, no path of this machine."""
    index.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    index.storage_meta = metadata.StorageMeta()
    (folder / METADATA_NAME).write_bytes(pickle.dumps(index, protocol=4))


def _problem(index: Any, folder: Path) -> str | None:
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        return "is no index of a checkpoint"
    if not isinstance(index.storage_data, dict):
        return "does not say where the tensors are"
    sizes: dict[str, int] = {}
    for at, place in index.storage_data.items():
        name = place.relative_path
        if name not in sizes:
            file = own_file(folder, name, folder / METADATA_NAME)
            if not file.is_file():
                raise UserError(f"{file}: file is missing; the checkpoint is incomplete")
            sizes[name] = file.stat().st_size
        if not (is_int(place.offset) and is_int(place.length) and place.offset >= 0 and place.length >= 0):
            return f"tensor {at.fqn} has no place"
        if place.offset + place.length > sizes[name]:
            raise UserError(
                f"{folder / name}: file is truncated, tensor {at.fqn} ends at byte {place.offset + place.length} "
                f"but the file has {sizes[name]}"
            )
        if getattr(place, "transform_descriptors", None):
            return f"tensor {at.fqn} is stored compressed, which is not supported"
    for key, item in index.state_dict_metadata.items():
        problem = _chunk_problem(key, item) if isinstance(item, TensorStorageMetadata) else None
        if problem:
            return problem
    return None


def _chunk_problem(key: Any, item: TensorStorageMetadata) -> str | None:
    size = tuple(item.size)
    if not isinstance(key, str) or not isinstance(item.properties.dtype, torch.dtype):
        return f"tensor {key} has no name or type"
    if any(n < 0 for n in size):
        return f"tensor {key} has shape {list(size)}"
    for chunk in item.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        fits = len(offsets) == len(sizes) == len(size) and all(
            o >= 0 and n >= 0 and o + n <= whole for o, n, whole in zip(offsets, sizes, size)
        )
        if not fits:
            return f"tensor {key} has a part {list(offsets)} + {list(sizes)} outside its shape {list(size)}"
    return None


_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""PyTorch's own switches. Its planner asks for `weights_only=False` for what is no tensor; the first overrules that."""


@contextmanager
def data_only(folder: Path, index: Metadata) -> Iterator[Path]:
    """A stand-in for `folder` to load from: links to its files, an index written anew, plain values where all look.

    Args:
        index: of that folder, as `read_metadata` made it. The pickle in the folder is not opened again: what one reader
            found harmless may be code to another.
    """
    with tempfile.TemporaryDirectory(prefix="zeda-index-") as made, plain_objects():
        view = Path(made)
        for path in folder.iterdir():
            if path.name != METADATA_NAME:
                (view / path.name).symlink_to(path.absolute())
        with open(view / METADATA_NAME, "wb") as file:
            pickle.dump(index, file, protocol=4)
        if not (view / PLAIN_VALUES).exists():
            _write_plain_values(folder, index, view / PLAIN_VALUES)
        yield view


PLAIN_VALUES = "common.pt"
"""What a checkpoint holds besides tensors, in a file of its own; Megatron-Core 0.19 reads that, and writes another
place: an object among the tensors, which 0.16 does not look for."""
_AMONG_TENSORS = metadata.MetadataIndex("common_state/shard_0_1")


def _write_plain_values(folder: Path, index: Metadata, file: Path) -> None:
    place = index.storage_data.get(_AMONG_TENSORS)
    if place is None:
        return
    stored = folder / place.relative_path
    try:
        with open(stored, "rb") as source:
            source.seek(place.offset)
            data = io.BytesIO(source.read(place.length))
        (values,) = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{stored}: {_AMONG_TENSORS.fqn} cannot be read ({reason})") from error
    torch.save(values, file)


@contextmanager
def plain_objects() -> Iterator[None]:
    """While this lasts, `torch.load` makes tensors and plain objects only, whatever its caller or the user asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
