"""KV cache of one rank: what each layer keeps of a token, and the pages that vLLM cuts it into.

Byte counts are exact for vLLM and, attention and latent attention alone, for SGLang too. The
grouping of mixed models follows vLLM 0.24.0, ``v1/core/kv_cache_utils.py`` (``get_kv_cache_groups``
and what it calls); 0.10.2 differs in one point, named in `_group_size`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulator.model import Attention, GatedDeltaNet, LatentAttention
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.model import Mamba2, Mixer, ModelShape

_LATENT_BLOCK_TOKENS: Final = 64
"""Least block of vLLM's latent-attention kernels (v1/attention/backends/mla: FlashMLA, its sparse
form, the indexer and FlashInfer-MLA). The FlashAttention kernel of newer versions on Hopper keeps
16, CUTLASS takes 128: at most one such block per sequence more or less."""

_SCALE_GROUP: Final = 128
"""fp8 elements of a cached latent or indexer key that share one float32 scale (vLLM
v1/attention/backends/mla/flashmla_sparse.py, SGLang's DeepSeek-V3.2 pool)."""

_UNEVEN: Final = 1.5
"""Up to this ratio of layer counts vLLM pads the rarer kind instead of splitting the other."""


@dataclass(frozen=True)
class KvLayout:
    """How many pages a sequence takes.

    A page holds one block of tokens, or one recurrent state, for every layer of one group of
    layers; all groups draw from one pool.

    Parameters
    ----------
    block_tokens
        Tokens of one block.
    page_bytes
        Bytes of one page.
    growing
        Pages that each block of tokens takes in layers that keep every token.
    windowed
        Pages that each block takes in layers with a sliding window.
    window_blocks
        Blocks beyond which the windowed layers give back as much as they take.
    fixed
        Pages of a sequence of any length: recurrent states.

    """

    block_tokens: int
    page_bytes: int
    growing: int
    windowed: int = 0
    window_blocks: int = 0
    fixed: int = 0

    def pages(self, tokens: int) -> int:
        """Pages of a sequence of ``tokens`` tokens between two iterations.

        While a chunk of a prompt is computed, windowed layers hold its own tokens on top of the
        window, which is not counted.
        """
        blocks = -(-tokens // self.block_tokens)
        return self.growing * blocks + self.windowed * min(blocks, self.window_blocks) + self.fixed

    def longest(self, pages: int) -> int | None:
        """Tokens of the longest sequence that ``pages`` hold; ``None`` where length takes none."""
        spare = pages - self.fixed
        both = self.growing + self.windowed
        if not both:
            return None
        if not self.windowed or spare < both * self.window_blocks:
            return max(0, spare) // both * self.block_tokens
        if not self.growing:
            return None
        return (spare - self.windowed * self.window_blocks) // self.growing * self.block_tokens


@dataclass(frozen=True)
class _Cached:
    """What one layer keeps: ``size_bytes`` per token of a window (0: of all), or per state."""

    size_bytes: int
    window_tokens: int = 0
    is_state: bool = False


def token_bytes(mixer: Attention | LatentAttention, kv_dtype: str, tp: int) -> int:
    """Bytes that one token costs in one layer on one of ``tp`` ranks.

    Keys and values of the rank's KV heads; both are cached even where values are unnormalised
    keys. A latent (and its rotary key) is whole on every rank. Sparse attention keeps the key of
    its indexer beside it, always fp8 with scales, and stores an fp8 latent with scales and a bf16
    rotary key (``fp8_ds_mla``: 656 bytes at DeepSeek-V3.2's widths).
    """
    element = DTYPE_BYTES[kv_dtype]
    if isinstance(mixer, Attention):
        return mixer.kv_heads_per_rank(tp) * (mixer.head_dim + mixer.v_head_dim) * element
    latent, rope = mixer.kv_lora_rank, mixer.qk_rope_head_dim
    if not mixer.index_heads:
        return (latent + rope) * element
    index = _scaled_fp8_bytes(mixer.index_head_dim)
    if kv_dtype == "fp8":
        return _scaled_fp8_bytes(latent) + rope * DTYPE_BYTES["bf16"] + index
    return (latent + rope) * element + index


def state_bytes(mixer: GatedDeltaNet | Mamba2, state_dtype: str, tp: int) -> int:
    """Bytes of one sequence's state in one recurrent layer on one of ``tp`` ranks.

    The last tokens of the convolution, bf16, and one matrix per head, ``state_dtype``
    (model_executor/layers/mamba/mamba_utils.py, ``MambaStateShapeCalculator``).
    """
    if isinstance(mixer, GatedDeltaNet):
        keys = max(1, mixer.num_key_heads // tp) * mixer.key_head_dim
        values = mixer.num_value_heads // tp * mixer.value_head_dim
        conv_width, matrix = 2 * keys + values, values * mixer.key_head_dim
    else:
        width = mixer.num_heads // tp * mixer.head_dim
        groups = max(1, mixer.num_groups // tp)
        conv_width, matrix = width + 2 * groups * mixer.state_size, width * mixer.state_size
    conv = conv_width * (mixer.conv_width - 1)
    return conv * DTYPE_BYTES["bf16"] + matrix * DTYPE_BYTES[state_dtype]


def kv_bytes_per_token(model: ModelShape, tp: int) -> int:
    """KV-cache bytes that one more token costs one rank, in layers that keep every token.

    It is 0 where every layer has a window or a state. Padding of groups is not in it.
    """
    return sum(
        count * token_bytes(layer.mixer, model.kv_dtype, tp)
        for layer, count in model.layer_counts.items()
        if isinstance(layer.mixer, (Attention, LatentAttention)) and not _window_tokens(layer.mixer)
    )


def kv_layout(model: ModelShape, tp: int, block_tokens: int, state_dtype: str) -> KvLayout:
    """Pages of ``model`` on one of ``tp`` ranks.

    Layers of one kind form one group whose page holds them all. Layers of several kinds are
    dealt into groups of equal size (the last one padded), with pages of equal bytes: an attention
    block grows until its page holds a recurrent state, and where kinds of attention differ in
    bytes per token the smaller ones take more tokens to a page.

    Parameters
    ----------
    model, tp
        The model and its tensor-parallel width.
    block_tokens
        Tokens of one block of plain attention.
    state_dtype
        Dtype of recurrent states. vLLM reads it from the checkpoint (float32 for Qwen3.5 and
        Nemotron 3) and falls back on bf16, as 0.10.2 always did.

    """
    kinds: Counter[_Cached] = Counter()
    latent = False
    for layer, count in model.layer_counts.items():
        if layer.mixer is not None:
            kinds[_cached(layer.mixer, model.kv_dtype, state_dtype, tp)] += count
            latent = latent or isinstance(layer.mixer, LatentAttention)
    block = max(block_tokens, _LATENT_BLOCK_TOKENS) if latent else block_tokens
    if len({(kind.window_tokens, kind.is_state) for kind in kinds}) == 1:
        return _one_group(kinds, block)
    return _mixed_groups(kinds, block)


def _scaled_fp8_bytes(elements: int) -> int:
    return elements + elements // _SCALE_GROUP * DTYPE_BYTES["fp32"]


def _window_tokens(mixer: Attention | LatentAttention) -> int:
    return mixer.window_tokens if isinstance(mixer, Attention) else 0


def _cached(mixer: Mixer, kv_dtype: str, state_dtype: str, tp: int) -> _Cached:
    if isinstance(mixer, (Attention, LatentAttention)):
        return _Cached(token_bytes(mixer, kv_dtype, tp), _window_tokens(mixer))
    return _Cached(state_bytes(mixer, state_dtype, tp), is_state=True)


def _window_blocks(window_tokens: int, block_tokens: int) -> int:
    """Most blocks that the window's tokens, the next one included, can lie in."""
    return -(-(window_tokens - 1) // block_tokens) + 1


def _one_group(kinds: Counter[_Cached], block: int) -> KvLayout:
    kind = next(iter(kinds))
    size_bytes = sum(count * each.size_bytes for each, count in kinds.items())
    if kind.is_state:
        return KvLayout(block, size_bytes, growing=0, fixed=1)
    if kind.window_tokens:
        window_blocks = _window_blocks(kind.window_tokens, block)
        return KvLayout(block, block * size_bytes, 0, windowed=1, window_blocks=window_blocks)
    return KvLayout(block, block * size_bytes, growing=1)


def _group_size(counts: list[int]) -> int:
    """Layers of one group; 0.10.2 always takes the rarest kind's count."""
    fewest, most = min(counts), max(counts)
    return most if most < _UNEVEN * fewest else fewest


def _mixed_groups(kinds: Counter[_Cached], block: int) -> KvLayout:
    """Layers of several kinds, attention among them; exact for the mixes that vLLM serves.

    Where windowed pages hold fewer tokens than the others', counts round up to the larger block;
    layers with different windows all count as the widest.
    """
    group_size = _group_size(list(kinds.values()))
    groups = {kind: -(-count // group_size) for kind, count in kinds.items()}
    attention = [kind for kind in groups if not kind.is_state]
    widest = max(kind.size_bytes for kind in attention)
    state = max((kind.size_bytes for kind in groups if kind.is_state), default=0)
    block *= max(1, -(-state // (block * widest)))
    # A smaller kind takes more tokens to a page if they fill it, else its pages are padded.
    tokens = {
        kind: block * (1 if widest % kind.size_bytes else widest // kind.size_bytes)
        for kind in attention
    }
    largest = max(tokens.values())
    growing = windowed = window_blocks = 0
    for kind in attention:
        per_block = -(-largest // tokens[kind])
        if kind.window_tokens:
            windowed += groups[kind] * per_block
            most = _window_blocks(kind.window_tokens, tokens[kind])
            window_blocks = max(window_blocks, -(-most // per_block))
        else:
            growing += groups[kind] * per_block
    fixed = sum(count for kind, count in groups.items() if kind.is_state)
    page_bytes = group_size * block * widest
    return KvLayout(largest, page_bytes, growing, windowed, window_blocks, fixed)
