"""Where the time of the server's steps went while a load was on it (`motet bench --profile`).

The server counts it all the time, part by part, and tells it at /metrics; the difference over a level is that
level's. What no step took is time in which the engine had nothing to do, or waited for the event loop.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks.probe import NotReady
from benchmarks.report import columns

_PART = re.compile(r'^motet_step_part_seconds_total{.*part="([^"]+)".*} (\S+)$', re.M)
_STEPS = re.compile(r"^motet_step_seconds_count{.*} (\S+)$", re.M)
_TOKENS = re.compile(r"^vllm:iteration_tokens_total_sum{.*} (\S+)$", re.M)


@dataclass(frozen=True, slots=True)
class StepParts:
    """Since the server started, or over a level."""

    steps: float
    tokens: float  # computed, of prompts and answers
    seconds: dict[str, float]  # by part

    def since(self, before: "StepParts") -> "StepParts":
        seconds = {part: s - before.seconds.get(part, 0.0) for part, s in self.seconds.items()}
        return StepParts(self.steps - before.steps, self.tokens - before.tokens, seconds)


async def read_parts(session: aiohttp.ClientSession, url: str) -> StepParts:
    """Raises NotReady if the server does not tell."""
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    steps, tokens = _STEPS.search(text), _TOKENS.search(text)
    if response.status != 200 or steps is None or tokens is None:
        raise NotReady(f"--profile: the server at {url} does not tell at /metrics where its time goes.")
    seconds = {part: float(number) for part, number in _PART.findall(text)}
    return StepParts(float(steps[1]), float(tokens[1]), seconds)


def parts_table(titles: Sequence[str], parts: Sequence[StepParts], walls: Sequence[float]) -> str:
    """One column a level; shares of the time that the level took, `walls` in seconds."""
    names = dict.fromkeys(name for level in parts for name in level.seconds)
    rows = [("where the time went", list(titles))]
    rows += [
        (
            name,
            [f"{level.seconds.get(name, 0.0) / wall:.1%}" for level, wall in zip(parts, walls, strict=True)],
        )
        for name in names
    ]
    idle = [1 - sum(level.seconds.values()) / wall for level, wall in zip(parts, walls, strict=True)]
    rows.append(("between steps", [f"{max(0.0, share):.1%}" for share in idle]))
    means = [sum(level.seconds.values()) / max(1.0, level.steps) for level in parts]
    rows.append(
        ("steps; ms each", [f"{p.steps:.0f}; {m * 1e3:.1f}" for p, m in zip(parts, means, strict=True)])
    )
    rows.append(("tokens a step", [f"{level.tokens / max(1.0, level.steps):.1f}" for level in parts]))
    return "\n".join(columns(rows))
