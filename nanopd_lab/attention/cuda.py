"""The hand-written CUDA kernels as an attention backend.

Decode steps go through the best rung of the ladder (`kernels.decode_launches.best_rung`), chunks through the paged
prefill kernel, except where PyTorch's own kernels are faster (see the prefill rows of
data/recorded/kernels-*.json):

    several whole prompts, or first chunks   FlashAttention on the batch's own K and V: one call, no pages
    one of LONG_QUERY tokens or more         the same, or SDPA where cuDNN, which uses Hopper's wgmma, has met its
                                             length often enough, see `Plans`
    LONG_QUERY tokens or more with a past    SDPA, one sequence at a time, on pages gathered first
    fp32                                     SDPA
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.kernels import ops, paged, reference, validate
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape
from nanopd_lab.kv.cache import KVShape

LONG_QUERY = 512
# Pairs of a query and a key over which cuDNN gains on FlashAttention what a plan costs: on an H100 75 ms and, with 32
# heads, 54 ps a pair (data/recorded/attention-plans-*.json).
PLAN_PAIRS = 1.4e9


class Plans:
    """Which prompts go to cuDNN: it is faster than FlashAttention, but plans every new length on the host first.

    Ski rental: a length is planned once FlashAttention has lost on it what the plan costs. Whoever sends prompts of
    ever new lengths then never pays for plans, and nobody more than twice the least (Karlin et al., "Competitive
    snoopy caching", 1988).
    """

    def __init__(self) -> None:
        self._lost: Counter[int] = Counter()

    def pays(self, length: int) -> bool:
        """Whether the plan for prompts of so many tokens has paid by now; counts the call."""
        self._lost[length] += length * length // 2
        return self._lost[length] > PLAN_PAIRS


_plans = Plans()


def sdpa_causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """SDPA in which the queries are the last tokens of the keys; [1, heads, tokens, head_dim] each."""
    if query.shape[2] == keys.shape[2]:
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    mask = causal_lower_right(query.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)


def flash_causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of sequences without a past, from `starts[i]` to `starts[i + 1]`; other rows are undefined."""
    return torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )[0]


