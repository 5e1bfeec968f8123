"""The model card of the demo checkpoint: one template, filled from the training report."""

from demo_export import END_OF_TEXT
from demo_model import DemoConfig

_CARD = """\
---
language: en
pipeline_tag: text-generation
tags: [gpt_oss, mixture-of-experts, mxfp4]
---

# A small trained GPT-OSS checkpoint

A language model of {millions:.1f} million parameters with the GPT-OSS architecture, in the file
format of the published GPT-OSS models: expert weights in MXFP4, everything else in bf16. It is
small enough to ship with a package, and it is really trained, so that a wrong kernel, format or
cache shows in its text and in its perplexity. Use it to test software; as a language model it is a
toy.

## Architecture

| | |
| --- | --- |
| layers | {c.num_hidden_layers}, sliding (window {c.sliding_window}) and full in turn |
| hidden size | {c.hidden_size} |
| query heads | {c.num_attention_heads} of {c.head_dim}, with sinks and biases |
| key/value heads | {c.num_key_value_heads} of {c.head_dim} |
| experts | {c.num_local_experts} a layer, {c.num_experts_per_tok} a token, clamped SwiGLU |
| expert inner size | {c.intermediate_size} |
| positions | {c.max_position_embeddings} |
| rope | theta {c.rope_theta:g}, YaRN factor {c.yarn_factor:g} over {c.initial_context_length} |
| vocabulary | {c.vocab_size:,} byte-level BPE tokens; `{end}` is 0 |
| parameters | {parameters:,} |
| parameters used by one token | {active:,} |
| MXFP4 scale rule | {t[scale_rule]}; elements to nearest, ties to even |

## Training

| | |
| --- | --- |
| data | English books in the public domain, {t[distinct_tokens]:,} tokens, `{end}` between books |
| tokens seen | {t[tokens]:,} ({t[passes]:.1f} passes) |
| steps | {t[steps]:,} of {t[tokens_per_step]:,} tokens |
| time | {t[seconds]:.0f} s on one {t[device]} |
| seed | {t[seed]} |
| window | {t[length]:,} tokens; {t[long_length]:,} in the last {t[long_share]:.0%} of the time |
| optimizer | Muon for the matrices, AdamW for the rest |

In the last {t[quantised_share]:.0%} of the time the experts were rounded to MXFP4 in the forward
pass, gradients passing straight through, so that the published form loses little. The schedule
follows the clock: a second run with the same seed gives similar weights, not the same ones.

## Perplexity

On books of the same kind that were not trained on ({validation_tokens:,} tokens), in fp32
arithmetic. The text is encoded as a whole, without a token in front, and cut into windows from its
first token on. Windows do not overlap, an incomplete last one is left out, and the first token of
each is not scored. Both columns use the file's bf16 weights outside the experts.

| windows | experts in fp32, as trained | experts in MXFP4, as in the file |
| --- | --- | --- |
{rows}

An expert takes between {low:.1%} and {high:.1%} of the choices of its layer (even: {even:.1%}).

## Limits

It writes sentences in the manner of old novels and knows nothing. It was not tuned to follow
instructions: the chat template only joins the messages as paragraphs. The language, attitudes and
prejudices are those of its books. `training_report.json` holds the figures.
"""


def model_card(config: DemoConfig, report: dict) -> str:
    """README.md of the checkpoint."""
    training = report["training"]
    raw, written = report["perplexity"]["fp32_experts"], report["perplexity"]["mxfp4_experts"]
    length, long_length = training["length"], training["long_length"]
    rows = [
        f"| {label} | {raw[key]:.3f} | {written[key]:.3f} |"
        for label, key in (
            (f"all of {length:,} tokens", f"all_{length}"),
            (f"the first 64 of {length:,} tokens", f"first_64_of_{length}"),
            (f"all of {long_length:,} tokens", f"all_{long_length}"),
        )
    ]
    shares = report["expert_share_of_choices"]
    return _CARD.format(
        c=config,
        t=training,
        end=END_OF_TEXT,
        millions=report["parameters"] / 1e6,
        parameters=report["parameters"],
        active=report["active_parameters"],
        validation_tokens=report["validation"]["tokens"],
        rows="\n".join(rows),
        low=min(map(min, shares)),
        high=max(map(max, shares)),
        even=1 / config.num_local_experts,
    )
