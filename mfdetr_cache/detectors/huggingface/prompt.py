"""Classes by their names: what an open-vocabulary detector reads, and its scores by phrase."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfdetr_cache.errors import DetectorError

# What ends a phrase; such a detector attends within phrases only.
_STOPS = ".?"
# Keeps the logit of a probability finite in float32.
_SMALLEST = 1e-30


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption of phrases as Grounding DINO's authors write it: ``elephant . tiger .``.

    Attributes:
        phrases: The classes, in the order of the labels.
        spans: First token of each phrase, and the one after its last.
    """

    phrases: tuple[str, ...]
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def class_logits(self, token_logits: Tensor) -> Tensor:
        """Logits of the phrases (B, Q, K) from those of the tokens (B, Q, T).

        A phrase has the mean probability of its tokens, as in the authors' evaluation on COCO
        (IDEA-Research/GroundingDINO ``demo/test_ap_on_coco.py``, mmdetection's
        ``convert_grounding_to_cls_scores``); this is its logit.
        """
        probabilities = token_logits.double().sigmoid()
        means = [probabilities[..., first:end].mean(-1) for first, end in self.spans]
        mean = torch.stack(means, dim=-1).clamp(min=_SMALLEST)
        return (mean.log() - (1 - mean).clamp(min=_SMALLEST).log()).to(token_logits.dtype)


def read_prompt(phrases: Sequence[str], tokenizer: Any, most: int) -> Prompt:  # noqa: ANN401
    """Tokens of a caption of phrases, with a tokenizer of transformers; ``most`` tokens at most.

    DetectorError if it is longer or a phrase has no token.
    """
    ids: list[int] = [tokenizer.cls_token_id]
    stop = tokenizer.convert_tokens_to_ids(".")
    spans = []
    for phrase in phrases:
        words = re.sub(f"[_{re.escape(_STOPS)}]", " ", phrase)
        tokens = tokenizer(words, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise DetectorError(f"--prompt: the class {phrase!r} has no word; give it a name")
        spans.append((len(ids), len(ids) + len(tokens)))
        ids += [*tokens, stop]
    ids.append(tokenizer.sep_token_id)
    if len(ids) > most:
        raise DetectorError(
            f"--prompt: {len(phrases)} classes are {len(ids)} tokens, and this detector reads "
            f"{most}; give fewer classes, or extract with one half after the other"
        )
    return Prompt(tuple(phrases), tuple(ids), tuple(spans))
