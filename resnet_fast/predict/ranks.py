"""Ranks: this process among those that torchrun started, its share of the files and its record."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # set by torchrun


class Ranks(NamedTuple):
    """Rank and number of processes, over all machines and on this one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Return torchrun's ranks, or those of a single process; raises ValueError for a rank outside the world."""
        defaults = zip(_ENVIRONMENT, cls(), strict=True)
        ranks = cls(*(int(os.environ.get(key, default)) for key, default in defaults))
        if not 0 <= ranks.rank < ranks.world:
            raise ValueError(
                f"RANK: got {ranks.rank}, expected 0 to {ranks.world - 1} (WORLD_SIZE {ranks.world})"
            )
        return ranks

    def parts(self, out: Path) -> list[Path]:
        """Return the paths of all ranks' records."""
        part = f"{out.name}.part"
        if self.world == 1:
            return [out.with_name(part)]
        ranks = range(self.world)
        return [out.with_name(f"{part}-{rank}-of-{self.world}") for rank in ranks]

    def part(self, out: Path) -> Path:
        """Return the path of this rank's record."""
        return self.parts(out)[self.rank]

    @staticmethod
    def leftovers(out: Path) -> Iterator[Path]:
        """Return the records for ``out`` that exist, of any number of ranks."""
        pattern = re.compile(re.escape(out.name) + r"\.part(-\d+-of-\d+)?")
        return (path for path in out.parent.iterdir() if pattern.fullmatch(path.name))
