"""A folded weight is never stale: whatever is edited, swapped, shared, copied or freed, the next forward sees it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from twins import CL, assert_agree, images, shake, twins

import resnet_fast
from resnet_fast import ops
from resnet_fast.kernels import prepack

X = images(2, 40)


@pytest.fixture
def folds(monkeypatch) -> list:
    """Every folding that happens, noted: reuse is when none does."""
    seen, original = [], prepack.fold

    def counted(*args):
        seen.append(args[0].shape)
        return original(*args)

    monkeypatch.setattr(prepack, "fold", counted)
    return seen


def warm(*models: nn.Module) -> None:
    """Until the pass is kept as a program (see whole.py)."""
    with torch.no_grad():
        for model in models:
            for _ in range(3):
                model(X)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """What a step is folded from, in one block: the filter and the four vectors."""
    block = model.layer2[1]
    return [
        block.conv2.weight,
        block.bn2.weight,
        block.bn2.bias,
        block.bn2.running_mean,
        block.bn2.running_var,
    ]


EDITS = {
    "in place": lambda t: t.mul_(1.5),
    "one element": lambda t: t.view(-1)[-1:].add_(1.0),
    "through data": lambda t: t.data.add_(0.25),
    "through a new data": lambda t: setattr(t, "data", t.data * 2),
    "through numpy": lambda t: t.detach().numpy().__imul__(3),
    "through a view": lambda t: t.detach().view(-1)[::2].add_(0.5),
    "swapped": lambda t: torch.utils.swap_tensors(
        t, nn.Parameter(t.detach() + 1) if isinstance(t, nn.Parameter) else t.detach() + 1
    ),
    "shared memory": lambda t: t.detach().share_memory_().add_(0.5),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("which", range(5), ids=["filter", "weight", "bias", "mean", "var"])
def test_edits_are_seen(edit, which, folds) -> None:
    ours, theirs = twins()
    warm(ours, theirs)
    for _ in range(2):
        for model in (ours, theirs):
            with torch.no_grad():
                EDITS[edit](tensors(model)[which])
        assert_agree(ours, theirs, X)
    folds.clear()
    warm(ours)
    assert not folds


def _optimiser_step(model: nn.Module) -> None:
    model(X).square().mean().backward()  # in eval: statistics stay, affine and filters move
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _statistics_step(model: nn.Module) -> None:
    model.train()(X)
    model.eval()


def _other_state(model: nn.Module, assign: bool) -> None:
    state = {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def _new_parameter(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight = nn.Parameter(m.weight.detach() * 1.1)


def _each(model: nn.Module, kind: type, **values) -> None:
    for m in model.modules():
        if isinstance(m, kind):
            for name, value in values.items():
                setattr(m, name, value)


CHANGES = {
    "optimiser step": _optimiser_step,
    "statistics": _statistics_step,
    "load_state_dict": lambda m: _other_state(m, False),
    "load_state_dict, assigned": lambda m: _other_state(m, True),
    "new parameters": _new_parameter,
    "half and back": lambda m: m.half().float(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "channels_last": lambda m: m.to(memory_format=CL),
    "channels_last and back": lambda m: m.to(memory_format=CL).to(
        memory_format=torch.contiguous_format
    ),
    "eps": lambda m: _each(m, nn.BatchNorm2d, eps=0.3),
    "reset": lambda m: [
        bn.reset_running_stats() for bn in m.modules() if isinstance(bn, nn.BatchNorm2d)
    ],
    "stride and dilation": lambda m: (
        setattr(m.layer3[0].conv2, "stride", (1, 1)),
        setattr(m.layer3[0].downsample[0], "stride", 1),
        setattr(m.layer3[0].conv2, "dilation", (2, 2)),
        setattr(m.layer3[0].conv2, "padding", 2),
    ),
    "shared memory": lambda m: m.share_memory(),
    "initialised anew": lambda m: [
        c.weight.data.fill_(0.01) for c in m.modules() if isinstance(c, nn.Conv2d)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change) -> None:
    ours, theirs = twins()
    warm(ours, theirs)
    for model in (ours, theirs):
        CHANGES[change](model)
    # a float32 training step may round differently; what is judged comes after it
    theirs.load_state_dict(ours.state_dict())
    assert_agree(ours, theirs, X)


def test_modules_that_swap_their_parameters() -> None:
    """torch.__future__'s flag: conversions swap tensors, which refuses tensors with weak references."""
    ours, theirs = twins()
    warm(ours, theirs)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (ours, theirs):
            model.double().float()
            _other_state(model, False)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_agree(ours, theirs, X)


