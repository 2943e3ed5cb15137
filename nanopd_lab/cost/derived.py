"""nanoPD's four parameters as numbers that follow from an iteration model, each at a stated working point."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.nanopd import NanoPDModel
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.cost.transfer_time import TransferModel


@dataclass(frozen=True)
class Derived:
    """At a prompt of `prompt_tokens` and decodes of `context` tokens each.

    alpha_s:         a step that is one whole prompt, divided by its tokens: what `α·L` must be to be right there
    beta_s:          a decode step of one sequence
    threshold:       batch at which the flat β meets the line through the origin with the slope that decode steps have
                     in large batches, in sequences: `β / marginal sequence`. nanoPD's `β·max(1, B/threshold)` is these
                     two lines
    gamma_s:         what the prompt adds to a decode step of `threshold` sequences, divided by its tokens
    transfer_rate_s: moving one token's KV, setup not counted; None without a link
    """

    prompt_tokens: int
    context: int
    alpha_s: float
    beta_s: float
    threshold: float
    gamma_s: float
    transfer_rate_s: float | None

    def as_nanopd(self, kv_bytes_per_token: int) -> NanoPDModel:
        """nanoPD's model with these parameters.

        Raises:
            ValueError: no link is known.
        """
        if not self.transfer_rate_s:
            raise ValueError("without a link there is no transfer rate; derive it with a TransferModel")
        return NanoPDModel(
            self.alpha_s,
            self.beta_s,
            max(1, round(self.threshold)),
            self.gamma_s,
            kv_bytes_per_token / self.transfer_rate_s,
            kv_bytes_per_token,
        )


def derive(
    model: IterationModel,
    *,
    prompt_tokens: int = 512,
    context: int = 512,
    link: TransferModel | None = None,
    block_bytes: int = 0,
    block_size: int = 16,
) -> Derived:
    """The numbers of a model at a working point; `block_bytes` is needed with a link.

    Raises:
        ValueError: a large batch costs nothing more by this model, or a link without `block_bytes`.
    """
    if link is not None and block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}; with a link, say how large a KV block is")
    beta = model.decode_seconds(1, context)
    many = 1 << 20
    marginal = (
        model.decode_seconds(2 * many, 2 * many * context) - model.decode_seconds(many, many * context)
    ) / many
    if marginal <= 0:
        raise ValueError("more sequences cost nothing by this model; it has no batch threshold")
    threshold = beta / marginal
    decodes = [ChunkShape(1, context)] * max(1, round(threshold))
    prompt = ChunkShape(prompt_tokens)
    gamma = (model.seconds([*decodes, prompt]) - model.seconds(decodes)) / prompt_tokens
    rate = None if link is None else (link.block_s + block_bytes / link.bytes_per_s) / block_size
    return Derived(
        prompt_tokens,
        context,
        model.seconds([prompt]) / prompt_tokens,
        beta,
        threshold,
        gamma,
        rate,
    )