def attend_known(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: torch.Tensor,
    lengths: Sequence[int],
    contexts: Sequence[int],
    scale: float,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a batch whose lengths the host knows: each sequence by what is fastest for it.

    Args:
        fresh: K and V of the batch's own tokens; a sequence without a past need not look for them in pages
        out: where to write; rows behind the batch's last are left alone
    """
    if not query.is_cuda:
        found = reference.attend(
            query, kv_layer, block_tables, context_lens, query_start, scale, torch.float32
        )
        return found.to(query.dtype)
    sequences = len(lengths)
    decodes = bisect_right(lengths, 1)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if decodes:
        paged.decode_into(
            out[:decodes],
            query[:decodes],
            kv_layer,
            block_tables[:decodes],
            context_lens[:decodes],
            workspace,
            scale,
        )
    halves = kv_layer.dtype != torch.float32
    new = [s for s in range(decodes, sequences) if contexts[s] == lengths[s]]
    together = fresh is not None and halves and len(new) > 1
    if together:
        assert fresh is not None
        # Those with a past come along, as if they had none, and are done again below: their rows lie between.
        found = flash_causal(query, *fresh, query_start[decodes:], max(lengths[decodes:]), scale)
        out[decodes : sum(lengths)] = found[decodes : sum(lengths)]
    few = decodes
    if not together and halves:
        few = bisect_right(lengths, LONG_QUERY - 1)
        if decodes < few:
            # query_start is absolute, so the kernel fills these sequences' rows of the whole output.
            part, starts = slice(decodes, few), query_start[decodes : few + 1]
            paged.prefill_into(
                out,
                query,
                kv_layer,
                block_tables[part],
                context_lens[part],
                starts,
                workspace,
                scale,
            )
    first = sum(lengths[:few])
    for s in range(few, sequences):
        rows = slice(first, first + lengths[s])
        first += lengths[s]
        if contexts[s] != lengths[s] or fresh is None:
            keys, values = reference.pages_of(kv_layer, block_tables[s], contexts[s])
        elif together:
            continue
        elif halves and not _plans.pays(lengths[s]):
            out[rows] = flash_causal(query, *fresh, query_start[s : s + 2], lengths[s], scale)[rows]
            continue
        else:
            keys, values = (x[rows].transpose(0, 1) for x in fresh)
        found = sdpa_causal(query[rows].transpose(0, 1)[None], keys[None], values[None], scale)
        out[rows] = found[0].transpose(0, 1)
    return out


Cut = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
_cut: Cut | None = None


@contextmanager
def cutting(cut: Cut) -> Iterator[None]:
    """Have `cut(query, key, value, kv_layer, workspace, scale)` called in place of every layer's attention.

    For capturing a model in pieces around it (`model.graphs`): the operator is the only place in a compiled layer
    where Python code of ours runs.
    """
    global _cut
    _cut = cut
    try:
        yield
    finally:
        _cut = None


def _unpack(
    lens: torch.Tensor, tables: torch.Tensor, header: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query_start, context_lens, decode_lens, prefill_lens, block_tables): views, see `PackedLengths`."""
    sequences, width = header[:2]
    starts, *three = lens.split([sequences + 1, sequences, sequences, sequences])
    return starts, *three, tables[: sequences * width].view(sequences, width)


def _attention_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    lens: torch.Tensor,
    tables: torch.Tensor,
    header: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    if _cut is not None:
        return _cut(query, key, value, kv_layer, workspace, scale)
    torch.ops.nanopd.kv_store(key, value, kv_layer, slot_mapping)
    head = header.tolist()
    sequences, decode_only = head[0], head[2]
    query_start, context_lens, decode_lens, prefill_lens, block_tables = _unpack(lens, tables, head)
    if len(head) > 3:
        lengths, contexts = head[3 : 3 + sequences], head[3 + sequences :]
        return attend_known(
            query,
            kv_layer,
            query_start,
            context_lens,
            block_tables,
            workspace,
            lengths,
            contexts,
            scale,
            fresh=(key, value),
        )
    # Captured in a graph: which sequences decode, and how long they are, the kernels read on the device.
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    paged.decode_into(
        out[:sequences], query[:sequences], kv_layer, block_tables, decode_lens, workspace, scale
    )
    if not decode_only:
        # Its sequences' rows come behind those of all decode steps, and overwrite the zeros left there.
        paged.prefill_into(out, query, kv_layer, block_tables, prefill_lens, query_start, workspace, scale)
    return out


def _attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    lens: torch.Tensor,
    tables: torch.Tensor,
    header: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    reference.store(key, value, kv_layer, slot_mapping)
    query_start, context_lens, _, _, block_tables = _unpack(lens, tables, header.tolist())
    out = reference.attend(query, kv_layer, block_tables, context_lens, query_start, scale, torch.float32)
    return out.to(query.dtype)


_library = torch.library.Library("nanopd", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor(a!) kv_layer, Tensor slot_mapping, Tensor lens, "
    "Tensor tables, Tensor header, Tensor workspace, float scale) -> Tensor"
)
_library.impl("attention", _attention_cuda, "CUDA")  # the header is on the host; CUDA goes before CPU
_library.impl("attention", _attention_cpu, "CPU")
torch.library.register_fake("nanopd::attention", lambda query, *_: query.new_empty(query.shape), lib=_library)


class CudaBackend:
    """See `AttentionBackend`. Owns the kernels' workspace, so one instance serves one stream at a
    time.

    validate_values: also check block ids, slots and lengths against the cache before each launch. That waits
    for the device, so the engine leaves it off: its tables come from its own allocator.
    """

    name = "cuda"

    def __init__(self, validate_values: bool = False) -> None:
        self.validate_values = validate_values
        self._workspace: torch.Tensor | None = None

    @staticmethod
    def check(shape: KVShape, num_heads: int) -> None:
        """Raise KernelArgumentError (a ValueError) unless the kernels support this cache and head count."""
        AttentionShape(shape.dtype, num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)

    def allocate(self, shape: KVShape, num_heads: int, device: torch.device) -> None:
        """Allocate the workspace now: before a model is compiled or a graph captured."""
        whole = AttentionShape(shape.dtype, num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)
        self._workspace = ops.make_workspace(whole, device)

    def workspace(self, query: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        """Scratch memory of the kernels; allocated by the first call at the latest."""
        if self._workspace is None or self._workspace.device != query.device:
            if query.device.type != "cuda":
                return query.new_empty(2)
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                raise KernelArgumentError(
                    "the first call of the CUDA backend allocates its workspace and must come before a graph "
                    "capture; run the batch once outside it"
                )
            self._workspace = ops.make_workspace(validate.shape_of(query, kv_layer), query.device)
        return self._workspace

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        ops.kv_store(key, value, kv_layer, slot_mapping, self.validate_values)

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        if self.validate_values:
            validate.check_cache(kv_layer)
            validate.check_values(kv_layer, metadata.block_tables, metadata.context_lens)
            validate.check_query_start(query, metadata.query_start, metadata.context_lens)
        return attend_known(
            query,
            kv_layer,
            metadata.query_start,
            metadata.context_lens,
            metadata.block_tables,
            self.workspace(query, kv_layer),
            metadata.query_lens_host,
            metadata.context_lens_host,
            scale,
        )

    def store_and_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_layer: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        """`store` and `attend` as one operator, for compiled models and CUDA graphs."""
        assert metadata.packed is not None
        return torch.ops.nanopd.attention(
            query,
            key,
            value,
            kv_layer,
            metadata.slot_mapping,
            metadata.packed.lens,
            metadata.packed.tables,
            metadata.packed.header,
            self.workspace(query, kv_layer),
            scale,
        )
