"""Every weight of a model: where its elements lie under tensor parallelism, and their bytes.

The split over ranks is vLLM's (``model_executor/layers/linear.py`` and the model files): matrices
into heads or feed-forward columns are cut by column, those back to the residual stream by row,
KV heads are replicated once there are more ranks than heads, the vocabulary is cut with the last
rank padded, and norms, routers, the down-projections of latent attention and its indexer are
whole on every rank. Of the routed experts a rank holds its share of whole ones, each cut over
``moe_tp`` ranks (layers/fused_moe/layer.py, ``FusedMoEParallelConfig``); shared experts and dense
networks follow attention's ``tp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulator.model import Attention, Experts, GatedDeltaNet, LatentAttention, Mlp
from simulator.plan import Shape
from simulator.precision import PRECISIONS
from simulator.stages import Stage
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator.model import Ffn, Layer, Mamba2, Mixer, ModelShape


_PADDED: Final = ("mxfp4", "mxfp4_mxfp8")
_PADDED_WIDTH: Final = 128
_PADDED_HIDDEN: Final = 256
"""What vLLM pads MXFP4 experts to (layers/quantization/mxfp4.py, Marlin): with it gpt-oss-120b
takes the 66.0 GiB that its log prints (vllm issue 23278). Other kernels pad a little more or less:
64.4 GiB in the log of issue 27508."""


_WHOLE: Final = Shape(1)


@dataclass(frozen=True)
class Weight:
    """One weight, or several of one kind, as one rank holds it.

    Parameters
    ----------
    name
        What it is, within its layer.
    elements
        Elements on the rank.
    dtype
        A name of `simulator/precision.py`, or ``fp32``.
    is_copy
        Whether the engine makes it from other weights while loading: it takes memory and is no
        parameter.

    """

    name: str
    elements: int
    dtype: str
    is_copy: bool = False

    @property
    def num_bytes(self) -> float:
        """Bytes, the scales of quantised weights included."""
        if self.dtype in PRECISIONS:
            return self.elements * PRECISIONS[self.dtype].weight_bytes
        return float(self.elements * DTYPE_BYTES[self.dtype])


def layer_weights(model: ModelShape, layer: Layer, shape: Shape = _WHOLE) -> tuple[Weight, ...]:
    """Weights of ``layer`` on one rank of a stage of that shape, empty ones left out."""
    weights = [
        *_mixer(layer.mixer, model.hidden_size, shape.tp),
        *_ffn(layer.ffn, model.hidden_size, shape),
        Weight("norms", layer.norms * model.hidden_size, "bf16"),
    ]
    return tuple(weight for weight in weights if weight.elements)


def outer_weights(model: ModelShape, shape: Shape = _WHOLE) -> tuple[Weight, ...]:
    """Weights outside the layers on one rank; a tied head is the embedding itself.

    Attention's data-parallel groups each hold them all.
    """
    vocabulary = _share(model.vocab_size, shape.tp) * model.hidden_size
    weights = [
        Weight("embedding", vocabulary, "bf16"),
        Weight("head", 0 if model.tie_word_embeddings else vocabulary, "bf16"),
        Weight("last norm", model.hidden_size, "bf16"),
        # vLLM cuts vision towers like the decoder (mm_encoder_tp_mode "weights", its default).
        Weight("other", _share(model.other_params, shape.tp), "bf16"),
    ]
    return tuple(weight for weight in weights if weight.elements)


def weight_bytes_per_rank(model: ModelShape, shape: Shape) -> int:
    """Bytes of all weights, engine's copies included, on one rank of one stage of that shape."""
    return stage_weight_bytes_per_rank(Stage(model, is_first=True, is_last=True), shape)


def stage_weight_bytes_per_rank(stage: Stage, shape: Shape) -> int:
    """Bytes of one pipeline stage's weights, engine's copies included, on one of its ranks.

    The first stage has the embedding and towers, the last one the last norm and the head, for
    which it keeps a tied embedding of its own (vLLM, model_executor/models/llama.py).
    """
    model = stage.model
    layers = sum(
        count * sum(weight.num_bytes for weight in layer_weights(model, layer, shape))
        for layer, count in model.layer_counts.items()
    )
    held = set()
    if stage.is_first:
        held |= {"embedding", "other"}
    if stage.is_last:
        held |= {"head", "last norm", *(("embedding",) if model.tie_word_embeddings else ())}
    outer = sum(w.num_bytes for w in outer_weights(model, shape) if w.name in held)
    return round(layers + outer)


