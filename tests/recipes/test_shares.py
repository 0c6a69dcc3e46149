"""How target heads that copy one source head share its update: least squares on contexts whose answer is known."""

import pytest
import theseus_transport as tt
import torch
from exact import pairs as p
from exact.models import LLAMA, Spec, base, batches, tune
from test_head_pairing import contexts, disguised, moment
from theseus_transport.recipes.coherent_heads import shares
from torch import Tensor

FLOOR = 1e-12
SIZE = 5


def weights(source: Tensor, *copies: Tensor, turned: bool = True) -> tuple[list[float], list[float]]:
    """Shares and fits of heads [tokens, SIZE] that copy one head [tokens, SIZE], each by the map it would get, or by
    maps that turn nothing."""
    target, loud, count = torch.stack(copies, 1), source.square().sum(), len(copies)
    cross = moment(source[:, None], target).cross.unflatten(1, (count, -1)).transpose(0, 1)
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    maps = u @ vh if turned else torch.eye(SIZE).double().expand(count, -1, -1)
    scale = torch.stack([(c.square().sum() / loud).sqrt() if c.any() else torch.ones(()).double() for c in copies])
    chosen, gram = torch.zeros(count, dtype=torch.long), moment(target, target).cross
    found = shares(chosen, cross, maps, scale, loud.expand(count), gram, floor=FLOOR)
    return found[0].tolist(), found[1].tolist()


APART = torch.linalg.qr(contexts(3).flatten(1)).Q.unflatten(1, (3, SIZE))
X, OTHER, THIRD = APART.unbind(1)  # no feature of one says anything of another's
TURNED = disguised(X[:, None], [0])[:, 0]


def near(*values: float) -> object:
    return pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_copies_share_alike_whatever_their_axes_and_scale(count: int) -> None:
    source = contexts(1)
    copies = disguised(source, [0] * count).unbind(1)
    assert weights(source[:, 0], *copies) == (near(*[1 / count] * count), near(*[1.0] * count))


def test_a_head_with_nothing_to_do_with_it_takes_nothing() -> None:
    """Loud or quiet, once or as copies of each other, and silent ones too."""
    for others in ([OTHER], [1e-3 * OTHER], [1e3 * OTHER], [OTHER, THIRD], [OTHER, OTHER], [0 * X]):
        share, fit = weights(X, X, *others)
        assert (share, fit) == (near(1, *[0] * len(others)), near(1, *[0] * len(others)))
        assert not any(share[1:]) and not any(fit[1:])  # exactly, so that nothing counts such a head
    share, fit = weights(X, TURNED, OTHER, 3 * X)
    assert (share, fit) == (near(0.5, 0, 0.5), near(1, 0, 1))


def test_weights_are_those_of_least_squares_where_they_explain_all() -> None:
    a, b = contexts(2).unbind(1)
    a, b = a / a.norm(), b / b.norm()
    b = b + 0.3 * a
    x = 2 * a + b / b.norm()
    share, _ = weights(x, a, b, turned=False)
    predicted = torch.stack([x.norm() * a, x.norm() * b / b.norm()], 2).flatten(0, 1)
    wanted = torch.linalg.lstsq(predicted, x.flatten()[:, None]).solution[:, 0]
    assert share == near(*wanted.tolist())


def test_a_quiet_head_gets_little_of_what_stays_unexplained() -> None:
    """Two heads that say as much of x: alike as long as they are as loud, else the louder one, or o's entries would be
    a hundred times larger."""
    a, b = X + 2 * OTHER, X + 2 * THIRD
    share, fit = weights(X, a, b)
    assert share == near(share[0], share[0]) and fit == near(1, 1)
    quiet, small = weights(X, a, b / 100)
    assert quiet[0] == pytest.approx(1, abs=0.01) and abs(quiet[1]) < 0.01 and small[1] < 0.01


def test_source_heads_with_one_target_head_keep_all() -> None:
    chosen, source = torch.tensor([2, 0, 2, 1]), contexts(3)
    target = disguised(source, chosen.tolist())
    blocks = moment(source, target).cross.unflatten(1, (4, -1)).unflatten(0, (3, -1)).transpose(1, 2)
    cross = blocks[chosen, torch.arange(4)]
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    loud = source.square().sum((0, 2))[chosen]
    scale = (target.square().sum((0, 2)) / loud).sqrt()
    share, fit = shares(chosen, cross, u @ vh, scale, loud, moment(target, target).cross, floor=FLOOR)
    assert share.tolist() == [pytest.approx(0.5), 1, pytest.approx(0.5), 1] and fit == pytest.approx(torch.ones(4))


def updated(source: Spec, target: Spec) -> dict[str, Tensor]:
    models = source.build(), target.build()
    alignment = tt.align(*models, batches(source, seed=3), recipe="coherent")
    return dict(tt.transport(alignment, tt.Delta.between(models[0], tune(source, "linear").build()), models[1]))


def test_heads_of_the_targets_own_stay_as_they_are() -> None:
    """Where outputs cannot tell: queries, keys and values of heads whose writes cancel. LlamaRMSNorm rounds to 1e-7."""
    source = base(LLAMA)  # 4 heads of 8 in 2 groups; the target has 4 groups of 4
    update = updated(source, p.move(source, (p.residual(p.widened(32)), p.beside_live(1, 1))))
    for name, value in update.items():
        layer, heads = name.split(".")[-2], None
        if layer in ("k_proj", "v_proj"):
            heads = value.unflatten(0, (4, 8)).flatten(1).norm(dim=1)
            own = torch.tensor([False, False, True, True])
        elif layer in ("q_proj", "o_proj"):
            heads = (value if layer == "q_proj" else value.T).unflatten(0, (16, 8)).flatten(1).norm(dim=1)
            own = torch.tensor([[False, False, True, True]] * 2 + [[True] * 4] * 2).flatten()
        if heads is not None:
            assert heads[own].max() < 1e-6 * heads.max() and heads[~own].min() > 0.1 * heads.max(), name


def test_quiet_heads_left_over_do_not_make_the_update_loud() -> None:
    """Of unlike models: o's update is as large, beside its weights, as other layers' are; it was 4 to 12 times."""
    source, target = base(LLAMA), base(LLAMA, seed=5, width=32, num_attention_heads=8, num_key_value_heads=4)
    parts = dict(target.parts)
    for name in [name for name in parts if name.endswith(".v.weight")]:
        parts[name] = torch.cat([parts[name][:8], 0.03 * parts[name][8:24], parts[name][24:]])
    target = Spec(target.names, target.config, parts)
    change = {n: v for n, v in updated(source, target).items() if "_proj.weight" in n}
    sizes = {name: float(value.norm() / target.state[name].norm()) for name, value in change.items()}
    others = [size for name, size in sizes.items() if "o_proj" not in name]
    assert all(size < 1.5 * max(others) for name, size in sizes.items() if "o_proj" in name), sizes
