"""Training gives torchvision's numbers: steps, statistics, frozen and partial modes, checkpointing, EMA, memory."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from training import STATISTICS, assert_same, buffers, each
from twins import CL, assert_agree, assert_train_alike, gradients, images, twins, wide

import resnet_fast

LABELS = torch.tensor([1, 7, 3])


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("layout", (torch.contiguous_format, CL))
def test_sgd_steps(layout) -> None:
    """Four steps of SGD with momentum and weight decay: losses, parameters and buffers."""
    found = []
    for model in map(wide, twins()):
        model.train().to(memory_format=layout)
        optimiser = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True
        )
        losses = []
        for step in range(4):
            x = images(3, 40, torch.float64, seed=step).contiguous(memory_format=layout)
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x), LABELS)
            loss.backward()
            assert all(
                p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters()
            )
            optimiser.step()
            losses.append(loss.detach())
        found.append({"losses": torch.stack(losses), **model.state_dict()})
        with torch.no_grad():
            found[-1]["answer"] = model.eval()(images(2, 40, torch.float64))
    assert_same(*found, tolerance=1e-7)
    assert (
        found[0]["losses"][3] != found[0]["losses"][0] and found[0]["bn1.num_batches_tracked"] == 4
    )


def test_basic_blocks_and_every_mode() -> None:
    """Training, eval with all gradients (frozen statistics, trainable affine), and batch norm alone in eval."""
    ours, theirs = twins("resnet18", num_classes=4)
    for mode in ("train", "eval", "frozen statistics"):
        for model in (ours, theirs):
            model.train(mode != "eval")
            if mode == "frozen statistics":
                for bn in each(model, nn.BatchNorm2d):
                    bn.eval()
        assert_train_alike(ours, theirs, images(2, 40))


def test_eval_with_gradients_of_bottlenecks() -> None:
    assert_train_alike(*twins(), images(2, 40))


def test_partly_frozen() -> None:
    """A stage in eval, a stage without gradients, one batch norm's affine frozen, single modules switched."""
    ours, theirs = twins()
    for model in (ours.train(), theirs.train()):
        model.layer1.eval()
        model.layer2.requires_grad_(False)
        model.layer3[0].bn2.requires_grad_(False)
        model.layer3[0].bn1.eval()
        model.layer4[0].downsample[1].eval()
        model.layer4[0].conv2.weight.requires_grad_(False)
        model.bn1.weight.requires_grad_(False)
    assert_train_alike(ours, theirs, images(3, 40))


def test_odd_shapes_and_layouts() -> None:
    ours, theirs = twins()
    for x in (
        images(3, (33, 47)),
        images(3, 40).contiguous(memory_format=CL),
        images(3, 48)[:, :, 3:-4, ::2],
        images(6, 40)[::2],
    ):
        assert_train_alike(ours.train(), theirs.train(), x)
        assert_agree(ours.eval(), theirs.eval(), x)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("change", STATISTICS)
def test_running_statistics(change) -> None:
    """However batch norm is set up: three forwards in training, then one in eval."""
    found = []
    for model in map(wide, twins()):
        for bn in each(model, nn.BatchNorm2d):
            STATISTICS[change](bn)
        with torch.no_grad():
            answers = [model.train()(images(3, 40, torch.float64, seed=i)) for i in range(3)]
            answers.append(model.eval()(images(3, 40, torch.float64)))
        found.append({"answers": torch.stack(answers), **buffers(model)})
    assert_same(*found)


def test_float32_statistics_by_the_rule() -> None:
    ours, theirs = twins()
    assert_train_alike(ours.train(), theirs.train(), images(4, 64) * 20 + 5)


def test_one_value_per_channel_raises_and_leaves_statistics() -> None:
    ours, theirs = twins()
    for model in (ours.train(), theirs.train()):
        with pytest.raises(
            ValueError,
            match=r"Expected more than 1 value per channel when training, got input size torch.Size",
        ):
            model(images(1, 32))
    for name in ("running_mean", "running_var"):
        assert torch.allclose(
            ours.layer4[0].bn2.state_dict()[name], theirs.layer4[0].bn2.state_dict()[name]
        )


def test_an_empty_batch_in_training() -> None:
    """Eager leaves the statistics alone and counts the batch; every gradient is there and zero."""
    found = []
    for model in twins():
        model.train()(images(0, 40)).sum().backward()
        found.append(
            {**buffers(model), **{f"gradient of {n}": p.grad for n, p in model.named_parameters()}}
        )
    assert_same(*found)