def parameter_count(model: ModelShape) -> int:
    """Parameters of the model as served: those of next-token-prediction layers are not in it."""
    layers = sum(count * _parameters(model, layer) for layer, count in model.layer_counts.items())
    return layers + sum(weight.elements for weight in outer_weights(model))


def active_parameter_count(model: ModelShape) -> int:
    """Parameters that one token is multiplied with.

    The head counts, the embedding (one row is looked up) does not, as in the gpt-oss model card
    (arXiv 2508.10925, table 1); add ``vocab_size * hidden_size`` for publishers who count both.
    """
    idle = sum(
        count * _idle_expert_parameters(model, layer.ffn)
        for layer, count in model.layer_counts.items()
        if isinstance(layer.ffn, Experts)
    )
    looked_up = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return parameter_count(model) - model.other_params - idle - looked_up


def _parameters(model: ModelShape, layer: Layer) -> int:
    return sum(w.elements for w in layer_weights(model, layer) if not w.is_copy)


def _idle_expert_parameters(model: ModelShape, ffn: Experts) -> int:
    """Parameters of the routed experts that one token does not visit."""
    experts = _routed_experts(ffn, model.hidden_size, _WHOLE)
    routed = sum(weight.elements for weight in experts if not weight.is_copy)
    return routed // ffn.num_experts * (ffn.num_experts - ffn.top_k)


