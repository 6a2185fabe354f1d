"""DEIMv2 as its authors wrote it.

transformers' class (seen in 5.23) differs from the original in three places and says nothing: a
COCO checkpoint of 33.6 box AP gives 3.5 with it. Parameter names and shapes are the same, so the
model is built by transformers and put right afterwards; each step leaves a correct model as it is.
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
    """Make transformers' DEIMv2 compute what the original computes.

    1. Nothing stands between the encoder's tokens and query selection (transformers puts a linear
       layer and a layer norm there).
    2. The box heads and the quality estimators use SiLU (transformers: ReLU).
    3. The query position comes from the initial boxes, once (transformers: again in every layer).

    Args:
        model: ``Deimv2ForObjectDetection`` with its weights loaded; changed in place.
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
