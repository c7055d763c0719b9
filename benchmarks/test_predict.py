"""Predict, end to end: JPEG files to predictions by the command that users run, and the stage that limits it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

IMAGES = {"cpu": 48, "cuda": 4096}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A folder of photographs as JPEG files."""
    pytest.importorskip("skimage")
    from resnet_fast.data import samples

    folder = tmp_path_factory.mktemp("jpegs")
    count = IMAGES[pytestconfig.getoption("--device")]
    for i, image in enumerate(samples.sample(count)):
        image.save(folder / f"{i:05}.jpg", quality=90)
    return folder


@pytest.mark.benchmark(group="files to predictions")
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_predict(
    decode: str, jpegs: Path, benchmark, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    device = pytestconfig.getoption("--device")
    dtype = "bfloat16" if device == "cuda" else "float32"
    command = [sys.executable, "-m", "resnet_fast", "predict", str(jpegs), "--random-weights"]
    command += ["--device", device, "--dtype", dtype]
    command += ["--overwrite", "--out", str(tmp_path / "out.csv")]
    if decode == "fast":
        command.append("--fast-decode")

    done = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, text=True), rounds=1
    )

    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if "img/s" in line)
    rate, stages = parse_figures(line)
    # The benchmark's time is the whole process's; the rate is the loop's, without the start-up.
    benchmark.extra_info.update(
        img_s=rate,
        binds=max(stages, key=stages.get),
        stages=stages,
        device=device,
    )
    print(f"{decode} decoding: {line}")


def parse_figures(line: str) -> tuple[float, dict[str, int]]:
    """Return img/s and the stages' shares in percent from the command's last line."""
    rate, shares = re.search(r"([\d.]+) img/s \((.*)\)", line).groups()
    stages = {name: int(share) for name, share in re.findall(r"(\w+) (\d+)%", shares)}
    return float(rate), stages
