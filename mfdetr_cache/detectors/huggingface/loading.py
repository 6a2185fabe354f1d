"""A transformers detector from its folder or from the hub."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save
from torch import Tensor, nn

from mfdetr_cache.config import nearest
from mfdetr_cache.detectors.huggingface.adapter import HuggingFaceDetector, Origin
from mfdetr_cache.detectors.huggingface.families import FAMILIES, Family
from mfdetr_cache.detectors.huggingface.prompt import read_prompt
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.other_files import told_of_file, told_of_folder
from mfdetr_cache.detectors.preprocess import Preprocessing
from mfdetr_cache.errors import DetectorError, MfdetrError
from mfdetr_cache.files import write_atomically, writing

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_huggingface_detector(
    weights: str, options: DetectorOptions, categories: Sequence[str] = ()
) -> HuggingFaceDetector:
    """Load a transformers detector from a folder or a hub id, frozen, on the CPU.

    A folder has ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, and one
    that takes a prompt its tokenizer; ``categories`` are its prompt where the options have none.
    DetectorError if it is no detector, is of an unknown family, or its weights do not fit.
    """
    folder = Path(weights)
    # transformers leaves an adapter beside a model out without a word, where peft is missing.
    is_adapter = (folder / "adapter_config.json").is_file()
    if folder.is_dir() and (is_adapter or not (folder / "config.json").is_file()):
        raise DetectorError(f"{weights} is no detector: {told_of_folder(folder)}")
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise DetectorError(f"{weights} is a file; --detector hf takes a folder or a hub id")
    if not folder.exists() and (weights.count("/") != 1 or weights.startswith((".", "/"))):
        raise DetectorError(f"{weights} does not exist, and is no hub id (owner/name) either")
    if odd := next((f for f in folder.glob("*") if not (f.is_file() or f.is_dir())), None):
        raise DetectorError(f"{odd} is no regular file: it is none of a detector")
    for file in folder.glob("*.safetensors"):
        if told := told_of_file(file, of_folder=True):
            raise DetectorError(f"{file} {told}")
    try:
        return _loaded(weights, options, categories)
    except (MfdetrError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever its classes meet in the files
        reason = next(iter(str(error).strip().splitlines()), repr(error))[:300]
        raise DetectorError(f"cannot load the detector {weights}: {reason}") from error


def _loaded(
    weights: str, options: DetectorOptions, categories: Sequence[str]
) -> HuggingFaceDetector:
    with quiet():
        # The type is looked at before anything of the folder is used, and code in it never is.
        config, _ = transformers.PretrainedConfig.get_config_dict(weights)
        family = _family_of(str(config.get("model_type")), weights)
        _require_own_parts(config, weights)
        if config.get("quantization_config"):
            raise DetectorError(f"{weights} is quantised; give the model that it was made from")
        names = [Path(weights) / name for name in _PROCESSOR_FILES]
        if Path(weights).is_dir() and not any(name.is_file() for name in names):
            raise DetectorError(
                f"{weights} has no {_PROCESSOR_FILES[0]}, which says how its images are scaled; "
                "copy that of the model that it was trained from"
            )
        if not options.labels:
            _require_counted_labels(config.get("id2label"), weights)
        processor = transformers.AutoImageProcessor.from_pretrained(
            weights, trust_remote_code=False
        )
        kind: Any = transformers.AutoModelForObjectDetection
        processors, prompt = [processor], None
        if family.takes_prompt:
            kind = transformers.AutoModelForZeroShotObjectDetection
            tokenizer = transformers.AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
            processors.append(tokenizer)
            most = int(config.get("max_text_len", 256))
            prompt = read_prompt(asked_for(options, categories, weights), tokenizer, most)
        elif options.prompt:
            raise DetectorError(f"--prompt: {family.label} has its own classes; leave it out")
        model, info = kind.from_pretrained(
            weights,
            output_loading_info=True,
            # Their pickles are read by torch's loader of plain tensors, which runs nothing.
            use_safetensors=not _has_pickles_alone(Path(weights)),
            weights_only=True,
            ignore_mismatched_sizes=True,  # named below
            dtype=torch.float32,
            trust_remote_code=False,
            # Of models that were saved compiled or wrapped.
            key_mapping={r"^(_orig_mod\.|module\.)+": ""},
        )
    _check_loaded(weights, info, model.config.num_labels)
    into_own_memory(model)
    named_weights = model.state_dict(keep_vars=True)
    if family.correct is not None:
        family.correct(model)
    origin = Origin(
        name=f"hf:{family.model_type}",
        where=weights,
        known_names=dict(enumerate(prompt.phrases))
        if prompt is not None
        else {int(i): str(name) for i, name in model.config.id2label.items()},
        settings={"corrected": family.correct is not None},
        save=partial(_save_folder, model, named_weights, processors),
        prompt=prompt,
    )
    preprocessing = Preprocessing.from_processor(processor.to_dict(), weights).with_size(
        options.input_size
    )
    return HuggingFaceDetector(model, family, origin, preprocessing, options)


def _require_own_parts(config: Any, weights: str) -> None:  # noqa: ANN401  any JSON
    """Refuse a configuration that asks for another repository, whose code might be run."""
    for name, value in config.items() if isinstance(config, dict) else ():
        named = isinstance(value, str) and any(c in value for c in "/\\:")
        if name == "trust_remote_code" or (name == "backbone" and named):
            raise DetectorError(
                f"{weights}: its config.json has {name} {str(value)[:60]!r}, which is in no "
                "supported detector; other repositories are not fetched and no code is run"
            )
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, dict | list):
            _require_own_parts(value, weights)


def _save_folder(
    model: Any,  # noqa: ANN401
    named_weights: Mapping[str, Tensor],
    processors: Sequence[Any],
    folder: Path,
) -> str:
    """Write a folder that ``--detector hf`` takes."""
    with quiet(), writing(folder):
        model.save_pretrained(folder)
        for processor in processors:
            processor.save_pretrained(folder)
    # Under the names of the checkpoint and every one: transformers leaves out those it believes to
    # be shared.
    weights = {k: v.detach().cpu().clone() for k, v in named_weights.items()}
    write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    return str(folder)


def asked_for(options: DetectorOptions, categories: Sequence[str], weights: str) -> Sequence[str]:
    """The classes that an open-vocabulary detector is to find."""
    if options.labels:
        raise DetectorError("--labels: the classes of this detector are those of --prompt")
    if not (options.prompt or categories):
        raise DetectorError(f"{weights} finds what it is told: give --prompt 'elephant. tiger.'")
    return options.prompt or categories


def into_own_memory(model: nn.Module) -> None:
    """Copy the weights, in place, out of the mapped file to memory that torch aligns.

    Their alignment in the file depends on the length of its header, and some CPU kernels sum in
    another order then: equal weights in files of another layout would give caches that differ in
    last bits.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def _family_of(model_type: str, weights: str) -> Family:
    if model_type not in FAMILIES:
        hint = nearest(model_type, list(FAMILIES))
        raise DetectorError(f"{weights}: model type {model_type!r} has no adapter{hint}")
    return FAMILIES[model_type]


