"""This process among those that share the work: its place, its share of the files, its record."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Ranks(NamedTuple):
    """Rank and number of processes, of all and of this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun names them; else the only process. Raises ValueError for a rank outside the world."""
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        ranks = cls(*(int(os.environ.get(key, default)) for key, default in zip(keys, cls(), strict=True)))
        if not 0 <= ranks.rank < ranks.world:
            raise ValueError(f"RANK: got {ranks.rank}, expected 0 to {ranks.world - 1} (WORLD_SIZE {ranks.world})")
        return ranks

    def parts(self, out: Path) -> list[Path]:
        """The records of all ranks."""
        if self.world == 1:
            return [out.with_name(f"{out.name}.part")]
        return [out.with_name(f"{out.name}.part-{rank}-of-{self.world}") for rank in range(self.world)]

    def part(self, out: Path) -> Path:
        """The record of this rank."""
        return self.parts(out)[self.rank]

    @staticmethod
    def leftovers(out: Path) -> Iterator[Path]:
        """Records of any number of ranks that exist for ``out``."""
        name = re.compile(re.escape(out.name) + r"\.part(-\d+-of-\d+)?")
        return (path for path in out.parent.iterdir() if name.fullmatch(path.name))
