"""Where programs of a persistent step stand, from the stamps of its phases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from kernels.persistent.sizes import PHASES


def where_programs_stand(stamps: Tensor, parts: Sequence[str]) -> str:
    """One line: how many programs wait in which phase, the one furthest behind first.

    stamps: [programs, parts, 3] int64 on the CPU: when each began a part, had what it waits for,
            and ended it; of this launch and of those before
    parts:  what each is for, of the layers in order, then the head
    """
    last = stamps.flatten(1).max(1)
    found: Counter[tuple[int, int]] = Counter()
    for time, place in zip(last.values.tolist(), last.indices.tolist(), strict=True):
        found[divmod(place, 3) if time else (-1, 0)] += 1
    lines = []
    for (part, state), programs in sorted(found.items()):
        if part < 0:
            lines.append(f"{programs} have not begun")
            continue
        where = f"{parts[part]} of layer {part // len(PHASES)}"
        if parts[part] not in PHASES:
            where = parts[part]
        what = ("wait for what {} reads", "multiply in {}", "are behind {}")[state]
        lines.append(f"{programs} {what.format(where)}")
    return f"of {len(stamps)} programs " + ", ".join(lines)