def _check_loaded(weights: str, info: dict[str, Any], num_classes: int) -> None:
    for key, found, wanted in sorted(info.get("mismatched_keys") or ()):
        raise DetectorError(
            f"{weights}: {key} has shape {tuple(found)} in its weights and {tuple(wanted)} by its "
            f"config.json, whose id2label names {num_classes} classes; they are not of one model"
        )
    for kind in ("missing_keys", "unexpected_keys"):
        keys = sorted(str(k) for k in info.get(kind) or ())
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            others = sorted(info.get("unexpected_keys") or ()) if kind == "missing_keys" else []
            instead = f" (it has {others[0]} and such)" if others else ""
            raise DetectorError(
                f"{weights}: {kind.replace('_', ' ')} in its weights: {shown}{instead}; "
                "the result would be partly random"
            )


def _has_pickles_alone(folder: Path) -> bool:
    """Whether a folder has its weights as transformers wrote them before safetensors."""
    return any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("*.safetensors*"))


def _require_counted_labels(id2label: object, weights: str) -> None:
    """Refuse names that are of no output, or of another one than they say."""
    try:
        ids = sorted(int(i) for i in id2label)  # type: ignore[attr-defined]
        is_wrong = ids != list(range(len(ids)))
    except (TypeError, ValueError):
        is_wrong = id2label is not None
    if is_wrong or isinstance(id2label, list):
        raise DetectorError(
            f"{weights}: id2label of its config.json does not number its classes from 0 on; mend "
            "it, or give their names with --labels"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the user's screen; errors are ours."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Loading writes a bar through tqdm directly in some versions.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