def _share(whole: int, ranks: int) -> int:
    """The padded share of one rank."""
    return -(-whole // ranks)


def _mixer(mixer: Mixer | None, hidden: int, tp: int) -> Iterator[Weight]:
    if mixer is None:
        return iter(())
    if isinstance(mixer, Attention):
        return _attention(mixer, hidden, tp)
    if isinstance(mixer, LatentAttention):
        return _latent_attention(mixer, hidden, tp)
    if isinstance(mixer, GatedDeltaNet):
        return _gated_delta_net(mixer, hidden, tp)
    return _mamba2(mixer, hidden, tp)


def _attention(mixer: Attention, hidden: int, tp: int) -> Iterator[Weight]:
    heads, kv_heads = mixer.heads_per_rank(tp), mixer.kv_heads_per_rank(tp)
    q_width = heads * mixer.head_dim * (2 if mixer.gated else 1)
    k_width = kv_heads * mixer.head_dim
    v_width = 0 if mixer.values_are_keys else kv_heads * mixer.v_head_dim
    yield Weight("qkv", hidden * (q_width + k_width + v_width), mixer.dtype)
    yield Weight("output", heads * mixer.v_head_dim * hidden, mixer.dtype)
    if mixer.values_are_keys:
        # vLLM's fused projection holds the key matrix twice (models/gemma4.py, load_weights).
        yield Weight("keys as values", hidden * k_width, mixer.dtype, is_copy=True)
    if mixer.qkv_bias:
        yield Weight("qkv bias", q_width + k_width + v_width, "bf16")
    yield Weight("output bias", hidden if mixer.output_bias else 0, "bf16")
    yield Weight("vectors", mixer.vector_params, "bf16")


def _latent_attention(mixer: LatentAttention, hidden: int, tp: int) -> Iterator[Weight]:
    heads = mixer.heads_per_rank(tp)
    q_width = heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    kv_down = hidden * (mixer.kv_lora_rank + mixer.qk_rope_head_dim)
    kv_up = mixer.kv_lora_rank * heads * (mixer.qk_nope_head_dim + mixer.v_head_dim)
    yield Weight("down", hidden * mixer.q_lora_rank + kv_down, mixer.dtype)
    yield Weight("query up", (mixer.q_lora_rank or hidden) * q_width, mixer.dtype)
    yield Weight("key and value up", kv_up, mixer.dtype)
    # Decoding multiplies by the two halves in bf16 and prefill by the projection itself; vLLM
    # keeps both (v1/attention/backends/mla/common.py, process_weights_after_loading).
    yield Weight("absorbed key and value up", kv_up, "bf16", is_copy=True)
    yield Weight("output", heads * mixer.v_head_dim * hidden, mixer.dtype)
    yield Weight("latent norms", mixer.q_lora_rank + mixer.kv_lora_rank, "bf16")
    # The indexer of DeepSeek-V3.2 (vLLM models/deepseek_v2.py, Indexer): queries from the
    # compressed query, one key per token with a layer norm, and one weight per head.
    index_width = mixer.index_heads * mixer.index_head_dim
    index_key = hidden * mixer.index_head_dim if mixer.index_heads else 0
    yield Weight("indexer", (mixer.q_lora_rank or hidden) * index_width + index_key, mixer.dtype)
    yield Weight("indexer head weights", hidden * mixer.index_heads, "bf16")
    yield Weight("indexer norm", 2 * mixer.index_head_dim if mixer.index_heads else 0, "bf16")


def _gated_delta_net(mixer: GatedDeltaNet, hidden: int, tp: int) -> Iterator[Weight]:
    """As in vLLM's models/qwen3_next.py."""
    value_heads = mixer.num_value_heads // tp
    key_width = max(1, mixer.num_key_heads // tp) * mixer.key_head_dim
    value_width = value_heads * mixer.value_head_dim
    yield Weight("qkvz", hidden * 2 * (key_width + value_width), mixer.dtype)
    # One step size and one decay per head: too narrow to quantise, published checkpoints do not.
    yield Weight("ba", hidden * 2 * value_heads, "bf16")
    yield Weight("convolution", (2 * key_width + value_width) * mixer.conv_width, "bf16")
    yield Weight("decay", value_heads, "fp32")
    yield Weight("step bias", value_heads, "bf16")
    yield Weight("gated norm", mixer.value_head_dim, "bf16")
    yield Weight("output", value_width * hidden, mixer.dtype)


def _mamba2(mixer: Mamba2, hidden: int, tp: int) -> Iterator[Weight]:
    """As in vLLM's layers/mamba/mamba_mixer2.py, convolution bias included."""
    heads = mixer.num_heads // tp
    width = heads * mixer.head_dim
    state_width = 2 * max(1, mixer.num_groups // tp) * mixer.state_size
    yield Weight("input", hidden * (2 * width + state_width + heads), mixer.dtype)
    yield Weight("convolution", (width + state_width) * (mixer.conv_width + 1), "bf16")
    yield Weight("decay", heads, "fp32")
    yield Weight("skip and step bias", 2 * heads, "bf16")
    yield Weight("gated norm", width, "bf16")
    yield Weight("output", width * hidden, mixer.dtype)


def _ffn(ffn: Ffn | None, hidden: int, shape: Shape) -> Iterator[Weight]:
    if ffn is None:
        return
    if isinstance(ffn, Mlp):
        yield from _mlp("mlp", ffn, hidden, shape.tp)
        return
    yield Weight("router", hidden * ffn.num_experts + ffn.router_params, "bf16")
    yield from _routed_experts(ffn, hidden, shape)
    shared = Mlp(ffn.shared_intermediate_size, ffn.gated, ffn.bias, ffn.shared_dtype)
    if shared.intermediate_size:
        yield from _mlp("shared experts", shared, hidden, shape.tp)
    yield Weight("shared gate", hidden if ffn.shared_gate else 0, "bf16")
    # Into and out of the latent width, whole on every rank (vLLM models/nemotron_h.py).
    yield Weight("latent", 2 * hidden * ffn.latent_size, ffn.latent_dtype)


def _mlp(name: str, mlp: Mlp, hidden: int, tp: int) -> Iterator[Weight]:
    width = mlp.intermediate_size // tp
    inputs = 2 if mlp.gated else 1
    yield Weight(name, hidden * (inputs + 1) * width, mlp.dtype)
    if mlp.bias:
        yield Weight(f"{name} bias", inputs * width + hidden, "bf16")


def _routed_experts(ffn: Experts, hidden: int, shape: Shape) -> Iterator[Weight]:
    """The rank's share of the routed experts, each cut over ``moe_tp`` ranks."""
    one, inner = (
        Mlp(ffn.intermediate_size, ffn.gated, ffn.bias, ffn.dtype),
        ffn.latent_size or hidden,
    )
    held = _share(ffn.num_experts, shape.ep)
    for weight in _mlp("experts", one, inner, shape.moe_tp):
        yield Weight(weight.name, held * weight.elements, weight.dtype)
    if ffn.dtype in _PADDED:
        width = ffn.intermediate_size // shape.moe_tp
        padded = _round_up(inner, _PADDED_HIDDEN) * _round_up(width, _PADDED_WIDTH)
        extra = (3 if ffn.gated else 2) * (padded - inner * width)
        yield Weight("expert padding", held * extra, ffn.dtype, is_copy=True)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
