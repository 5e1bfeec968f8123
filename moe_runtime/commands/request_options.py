"""Options that `generate` and `chat` share: how the model is opened, how tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from moe_runtime.commands.common import dense_format_option, device_option, revision_option

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_OPTIONS: tuple[Decorator, ...] = (
    click.option("--max-new-tokens", "--max-tokens", type=click.IntRange(min=1), metavar="N",
                 help="New tokens at most; default 256, for a chat 4096."),
    click.option("--temperature", "--temp", type=click.FloatRange(min=0), metavar="T",
                 help="0 is greedy; default as the checkpoint says, else 0."),
    click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), metavar="P",
                 help="Draw from the smallest set with this probability."),
    click.option("--top-k", type=click.IntRange(min=0), metavar="K",
                 help="Draw from the K most probable tokens; 0 is all."),
    click.option("--min-p", type=click.FloatRange(min=0, max=1, max_open=True), metavar="P",
                 help="Leave out tokens below this share of the best one's probability."),
    click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), metavar="R",
                 help="Above 1 makes tokens of the text so far less likely."),
    click.option("--seed", type=click.IntRange(min=0, max=2**64 - 1), metavar="N",
                 help="Repeats a sampled text; default: a new one each time."),
    click.option("--stop", multiple=True, metavar="TEXT",
                 help="End before this text; repeatable."),
    revision_option,
    device_option,
    click.option("--backend", default="auto", show_default=True, metavar="BACKEND",
                 help="auto, reference or triton."),
    dense_format_option,
    click.option("--max-context", type=click.IntRange(min=1), metavar="N",
                 help="Tokens the cache is made for; default: what the model allows and fits."),
)  # fmt: skip


def request_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options above to a verb, in this order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