def test_aliases_share_a_pack(folds) -> None:
    """Detached aliases of the same memory, as functional_call gets them, are packed once."""
    ours, _ = twins()
    warm(ours)
    folds.clear()
    with torch.no_grad():
        torch.func.functional_call(
            ours, {k: v.detach() for k, v in ours.state_dict().items()}, (X,)
        )
    assert not folds


def test_an_edit_while_packing_and_back(monkeypatch) -> None:
    """Another thread swaps a moving average in before the fold and out later: the pack must be what was compared."""
    ours, theirs = twins()
    weight, original, rounds = ours.layer2[1].conv2.weight, prepack.fold, []

    def raced(w, *rest):
        rounds.append(w)
        with torch.no_grad():
            weight.mul_(2)
        try:
            return original(w, *rest)
        finally:
            with torch.no_grad():
                weight.mul_(0.5)

    monkeypatch.setattr(prepack, "fold", raced)
    assert_agree(ours, theirs, X)
    assert rounds
    assert_agree(ours, theirs, X)


def test_double_and_back() -> None:
    ours, theirs = twins()
    warm(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(X.double()), theirs.double()(X.double()))
    assert_agree(ours.float(), theirs.float(), X)


def test_functional_call_with_other_weights_and_then_the_own() -> None:
    ours, theirs = twins()
    warm(ours)
    others = {
        k: v * 1.2 + 0.05
        for k, v in (*ours.named_parameters(), *ours.named_buffers())
        if v.is_floating_point()
    }
    with torch.no_grad():
        for state in (
            others,
            {k: v for k, v in others.items() if "running" in k},
            {k: v for k, v in others.items() if "bn" not in k},
        ):
            torch.testing.assert_close(
                torch.func.functional_call(ours, state, (X,)),
                torch.func.functional_call(theirs, state, (X,)),
                rtol=1e-4,
                atol=1e-4,
            )
    assert_agree(ours, theirs, X)


def test_batches_alternate(folds) -> None:
    """A pack is for batch 1 or for larger ones: two packs, in whichever order and at whichever size."""
    ours, theirs = twins()
    for n in (1, 16, 1, 3, 16, 1):
        assert_agree(ours, theirs, images(n, 40))
    warm(ours)
    count = len(folds)
    with torch.no_grad():
        for x in (images(1, 40), images(7, 40), images(1, 64), images(2, (33, 47))):
            ours(x)
    assert len(folds) == count
    assert all(len(entry.packs) <= 2 for entry in prepack._packed.values())


def test_a_filter_with_two_affines() -> None:
    """A convolution shared by two batch norms, in turn and at once, and two models that share filters alone."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    norms = [shake(nn.BatchNorm2d(8), seed=i).eval() for i in range(2)]
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for bn in (*norms, *norms[::-1], *norms):
            got = ops.conv_bn_act(
                x,
                conv.weight,
                bn.weight,
                bn.bias,
                mean=bn.running_mean,
                var=bn.running_var,
                eps=bn.eps,
                padding=1,
            )
            torch.testing.assert_close(got, torch.relu(bn(conv(x))))
    (a, a_theirs), (b, b_theirs) = twins(), twins()
    for ours, theirs in ((a, a_theirs), (b, b_theirs)):
        ours.layer2[1].conv2 = a.layer2[1].conv2
        theirs.layer2[1].conv2 = a_theirs.layer2[1].conv2
    shake(b, seed=9), shake(b_theirs, seed=9)
    for _ in range(2):
        assert_agree(a, a_theirs, X)
        assert_agree(b, b_theirs, X)
        with torch.no_grad():
            a.layer2[1].conv2.weight.mul_(1.1)
            a_theirs.layer2[1].conv2.weight.mul_(1.1)


def test_one_convolution_used_twice_in_a_block() -> None:
    ours, theirs = twins("resnet18")
    for model in (ours, theirs):
        model.layer1[0].conv2, model.layer1[0].bn2 = model.layer1[0].conv1, model.layer1[0].bn1
    for _ in range(2):
        assert_agree(ours, theirs, X)


def test_copies_are_apart() -> None:
    """deepcopy, pickle and torch.save do not copy packs, and editing one model leaves the other."""
    ours, theirs = twins()
    fresh = len(pickle.dumps(ours))
    warm(ours)
    assert len(pickle.dumps(ours)) == fresh
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
    ]
    with torch.no_grad():
        ours.conv1.weight.mul_(2)
    for twin in copies:
        assert_agree(twin, theirs, X)
    with torch.no_grad():
        theirs.conv1.weight.mul_(2)
    assert_agree(ours, theirs, X)


def test_inference_mode_and_grad_mode_in_any_order() -> None:
    """Packs made under inference_mode serve autograd later, and a model made under it runs."""
    ours, theirs = twins()
    with torch.inference_mode():
        first = ours(X)
    ours(X).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    with torch.inference_mode():
        assert torch.equal(first, ours(X))
        born, theirs_born = resnet_fast.resnet18(num_classes=3).eval(), None
        theirs_born = twins("resnet18", num_classes=3)[1]
        theirs_born.load_state_dict(born.state_dict())
        for _ in range(2):
            torch.testing.assert_close(born(X), theirs_born(X), rtol=1e-4, atol=1e-4)
            born.conv1.weight.mul_(1.5)
            theirs_born.conv1.weight.mul_(1.5)


def test_threads_share_a_model() -> None:
    ours, theirs = twins()
    with torch.no_grad():
        expected = {n: theirs(images(n, 40)) for n in (1, 2, 5)}
    wrong: list[str] = []

    def work(n: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                got = ours(images(n, 40))
                if not torch.allclose(got, expected[n], rtol=1e-4, atol=1e-4):
                    wrong.append(f"batch {n}")

    workers = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 5, 1, 2, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---------------------------------------------------------------- memory


def test_packs_die_with_the_model() -> None:
    before = len(prepack._packed)
    ours, _ = twins()
    warm(ours)
    assert len(prepack._packed) > before
    alive = [
        weakref.ref(pack[0])
        for key, entry in prepack._packed.items()
        for pack in entry.packs.values()
        if ours.conv1.weight.data_ptr() in key
    ]
    assert len(alive) == 1
    del ours
    gc.collect()
    assert len(prepack._packed) == before and alive[0]() is None


def test_folds_leave_no_holes_among_the_packs(folds, monkeypatch) -> None:
    """What is folded lies for the moment in memory that is not the heap's, the same for a whole pass."""
    made, mmap = [], prepack.mmap.mmap

    def noted(*args):
        made.append(weakref.ref(memory := mmap(*args)))
        return memory

    monkeypatch.setattr(prepack.mmap, "mmap", noted)
    ours, _ = twins()
    warm(ours)
    assert len(folds) > 15 and 0 < len(made) < 8 and all(ref() is None for ref in made)


