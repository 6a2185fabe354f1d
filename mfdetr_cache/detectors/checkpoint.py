"""Checkpoint files of the detectors' authors, read without executing code in them."""

import argparse
import builtins
import contextlib
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mfdetr_cache.detectors.other_files import has_model_type, told_of_file
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.ops.plain_tensors import is_plain

# Where the weights are, the first that is there. Averaged weights come before the last ones where
# the authors' own loaders prefer them (RT-DETR, D-FINE, DEIM), and after them where these read
# "model" (Deformable DETR, DINO, LW-DETR, RF-DETR).
_WEIGHT_KEYS = (
    ("ema", "module"),
    ("ema_state_dict",),
    ("model",),
    ("state_dict",),
    ("model_state_dict",),
    ("ema_model",),
    ("model_ema",),
    ("module",),
)
# Where ultralytics keeps modules that were saved whole; its averaged one is there while it trains.
_MODULE_KEYS = ("ema", "model")
# Where training scripts keep their arguments.
_SETTING_KEYS = [
    "args",
    "model_config",
    "hyper_parameters",
    "train_args",
    "train_config",
    "config",
    "cfg",
    "meta",
]
_LIGHTNING_KEYS = {"hyper_parameters", "pytorch-lightning_version"}
# What torch says of a name that it does not know, and of a class that is filled like a dictionary.
_UNKNOWN = r"(?:GLOBAL|global) ([\w.]+)"
_FILLED = r"Can only SETITEMS? .* got <class '(?:\w+\.)*(\w+)'>"
_HUB_FILE = "model.safetensors"
_BLOCK = 2**20
# More than any detector has.
_MOST_MODULES, _LONGEST_NAME, _MOST_CLASSES = 100_000, 1000, 100_000
_NAME_KEYS = ("class_names", "classes", "names", "categories", "id2label")
# Nothing of these modules is configuration: a file that names them wants to do something.
_REFUSED_MODULES = {
    *("ctypes", "importlib", "nt", "os", "posix"),
    *("runpy", "shutil", "socket", "subprocess", "sys"),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: The state dict; prefixes of wrappers (``module.``, ``model.``) are removed.
        class_names: Names of the classes in the order of the file; empty where it has none.
        settings: Plain values of the training arguments stored with the weights.
    """

    path: Path
    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def require_settings(self, read: Mapping[str, object]) -> None:
        """DetectorError if the training had another value of a setting that no tensor tells.

        ``read`` are the values that are read; a setting that the file lacks is meant to be so.
        """
        for name, value in read.items():
            if self.settings.get(name, value) != value:
                raise DetectorError(
                    f"{self.path} was trained with {name}={self.settings[name]}, which is not "
                    f"read; {name}={value} is"
                )


class _Inert:
    """Stands for an object of a class that is not loaded; its fields are kept, it does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __new__(cls, *_args: object, **_kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple):  # the fields, and those of slots
            state = {k: v for part in state if isinstance(part, dict) for k, v in part.items()}
        if isinstance(state, dict):
            self.__dict__.update(state)


class _InertDict(_Inert):
    """The same for classes that are dictionaries: torch fills no other kind of one."""

    def __new__(cls, *_args: object, **_kwargs: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


class _InertList(list[object]):
    def __new__(cls, *_args: object) -> "_InertList":
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        super().__init__()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read weights, class names and settings of a ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors``.

    Weights are at the top or under a key of training scripts (:data:`_WEIGHT_KEYS`). DetectorError
    if the file is missing, damaged, without weights, or would execute code.
    """
    if is_authors_folder(path):
        path = path / _HUB_FILE
    if path.is_dir():
        raise DetectorError(
            f"{path} is a folder; this detector takes a checkpoint file (.pth), and folders of "
            "transformers are read without --detector"
        )
    if not path.is_file():
        raise DetectorError(f"checkpoint {path} does not exist; check --weights")
    if _is_safetensors(path):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, f"is no safetensors file ({error})") from error
        return Checkpoint(path, _without_wrappers(_floats(tensors, path)))
    document = _load_pickle(path)
    settings = _settings(document)
    return Checkpoint(path, _state_dict(document, path), _class_names(document, settings), settings)


def is_authors_folder(path: Path) -> bool:
    """Whether a folder holds weights but no configuration with a transformers model type."""
    return (path / _HUB_FILE).is_file() and not has_model_type(path)


def _load_pickle(path: Path) -> object:
    try:
        zipped = _is_zip(path)
        if zipped:
            _require_whole(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipped else []
        inert = {name: _inert(path, name) for name in names}
        while True:
            try:
                with torch.serialization.safe_globals([(v, k) for k, v in inert.items()]):
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            except pickle.UnpicklingError as error:
                # torch names what it met; its advice to load unsafely is not passed on.
                name, kind = _met(_UNKNOWN, error), _met(_FILLED, error)
                name = name if "." in name else f"builtins.{name}"
                filled = {k: _InertDict for k, v in inert.items() if v.__name__ == kind}
                if _met(_UNKNOWN, error) and name not in inert:
                    inert[name] = _inert(path, name)  # files before torch 1.6 list no names
                elif filled:
                    inert |= filled
                else:
                    raise _unreadable(path, "cannot be read as a checkpoint") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError) as error:
        raise _unreadable(path, "is damaged or no PyTorch checkpoint") from error


def _unreadable(path: Path, what: str) -> DetectorError:
    if told := told_of_file(path):
        what = told
    elif path.suffix == ".pkl":
        what = (
            "is a pickle of arrays, as detectron2 writes them, or damaged; load it with pickle "
            "where you trust it, and torch.save its state dict as tensors"
        )
    return DetectorError(f"{path} {what}")


def _require_whole(path: Path) -> None:
    """Compare what is in a zip with its checksums, which torch writes and does not look at."""
    try:
        with zipfile.ZipFile(path) as packed:
            unpacked = sum(entry.file_size for entry in packed.infolist())
            for entry in packed.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or unpacked > path.stat().st_size:
                    again = "was packed again with compression; load it with torch and save it"
                    raise _unreadable(path, again)
                # torch can be told to write none.
                with packed.open(entry) as file:
                    while entry.CRC and file.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, struct.error, UnicodeError, OverflowError) as error:
        raise DetectorError(f"{path} is damaged: its content is not what was saved") from error


def _met(pattern: str, error: pickle.UnpicklingError) -> str:
    found = re.search(pattern, str(error))
    return found[1] if found else ""


def _inert(path: Path, name: str) -> type:
    """What stands for a class of this name; DetectorError if it may do something."""
    if name == "argparse.Namespace":
        return argparse.Namespace
    module, _, kind = name.rpartition(".")
    is_function = module == "builtins" and not isinstance(getattr(builtins, kind, None), type)
    # mmengine's logs name their methods by getattr; what stands for it here looks nothing up.
    if (is_function and kind != "getattr") or module.split(".")[0] in _REFUSED_MODULES:
        raise DetectorError(
            f"{path} asks for {name} to be run while loading, which is refused; save its state "
            "dict alone (torch.save(checkpoint['model'], ...)) where you trust it"
        )
    return _InertList if name == "collections.deque" else type(kind, (_Inert,), {})


def _is_safetensors(path: Path) -> bool:
    """By its first bytes, where they are those of one kind; else by its name."""
    with path.open("rb") as file:
        length, begins = int.from_bytes(file.read(8), "little"), file.read(1)
    if begins == b"{" and length < path.stat().st_size:
        return True
    if path.suffix == ".safetensors" and _is_zip(path):
        raise DetectorError(f"{path} is a checkpoint of torch; rename it to {path.stem}.pth")
    return path.suffix == ".safetensors"


def _is_zip(path: Path) -> bool:
    """Files of torch before 1.6 are plain pickles and cannot be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _state_dict(document: object, path: Path) -> dict[str, Tensor]:
    found = document
    try:
        if isinstance(document, Mapping):
            # mmengine puts the averaged weights into state_dict, and the others into
            # ema_state_dict.
            swapped = "state_dict" in document and "meta" in document
            places = (("state_dict",),) if swapped else _WEIGHT_KEYS
            modules = (_module_tensors(document.get(key)) for key in _MODULE_KEYS)
            dicts = (_inner(document, keys) for keys in places)
            found = next((inner for inner in (*modules, *dicts) if inner), found)
        else:
            found = _module_tensors(document)
    except ValueError as error:
        raise DetectorError(f"{path}: {error}") from error
    if not isinstance(found, Mapping) or not found:
        looked = ", ".join(".".join(keys) for keys in _WEIGHT_KEYS)
        raise _unreadable(path, f"holds no state dict (looked for {looked})")
    wrong = [k for k, v in found.items() if not isinstance(v, Tensor)]
    if wrong:
        raise _unreadable(path, f"is no state dict of a detector: {wrong[0]} in it is no tensor")
    tensors = _floats({str(k): v.detach() for k, v in found.items()}, path)
    if isinstance(document, Mapping) and document.keys() & _LIGHTNING_KEYS:
        # Lightning keeps losses and metrics beside the model.
        tensors = {k: v for k, v in tensors.items() if k.startswith("model.")} or tensors
    return _without_wrappers(tensors)


def _floats(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same; DetectorError if one is no plain tensor, or of numbers without their scale."""
    quantised = (torch.int8, torch.uint8)
    odd = [k for k, v in tensors.items() if v.dtype in quantised or not is_plain(v)]
    if odd:
        raise DetectorError(
            f"{path}: {odd[0]} is quantised, complex, sparse or without its numbers; save the "
            "state dict of the float model, with contiguous tensors"
        )
    return tensors


def _inner(document: Mapping[Any, object], keys: Sequence[str]) -> Mapping[Any, object]:
    inner: object = document
    for key in keys:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _module_tensors(module: object) -> dict[str, object]:
    """The state dict of a module that was saved whole; empty for anything else.

    ValueError if it holds itself, or more modules than a detector has.
    """
    found: dict[str, object] = {}
    waiting = [("", module)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            return found
        prefix, inner = waiting.pop()
        fields = vars(inner) if isinstance(inner, _Inert) else {}
        not_kept = fields.get("_non_persistent_buffers_set")
        not_kept = not_kept if isinstance(not_kept, set) else set()
        for name, value in (*_named(fields, "_parameters"), *_named(fields, "_buffers")):
            if value is not None and name not in not_kept:
                found[f"{prefix}{name}"] = value
        waiting += [(f"{prefix}{name}.", child) for name, child in _named(fields, "_modules")]
        if len(prefix) > _LONGEST_NAME:
            break
    raise ValueError("its modules hold each other without an end")


def _named(fields: Mapping[str, Any], kind: str) -> list[tuple[Any, object]]:
    values = fields.get(kind)
    return list(values.items()) if isinstance(values, Mapping) else []


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch's wrappers, and modules that hold the detector, put before them."""
    # torch's AveragedModel counts beside its module.
    found = {k.replace("_orig_mod.", ""): v for k, v in tensors.items() if k != "n_averaged"}
    found = {k.removeprefix("module."): v for k, v in found.items()}
    prefixes = {name.partition(".")[0] for name in found}
    # A number is a layer's.
    if len(prefixes) == 1 and "." in min(found) and not (prefix := prefixes.pop()).isdecimal():
        return _without_wrappers({k.removeprefix(f"{prefix}."): v for k, v in found.items()})
    return found


def _settings(document: object) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(document, Mapping):
        for key in _SETTING_KEYS:
            for name, value in _fields(document.get(key)):
                found.setdefault(name, value)
    return found


def _fields(value: object, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Plain fields of an arguments object, also where it lies inside another."""
    if not isinstance(value, Mapping):
        with contextlib.suppress(TypeError):
            value = vars(value)
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        if isinstance(inner, (str, int, float, bool, list, tuple)):
            yield str(name), inner
        elif depth and inner is not None and not isinstance(inner, Tensor):
            yield from _fields(inner, depth - 1)


def _class_names(document: object, settings: Mapping[str, Any]) -> tuple[str, ...]:
    places: list[object] = [settings.get("class_names")]
    if isinstance(document, Mapping):
        # mmengine has them in meta.dataset_meta, older files of mmdetection in meta itself.
        of_meta = {name.lower(): value for name, value in _fields(document.get("meta"))}
        modules = [document.get(key) for key in _MODULE_KEYS]
        of_modules = [vars(m).get("names") for m in modules if isinstance(m, _Inert)]
        of_file = [document.get(key) for key in _NAME_KEYS]
        places = [*of_file, *of_modules, *places, of_meta.get("classes")]
    for names in places:
        if isinstance(names, Mapping) and all(str(k).isdecimal() for k in names):
            by_output = {int(k): name for k, name in names.items()}
            count = min(max(by_output, default=-1) + 1, _MOST_CLASSES)
            names = [by_output.get(i, "") for i in range(count)]
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return tuple(names)
    return ()
