"""Who changes which weights, and how far."""

import torch

from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.optimisers import build_optimisers, orthogonal
from mfdetr_cache.training.recipes import build_recipe
from tests.support.images import make_spec


def head_of(**changes: str) -> MaskHead:
    torch.manual_seed(0)
    return build_head(build_recipe("fast", {"hidden_dim": "16", **changes}).head, make_spec())


def test_every_parameter_is_changed_by_one_optimiser() -> None:
    head = head_of()
    names = {id(p): n for n, p in head.named_parameters()}
    for optimiser, count in (("adamw", 1), ("muon", 2)):
        made = build_optimisers(head, TrainConfig(optimiser=optimiser))  # type: ignore[arg-type]
        assert len(made) == count
        groups = [g for o in made for g in o.param_groups]
        changed = [names[id(p)] for g in groups for p in g["params"]]
        assert sorted(changed) == sorted(names.values())
        for group in groups:
            for parameter in group["params"]:
                table = names[id(parameter)].endswith(("position", "level_embed"))
                assert (group["weight_decay"] == 0) == (table or parameter.ndim < 2)
    tables = {id(p) for n, p in head.named_parameters() if n.endswith(("position", "level_embed"))}
    assert tables
    muon = {id(p) for p in made[1].param_groups[0]["params"]}
    assert muon == {id(p) for p in head.parameters() if p.ndim == 2} - tables


def test_muon_moves_every_direction_of_a_matrix_equally_far() -> None:
    """The first step against the orthogonal factor of the gradient, by singular values."""
    head = head_of()
    config = TrainConfig(optimiser="muon", lr=1e-2, weight_decay=0)
    optimisers = build_optimisers(head, config)
    chosen = optimisers[1].param_groups[0]["params"]
    before = [p.detach().clone() for p in chosen]
    for parameter in head.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimiser in optimisers:
        optimiser.step()
    for parameter, old in zip(chosen, before, strict=True):
        assert parameter.grad is not None
        left, singular, right = torch.linalg.svd(parameter.grad, full_matrices=False)
        # Liu et al., Eq. 4: the step of a matrix is as large as AdamW's usual one.
        moved = (old - parameter.detach()) / (config.lr * 0.2 * max(parameter.shape) ** 0.5)
        within = left.T @ moved @ right.T
        wanted = singular / singular.norm()
        for _ in range(5):  # Newton-Schulz as Jordan et al. give it, singular value by itself
            wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
        # bfloat16 rounds by 2**-9 of a value, in five rounds of three products and a sum each.
        assert (within.diagonal() - wanted).abs().max() < 0.1
        assert (within - within.diagonal().diag()).abs().max() < 0.1
        assert wanted.median() > 0.65


def test_muon_is_torchs_own_without_its_bfloat16() -> None:
    ours, theirs = head_of(), head_of()
    config = TrainConfig(optimiser="muon", lr=1e-2, weight_decay=0.1)
    (_, muon) = build_optimisers(ours, config)
    names = {id(p): n for n, p in ours.named_parameters()}
    chosen = [names[id(p)] for p in muon.param_groups[0]["params"]]
    weights = dict(theirs.named_parameters())
    plain = torch.optim.Muon(
        [weights[n] for n in chosen],
        lr=config.lr,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    mine = dict(ours.named_parameters())
    steps = 3
    for _ in range(steps):
        for name in chosen:
            mine[name].grad = torch.randn_like(mine[name])
            weights[name].grad = mine[name].grad.clone()
        muon.step()
        plain.step()
    for name in chosen:
        apart = (mine[name] - weights[name]).norm()
        step = config.lr * 0.2 * max(mine[name].shape) ** 0.5 * min(mine[name].shape) ** 0.5
        # As above, 0.1 of a direction; a step that went another way would be 1 or more apart.
        assert apart < 0.1 * steps * step
    state, other = muon.state_dict()["state"], plain.state_dict()["state"]
    assert state.keys() == other.keys()
    for key, values in state.items():
        assert torch.equal(values["momentum_buffer"], other[key]["momentum_buffer"])


def test_matrices_of_one_shape_do_not_touch_one_another() -> None:
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.manual_seed(0)
    matrices = torch.randn(5, 12, 7)
    together = orthogonal(matrices, *settings)
    alone = torch.cat([orthogonal(m[None], *settings) for m in matrices])
    torch.testing.assert_close(together, alone)
    turned = orthogonal(matrices.mT, *settings).mT
    torch.testing.assert_close(together, turned)
    singular = torch.linalg.svdvals(together)
    assert ((singular > 0.6) & (singular < 1.3)).all()