def test_a_graph_from_eval_survives_a_training_forward() -> None:
    """torch's batch norm bumps no version of its running statistics, so both losses can be differentiated."""
    for model in twins():
        first = model.eval()(images(2, 40)).sum()
        second = model.train()(images(3, 40)).sum()
        (first + second).backward()
        assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- checkpointing, penalties, batched gradients


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_updates_statistics_once(reentrant) -> None:
    """Eager updates them again when it recomputes, ours once; results and gradients are as without checkpointing."""
    found = []
    for segments in (False, True):
        model = wide(twins()[0]).train()

        def run(x, model=model, segments=segments):
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
                x = checkpoint(stage, x, use_reentrant=reentrant) if segments else stage(x)
            return model.fc(torch.flatten(model.avgpool(x), 1))

        x = images(3, 40, torch.float64).requires_grad_()
        answer = run(x)
        before = buffers(model)
        answer.square().sum().backward()
        found.append(
            {
                "answer": answer.detach(),
                **{n: p.grad for n, p in model.named_parameters()},
                **buffers(model),
            }
        )
        assert_same(before, buffers(model))
    assert_same(*found)
    assert found[1]["layer3.0.bn2.num_batches_tracked"] == 1


def test_gradient_penalty() -> None:
    """Double backward through the whole network, in training and in eval."""
    for mode in (True, False):
        found = []
        for model in map(wide, twins()):
            x = images(3, 40, torch.float64).requires_grad_()
            (dx,) = torch.autograd.grad(model.train(mode)(x).square().sum(), x, create_graph=True)
            dx.view(3, -1).norm(dim=1).sum().backward()
            found.append(
                {
                    "x": x.grad,
                    **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                }
            )
        assert_same(*found, tolerance=1e-7)


def test_gradients_can_be_flattened() -> None:
    """What influence functions and attacks do: ``view`` what autograd.grad returns."""
    model = resnet_fast.resnet18(num_classes=4)
    for mode in (True, False):
        x = images(2, 40).requires_grad_()
        found = torch.autograd.grad(model.train(mode)(x).sum(), [x, *model.parameters()])
        assert sum(g.view(-1).numel() for g in found) == x.numel() + sum(
            p.numel() for p in model.parameters()
        )


def test_jacobian_vectorised() -> None:
    ours, theirs = map(wide, twins(num_classes=3))
    x = images(1, 40, torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (ours, theirs))
    )


# ---------------------------------------------------------------- around the model


def test_cpu_autocast_trains_as_eager() -> None:
    found = []
    for model in twins():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model.train()(images(3, 40)), LABELS)
        loss.backward()
        found.append(
            {
                "loss": loss.detach(),
                **{n: p.grad for n, p in model.named_parameters()},
                **buffers(model),
            }
        )
    assert_same(*found, tolerance=0.0)


def test_ema_and_update_bn() -> None:
    found = []
    for model in map(wide, twins()):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimiser.zero_grad()
            F.cross_entropy(
                model.train()(images(3, 40, torch.float64, seed=step)), LABELS
            ).backward()
            optimiser.step()
            ema.update_parameters(model)
            with torch.no_grad():
                answer = ema.eval()(images(2, 40, torch.float64))
        update_bn([images(3, 40, torch.float64, seed=i) for i in range(2)], ema)
        found.append({"answer": answer, **ema.state_dict()})
    assert_same(*found, tolerance=1e-8)


def test_gradients_accumulate() -> None:
    found = []
    for model in map(wide, twins()):
        for step in range(2):
            model.train()(images(3, 40, torch.float64, seed=step)).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_same(*found, tolerance=1e-8)


def test_threads_train_apart() -> None:
    """Copies trained in threads at once give what they give one after the other."""
    model = wide(twins()[0]).train()
    expected = gradients(copy.deepcopy(model), images(3, 40, torch.float64))
    found: list[dict] = []
    copies = [copy.deepcopy(model) for _ in range(3)]
    workers = [
        threading.Thread(
            target=lambda m=m: found.append(gradients(m, images(3, 40, torch.float64)))
        )
        for m in copies
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3
    for one in found:
        assert_same(one, expected)


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct memory that autograd keeps for backward, parameters apart."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(size for size, _ in kept.values()) if y.requires_grad else 0


@pytest.mark.parametrize("mode", (True, False))
def test_no_more_is_kept_for_backward(mode) -> None:
    """Apart from statistics of a few channels, training and eval with gradients save no more than eager."""
    ours, theirs = twins()
    x = images(3, 64)
    assert kept_bytes(ours.train(mode), x) <= kept_bytes(theirs.train(mode), x) * 1.02 + x.nbytes
