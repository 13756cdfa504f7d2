"""Parameters of the vision towers that engines load beside a decoder.

They take memory and no time in a workload of text. A config without ``vision_config`` counts as
text only. Counts are of transformers' modules of the same names: per layer four attention
matrices, the feed-forward ones and two norms, then patches, positions and the projector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from planner.io.models.fields import Fields

_CHANNELS: Final = 3
"""Red, green and blue."""


def _encoder(depth: int, hidden: int, width: int) -> int:
    """Layers with layer norms, two feed-forward matrices and biases everywhere."""
    attention = 4 * (hidden * hidden + hidden)
    feed_forward = 2 * hidden * width + width + hidden
    norms = 2 * 2 * hidden
    return depth * (attention + feed_forward + norms)


def siglip(whole: Fields, text_hidden: int) -> int:
    """Gemma 3: SigLIP and one matrix into the decoder."""
    if not whole.has("vision_config"):
        return 0
    v = whole.section("vision_config")
    hidden, patch = v.size("hidden_size"), v.size("patch_size")
    positions = (v.size("image_size") // patch) ** 2
    patches = (_CHANNELS * patch**2 + 1 + positions) * hidden
    encoder = _encoder(v.size("num_hidden_layers"), hidden, v.size("intermediate_size"))
    projector = hidden * text_hidden + hidden
    return patches + encoder + 2 * hidden + projector


def gemma4_vision(whole: Fields, text: Fields) -> int:
    """Gemma 4: gated feed-forward, four norms without biases, a table of positions per axis."""
    if not whole.has("vision_config"):
        return 0
    v = whole.section("vision_config")
    hidden, patch = v.size("hidden_size"), v.size("patch_size")
    head_dim = v.size("head_dim", hidden // v.size("num_attention_heads"))
    width = v.size("intermediate_size")
    layer = 4 * hidden**2 + 3 * hidden * width + 4 * hidden + 2 * head_dim
    patches = (_CHANNELS * patch**2 + 2 * v.size("position_embedding_size")) * hidden
    projector = hidden * text.size("hidden_size")
    return patches + v.size("num_hidden_layers") * layer + projector


def llama4_vision(whole: Fields, text_hidden: int) -> int:
    """Llama 4: a ViT with a class token, the pixel-shuffle network and the projector."""
    if not whole.has("vision_config"):
        return 0
    v = whole.section("vision_config")
    hidden, patch = v.size("hidden_size"), v.size("patch_size")
    width = v.size("intermediate_size")
    positions = (v.size("image_size") // patch) ** 2 + 1
    patches = (_CHANNELS * patch**2 + positions + 1) * hidden
    encoder = _encoder(v.size("num_hidden_layers"), hidden, width)
    into, out = v.size("projector_input_dim"), v.size("projector_output_dim")
    shuffle = width * into + into * out
    return patches + encoder + 4 * hidden + shuffle + v.size("vision_output_dim") * text_hidden


def qwen_vision(whole: Fields, text_hidden: int) -> int:
    """Qwen3.5: patches over time, a table of positions and the merger."""
    if not whole.has("vision_config"):
        return 0
    v = whole.section("vision_config")
    hidden, patch = v.size("hidden_size"), v.size("patch_size")
    pixels = v.size("in_channels", _CHANNELS) * v.size("temporal_patch_size") * patch**2
    patches = (pixels + 1 + v.size("num_position_embeddings")) * hidden
    merged = hidden * v.size("spatial_merge_size") ** 2
    out = v.size("out_hidden_size", text_hidden)
    merger = 2 * hidden + merged * (merged + 1) + (merged + 1) * out
    return patches + _encoder(v.size("depth"), hidden, v.size("intermediate_size")) + merger


def moonvit(whole: Fields, text_hidden: int) -> int:
    """Kimi K2.5: MoonViT and its patch merger."""
    if not whole.has("vision_config"):
        return 0
    v = whole.section("vision_config")
    hidden, patch = v.size("vt_hidden_size"), v.size("patch_size")
    positions = v.size("init_pos_emb_height") * v.size("init_pos_emb_width")
    patches = (_CHANNELS * patch**2 + 1 + positions) * hidden
    encoder = _encoder(v.size("vt_num_hidden_layers"), hidden, v.size("vt_intermediate_size"))
    height, width = v.sizes("merge_kernel_size", 2, low=1)
    merged = hidden * height * width
    merger = 2 * hidden + merged * (merged + 1) + (merged + 1) * text_hidden
    return patches + encoder + 2 * hidden + merger
