"""Corrections of transformers' DEIMv2 to the authors' code.

transformers' class (seen in 5.23) differs from the original in three places without a warning: a
COCO checkpoint of 33.6 box AP gives 3.5 with it. Parameter names and shapes are the same, so the
model is built by transformers and corrected afterwards; a correct model is left as it is.
"""

from typing import Any

from torch import Tensor, nn


class FirstOutput:
    """A forward hook that gives a module's first output again until a new forward begins."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def begin(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Forget the kept output."""
        self._first = None

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output of the first call since :meth:`begin`."""
        if self._first is None:
            self._first = output
        return self._first


def restore_original_deimv2(model: Any) -> None:  # noqa: ANN401
    """Change a loaded ``Deimv2ForObjectDetection`` in place to compute what the original computes.

    1. No layer between the encoder's tokens and query selection (transformers: linear, layer norm).
    2. The box heads and the quality estimators use SiLU (transformers: ReLU).
    3. The query position is computed from the initial boxes, once (transformers: in every layer).
    """
    decoder = model.model.decoder
    model.model.enc_output = nn.Identity()
    heads = [model.model.enc_bbox_head, decoder.pre_bbox_head, *decoder.bbox_embed]
    heads += [layer.reg_conf for layer in decoder.lqe_layers]
    for head in heads:
        head.act = nn.SiLU()
    # Hooks and no module around it: the parameters keep the names of the checkpoint.
    position = FirstOutput()
    decoder.register_forward_pre_hook(position.begin)
    decoder.query_pos_head.register_forward_hook(position)
