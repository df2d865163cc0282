"""The index of a torch_dist checkpoint, `.metadata`: a pickle, so it is opened without running anything in it.

Only the classes that PyTorch's own index is made of are let in; after that every number is checked against the files.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..errors import UserError
from ..strict_json import is_int
from .own_files import own_file

METADATA_NAME = ".metadata"
_PLAIN = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("collections", "OrderedDict"): dict,
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


class _Unpickler(pickle.Unpickler):
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


def read_metadata(folder: Path) -> Metadata:
    """Read and check the index of a checkpoint folder; no code of the folder is run.

    Raises:
        UserError: missing or damaged index, one that asks for other classes, or one that names places which are not
            in the folder's files.
    """
    path = own_file(folder, METADATA_NAME, folder)
    try:
        with path.open("rb") as stream:
            index = _Unpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing; the checkpoint is incomplete") from None
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