def test_a_filter_does_not_collect_packs_of_dead_affines() -> None:
    """Fresh affines on one long-lived filter, as functional_call in a loop makes them; likewise fresh filters."""
    x, weight, k = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 1, 1), torch.ones(6)
    before = len(prepack._packed)
    affines = [torch.rand(6) for _ in range(20)]
    for scale in affines:
        torch.testing.assert_close(
            ops.conv_bn_act(x, weight, scale, k, act="none"),
            nn.functional.conv2d(x, weight) * scale.view(1, 6, 1, 1) + 1,
        )
    del affines, scale
    for _ in range(20):  # ids come back: a new filter where an old one was must not find its pack
        other = torch.randn(6, 4, 1, 1)
        torch.testing.assert_close(
            ops.conv_bn_act(x, other, k, k, act="none"), nn.functional.conv2d(x, other) + 1
        )
    del other
    gc.collect()
    assert len(prepack._packed) == before


def test_the_snapshot_is_not_taken_for_what_cannot_be_packed(folds) -> None:
    """float64 is refolded in each call and leaves nothing behind."""
    before = len(prepack._packed)
    x, weight, k = (
        torch.randn(1, 4, 5, 5).double(),
        torch.randn(6, 4, 1, 1).double(),
        torch.ones(6).double(),
    )
    for _ in range(2):
        ops.conv_bn_act(x, weight, k, k)
    assert len(folds) == 2 and len(prepack._packed) == before


def test_a_pass_proves_what_still_lies_there_with_the_same_bytes(monkeypatch) -> None:
    """Each by itself: an edited one, a moved one, a shrunk one and a freed one take no other with them."""
    layers = {
        name: (torch.randn(4, 3, 1, 1), torch.ones(4), torch.zeros(4))
        for name in ("left", "edited", "moved", "shrunk", "freed")
    }
    keys = {name: _key_of(*layer) for name, layer in layers.items()}
    assert prepack._still_current(keys.values()) == set(keys.values())
    layers["moved"][0].share_memory_()
    for size in (0, 8):  # back to where it was, as a rule
        layers["shrunk"][1].untyped_storage().resize_(size)
    del layers["freed"]
    with monkeypatch.context() as patched:  # what was freed may hold its bytes still
        patched.setattr(prepack, "same_bytes", lambda places: True)
        assert prepack._still_current(keys.values()) == {keys["left"], keys["edited"]}
    layers["edited"][2].data[3] = 1
    assert prepack._still_current(keys.values()) == {keys["left"]}


def _key_of(*layer: torch.Tensor) -> tuple:
    entry = prepack.current_pack(*layer, None, None, 0.0)
    return next(key for key, other in prepack._packed.items() if other is entry)
