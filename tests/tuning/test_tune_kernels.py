"""The measured choice of kernels, on a pretended GPU with right, wrong, broken and greedy kernels."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_tables import GPU, Pretended, broken, greedy, right, table, wrong

from resnet_fast.dispatch import choose, tables
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch.problem import Problem
from resnet_fast.testing.full_size import full_args
from resnet_fast.tuning import kernels as tuning
from resnet_fast.tuning.call import prepared_call
from resnet_fast.tuning.kernels import DeviceLost, tune

PROBLEM = Problem(
    "add_act", "cpu", torch.float32, (2, 8, 5, 7), "nhwc", residual="nhwc", act="relu"
)
OTHER = replace(PROBLEM, x=(3, 16, 5, 7))
CONV = Problem(
    "conv_bn_act",
    "cpu",
    torch.float32,
    (2, 8, 6, 6),
    "nhwc",
    (8, 8, 3, 3),
    padding=(1, 1),
    bn=True,
    act="relu",
)
NORM = Problem("bn_act", "cpu", torch.float32, (2, 8, 5, 4), "nhwc", act="relu")
FAST = {"experimental.fast": 5e-6}
OTHER_VERSIONS = {"torch": "9.9", "triton": "9", "driver": "14000"}


def tuned(device=None, problem=PROBLEM, **options):
    """Tune one problem; return its result."""
    (result,) = tune([problem], device=device or Pretended(), **options)
    return result


# ---------------------------------------------------------------- choosing


def test_fastest_right_kernel_wins(candidates, tmp_path) -> None:
    candidates(fast=right)
    result = tuned(Pretended(calls=FAST, graph={"experimental.fast": 4e-6}))

    assert (result.calls, result.graph) == ("experimental.fast", "experimental.fast")
    entry = table(tmp_path)["entries"][PROBLEM.key]
    assert entry["kernel"] == "experimental.fast"
    assert entry["time_us"] == pytest.approx(5)
    assert entry["aten_us"] == pytest.approx(10)
    assert entry["versions"] == tables.versions()
    assert 0 <= entry["error"] < 1e-6
    assert table(tmp_path)["graph"][PROBLEM.key]["time_us"] == pytest.approx(4)


def test_wrong_kernel_is_named_and_not_timed(candidates) -> None:
    candidates(fast=right, wrong=wrong)
    device = Pretended(calls=FAST | {"experimental.wrong": 1e-6})
    result = tuned(device)

    assert result.calls == "experimental.fast"
    assert list(result.bad) == ["experimental.wrong"]
    assert "rms error" in result.bad["experimental.wrong"]
    assert "experimental.wrong" not in device.timed


def test_no_entry_unless_aten_is_beaten_by_more_than_noise(candidates, tmp_path) -> None:
    candidates(near=right)
    result = tuned(
        Pretended(calls={"experimental.near": 9.95e-6}, graph={"experimental.near": 5e-6})
    )
    assert (result.calls, result.graph) == ("aten", "experimental.near")
    assert PROBLEM.key not in table(tmp_path)["entries"]


def test_kernel_that_cannot_be_captured_is_still_chosen_for_calls(candidates) -> None:
    candidates(fast=right)
    result = tuned(Pretended(calls=FAST, uncapturable=("experimental.fast",)))
    assert (result.calls, result.graph) == ("experimental.fast", "aten")
    assert "capturing" in result.records["experimental.fast"]["not_captured"]


@pytest.mark.parametrize(
    ("kernel", "how"),
    [
        (greedy, "out of memory: CUDA out of memory. Tried to allocate 3.00 GiB."),
        (broken, "failed: RuntimeError: PassManager::run failed"),
    ],
)
def test_failing_candidate_is_skipped_and_named(candidates, kernel, how) -> None:
    candidates(bad=kernel, fast=right)
    result = tuned(Pretended(calls=FAST))
    assert result.calls == "experimental.fast"
    assert result.bad == {"experimental.bad": how}
    assert how.split(":")[0].upper() in str(result)


def test_out_of_memory_while_timing_leaves_the_others_timed(candidates) -> None:
    calls = []

    def grows(*args):
        calls.append(args)
        return greedy(*args) if len(calls) > 1 else right(*args)

    candidates(grows=grows, fast=right)
    result = tuned(Pretended(calls=FAST))
    assert result.calls == "experimental.fast"
    assert "out of memory" in result.bad["experimental.grows"]


def test_out_of_memory_for_the_arguments_chooses_nothing(candidates, monkeypatch, tmp_path) -> None:
    candidates(good=right)
    monkeypatch.setattr(tuning, "argument_sets", lambda problem, cache: greedy(*[None] * 4))
    result = tuned()
    assert result.calls == "aten"
    assert "arguments to time it on" in result.bad["experimental.good"]
    assert table(tmp_path)["entries"] == {}


def test_only_named_kernels_take_part_besides_the_chosen(candidates, tmp_path) -> None:
    candidates(fast=right, slow=right)
    device = Pretended(calls=FAST | {"experimental.slow": 6e-6})

    tuned(device, kernels=["experimental.fast"])
    assert "experimental.slow" not in table(tmp_path)["measured"][PROBLEM.key]

    result = tuned(device, kernels=["experimental.slow"])
    assert result.calls == "experimental.fast"


def test_unknown_kernel_id_is_refused(candidates) -> None:
    with pytest.raises(LookupError, match="'experimental.absent' is unknown"):
        tuned(kernels=["experimental.absent"])


def test_cudnn_benchmarks_while_tuning_and_not_afterwards(candidates, monkeypatch) -> None:
    settings = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def looks(*args):
        settings.append(torch.backends.cudnn.benchmark)
        return right(*args)

    candidates(looks=looks)
    tuned()
    assert all(settings)
    assert not torch.backends.cudnn.benchmark


# ---------------------------------------------------------------- what is timed


@pytest.mark.parametrize("residual, act", [("nhwc", "relu"), (None, "none")])
def test_folded_convolution_of_torch_is_timed_without_folding(monkeypatch, residual, act) -> None:
    """A plan does not fold in each call, so the kernel that ours have to beat must not either."""
    problem = replace(CONV, bn=False, residual=residual, act=act)
    live_problem = replace(problem, bn=True)
    aten, args = dispatch.find("aten", "conv_bn_act"), full_args(problem)
    expected = aten.fn(*args)
    planned = prepared_call(aten, problem, args)
    live = prepared_call(aten, live_problem, full_args(live_problem))

    monkeypatch.setattr("resnet_fast.kernels.prepack.fold", lambda *args: 1 / 0)
    monkeypatch.setattr("resnet_fast.kernels.prepack.packed", lambda *args: 1 / 0)

    torch.testing.assert_close(planned(), expected)
    with pytest.raises(ZeroDivisionError):
        live()


@pytest.mark.parametrize("residual", (None, "nhwc"))
def test_our_training_norm_is_timed_with_its_running_statistics(residual, monkeypatch) -> None:
    problem = replace(NORM, residual=residual)
    aten, args = dispatch.find("aten", "bn_act"), full_args(problem)
    y, mean, var = aten.fn(*args)
    updates = []
    monkeypatch.setattr(
        "resnet_fast.tuning.call.update_running_stats", lambda bn, *found: updates.append(found)
    )

    ours = replace(aten, id="experimental.norm")
    torch.testing.assert_close(prepared_call(ours, problem, args)(), y)

    ((new_mean, new_var, count),) = updates
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)
    assert count == 40


@pytest.mark.parametrize("residual", (None, "nhwc"))
def test_torchs_training_norm_is_timed_as_its_module(residual, monkeypatch) -> None:
    """A GPU without a kernel of ours runs the module; our op would take more launches."""
    problem = replace(NORM, residual=residual)
    aten, args = dispatch.find("aten", "bn_act"), full_args(problem)
    y, _, _ = aten.fn(*args)
    monkeypatch.setattr(torch, "native_batch_norm", lambda *args: 1 / 0)
    torch.testing.assert_close(prepared_call(aten, problem, args)(), y)


def test_arguments_rotate_through_three_caches() -> None:
    cache = 20_000
    sets = tuning.argument_sets(PROBLEM, cache_bytes=cache)
    tensors = [tensor for args in sets for tensor in args[:2]]
    size = sum(tensor.nbytes for tensor in sets[0][:2])

    assert (len(sets) - 1) * size < 3 * cache <= len(sets) * size
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.stride() == tensors[0].stride() for tensor in tensors)


def test_without_a_cache_there_is_one_set_of_arguments() -> None:
    assert len(tuning.argument_sets(PROBLEM, cache_bytes=0)) == 1


# ---------------------------------------------------------------- resuming


def test_measured_problem_is_skipped(candidates) -> None:
    candidates(fast=right, wrong=wrong)
    tuned(Pretended(calls=FAST))

    again = Pretended()
    first, _ = tune([PROBLEM, OTHER], device=again)

    assert first.note == "measured before"
    assert first.calls == "experimental.fast"
    assert "experimental.wrong" in first.bad
    assert {key for _, key in again.verified} == {OTHER.key}


def test_edited_source_is_measured_again(candidates, monkeypatch) -> None:
    candidates(fast=right)
    tuned(Pretended(calls=FAST))
    monkeypatch.setattr(tables, "source_hash", lambda sources: "edited")
    result = tuned(Pretended(calls={"experimental.fast": 20e-6}))
    assert result.note == ""
    assert result.calls == "aten"


def test_other_versions_verify_the_chosen_again_and_keep_the_times(
    candidates, monkeypatch, tmp_path
) -> None:
    candidates(fast=right, slow=right)
    tuned(Pretended(calls=FAST))
    monkeypatch.setattr(tables, "versions", lambda: OTHER_VERSIONS)

    device = Pretended()
    result = tuned(device)

    assert result.note.startswith("verified again")
    assert result.calls == "experimental.fast"
    assert device.verified == [("experimental.fast", PROBLEM.key)]
    assert device.timed == []
    entry = table(tmp_path)["entries"][PROBLEM.key]
    assert entry["versions"] == OTHER_VERSIONS
    assert entry["time_us"] == pytest.approx(5)


def test_candidate_that_failed_under_other_versions_is_measured_with_the_others(
    candidates, monkeypatch
) -> None:
    candidates(fast=right, wrong=wrong)
    tuned(Pretended(calls=FAST))
    monkeypatch.setattr(tables, "versions", lambda: OTHER_VERSIONS)
    device = Pretended(calls=FAST)
    result = tuned(device)
    assert result.note == ""
    assert {id for id, _ in device.verified} == {
        "aten.add_act",
        "experimental.fast",
        "experimental.wrong",
    }


def test_kernel_that_new_versions_broke_is_dropped(candidates, monkeypatch, tmp_path) -> None:
    works = [True]

    def fast(*args):
        return right(*args) if works[0] else wrong(*args)

    candidates(fast=fast)
    tuned(Pretended(calls=FAST))
    works[0] = False
    monkeypatch.setattr(tables, "versions", lambda: OTHER_VERSIONS)

    result = tuned()

    assert result.calls == "aten"
    assert "wrong" in result.bad["experimental.fast"]
    assert PROBLEM.key not in table(tmp_path)["entries"]


def test_interruption_loses_one_problem_only(candidates, tmp_path) -> None:
    def stops(x, *args):
        if x.shape == OTHER.x:
            raise KeyboardInterrupt
        return right(x, *args)

    candidates(fast=stops)
    with pytest.raises(KeyboardInterrupt):
        tune([PROBLEM, OTHER], device=Pretended(calls=FAST))
    assert list(table(tmp_path)["measured"]) == [PROBLEM.key]
    assert not list(tmp_path.glob("*.part"))


def test_kernel_that_lost_the_device_is_named_and_passed_over_next_time(
    candidates, tmp_path
) -> None:
    device = Pretended(calls=FAST)

    def poison(*args):
        device.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    candidates(poison=poison, fast=right)
    with pytest.raises(DeviceLost, match="experimental.poison on add_act .* table is intact"):
        tuned(device)
    assert list(table(tmp_path)["measured"][PROBLEM.key]) == ["experimental.poison"]

    fresh = Pretended(calls=FAST)
    result = tuned(fresh)
    assert result.calls == "experimental.fast"
    assert "lost the device" in result.bad["experimental.poison"]
    assert ("experimental.poison", PROBLEM.key) not in fresh.verified


# ---------------------------------------------------------------- looking up


@pytest.fixture
def measured(candidates, monkeypatch):
    """A pretended GPU for whose calls one kernel was measured; inside graphs all take ten microseconds."""
    candidates(fast=right)
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    assert tables.lookup(PROBLEM) is None
    assert tables.why_not(PROBLEM) is None
    tuned(Pretended(calls=FAST))


def test_measured_kernel_is_looked_up_and_chosen(measured) -> None:
    assert tables.lookup(PROBLEM)["kernel"] == "experimental.fast"
    assert tables.lookup(PROBLEM, graph=True) is None
    chosen, why = choose(replace(PROBLEM, device="cuda"))
    assert chosen.id == "experimental.fast"
    assert why.startswith("measured: 5.0 µs on Pretended GPU")


def test_lookup_wants_the_same_versions(measured, monkeypatch) -> None:
    monkeypatch.setattr(tables, "versions", lambda: OTHER_VERSIONS)
    assert tables.lookup(PROBLEM) is None
    assert "was verified with" in tables.why_not(PROBLEM)


def test_lookup_wants_the_same_source(measured, monkeypatch) -> None:
    monkeypatch.setattr(tables, "source_hash", lambda sources: "edited")
    assert tables.lookup(PROBLEM) is None
    assert "source of experimental.fast changed" in tables.why_not(PROBLEM)


def test_lookup_wants_the_same_gpu(measured, monkeypatch) -> None:
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "Another GPU")
    assert tables.lookup(PROBLEM) is None


def test_stale_entry_of_the_user_does_not_hide_a_shipped_one(
    candidates, monkeypatch, tmp_path
) -> None:
    candidates(fast=right)
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    tuned(Pretended(calls=FAST), folder=tmp_path / "shipped")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    stale = {PROBLEM.key: {"kernel": "experimental.gone"}}
    tables.update(GPU, lambda sections: sections["entries"].update(stale))
    assert tables.lookup(PROBLEM)["kernel"] == "experimental.fast"


# ---------------------------------------------------------------- versions


def pretend_driver(monkeypatch, version: int, error: int) -> None:
    """A library like libcuda."""

    def get_version(place):
        place._obj.value = version
        return error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=get_version)
    )


def test_versions_have_the_driver_of_cuda(monkeypatch) -> None:
    pretend_driver(monkeypatch, version=13000, error=0)
    assert tables.versions.__wrapped__()["driver"] == "13000"


def test_driver_that_cannot_answer_raises(monkeypatch) -> None:
    pretend_driver(monkeypatch, version=0, error=3)
    with pytest.raises(RuntimeError, match="CUDA error 3"):
        tables.versions.__wrapped__()
