"""Latent attention: true to its modules, monotone, labelled, smooth in every shape."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from planner.io import profiles as shipped
from planner.io.devices import load_device
from simulator.device import Device
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.latent import (
    latent_context_batch_s,
    latent_context_floor_s,
    latent_context_s,
    latent_generation_s,
    latent_underfill_s,
)
from simulator.latent_grid import LEAST_SHARE, nearest_grids
from simulator.latent_work import CONTEXT, GENERATION, ideal_s
from simulator.local_fit import grown, joined_labels, local_quadratic, without_spikes
from simulator.model import LatentAttention
from simulator.ops import latent_gemms
from simulator.table import BatchedGemm, KernelTable, LatentGrid

H100 = load_device("H100-SXM-80GB")
VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
DEEPSEEK = LatentAttention(128, 1536, 512, 128, 64, 128)  # V3, arXiv 2412.19437, section 4.2
SPARSE = replace(DEEPSEEK, index_heads=64, index_head_dim=128, index_topk=2048)  # V3.2
HIDDEN = 7168
BATCHES = np.unique(np.geomspace(1, 3000, 40).astype(int))  # tables end at 1,024
CONTEXTS = np.unique(np.geomspace(1, 300_000, 60).astype(int))  # tables end at 131,072
LENGTHS = np.arange(0, 60_000, 97)  # tables end at 32,768
# A device so fast that projections and rooflines vanish beside measured times.
FAST = Device("fast", 1, 1e30, 1e30, 1e30, 1e30, 1, 0.0, 1e30, None)


@cache
def table(engine: str) -> KernelTable:
    """The shipped table of H100."""
    return shipped.load_kernel_table("H100-SXM-80GB", engine, VERSIONS[engine])


def grid(phase: str, time_s: np.ndarray, length: list[int], **changes: object) -> LatentGrid:
    """DeepSeek-V3's widths at 8 and 16 heads, batches 1, 2 and 4."""
    one = LatentGrid(
        phase=phase,
        module=True,
        hidden_size=HIDDEN,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_topk=0,
        weight_dtype="bf16",
        kv_dtype="bf16",
        prefix=np.array([0]),
        heads=np.array([8, 16]),
        batch=np.array([1, 2, 4]),
        length=np.array(length),
        time_s=time_s,
    )
    return replace(one, **changes)


def only(*grids: LatentGrid) -> KernelTable:
    """A table of nothing else."""
    return KernelTable("d", "e", "v", {}, (), (), {}, {}, latent=grids)


def decode_times() -> np.ndarray:
    """Shape (1, 2, 3, 2): 1 ms, and for 16 heads 2 ms, per sequence and 1,000 tokens."""
    per_sequence = np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0]])
    return 1e-3 * np.stack([per_sequence, 2 * per_sequence])[None]


def assert_monotone(time_s: np.ndarray, axis: int) -> None:
    """No step down, rounding aside."""
    assert (np.diff(time_s, axis=axis) >= -1e-12 * time_s.max()).all()


def test_decode_is_read_from_the_grid_and_joined_linearly() -> None:
    """Decode is read from the grid and joined linearly."""
    measured = only(grid(GENERATION, decode_times(), [1000, 2000]))
    time_s, label = latent_generation_s(
        measured, FAST, DEEPSEEK, 8, "bf16", [1, 2, 3], [1000, 1500, 2000]
    )
    assert time_s == pytest.approx(1e-3 * np.array([[1, 1.5, 2], [2, 3, 4], [3, 4.5, 6]]))
    inside, between = Provenance.MEASURED, Provenance.INTERPOLATED
    assert label.tolist() == [
        [inside, between, inside],
        [inside, between, inside],
        [between, between, between],
    ]


def test_decode_grows_with_the_work_beyond_the_grid() -> None:
    """Decode grows with the work beyond the grid."""
    measured = only(grid(GENERATION, decode_times(), [1000, 2000]))
    time_s, label = latent_generation_s(measured, H100, DEEPSEEK, 8, "bf16", [4], [2000, 200_000])
    ideal = ideal_s(H100, DEEPSEEK, 8, "bf16", GENERATION, np.array([4.0]), np.array([2e3, 2e5]))
    assert time_s[0, 1] / time_s[0, 0] == pytest.approx(ideal[0, 1] / ideal[0, 0])
    assert label[0, 1] == Provenance.EXTRAPOLATED


def test_projections_are_taken_off_and_add_up_to_the_module_again() -> None:
    """Projections are taken off and add up to the module again."""
    measured = table("vllm")
    for one in measured.latent:
        if one.phase != GENERATION or one.index_topk or one.weight_dtype != "bf16":
            continue
        for i, heads in enumerate(one.heads.tolist()):
            kernel_s, _ = latent_generation_s(
                measured, H100, DEEPSEEK, heads, one.kv_dtype, one.batch, one.length
            )
            around_s = sum(
                gemm_s(measured, H100, gemm.dtype, one.batch, gemm.n, gemm.k)[0]
                for gemm in latent_gemms(DEEPSEEK, HIDDEN, heads)
            )
            error = np.abs((kernel_s + around_s[:, None]) / one.time_s[0, i] - 1)
            assert np.nanmedian(error) < 0.005
            assert np.nanmax(error) < 0.1


def test_a_kernel_never_beats_its_roofline_by_more_than_fp8_could() -> None:
    """A kernel never beats its roofline by more than fp8 could."""
    impossible = only(grid(GENERATION, np.full((1, 2, 3, 2), 1e-9), [1000, 2000]))
    size = (DEEPSEEK, 8, "bf16")
    time_s, _ = latent_generation_s(impossible, H100, *size, [1, 2, 4], [1000, 2000])
    axes = np.array([1.0, 2.0, 4.0]), np.array([1000.0, 2000.0])
    assert time_s == pytest.approx(LEAST_SHARE * ideal_s(H100, *size, GENERATION, *axes))


def test_a_bare_kernel_gets_its_head_products_and_small_kernels() -> None:
    """A bare kernel gets its head products and small kernels."""
    bare = grid(GENERATION, decode_times(), [1000, 2000], module=False)
    heads, tokens = np.array([8, 16]), np.array([1, 2, 4])
    products = BatchedGemm(heads, tokens, np.full((2, 3), 1e-4))
    bmm = {("pre", "bf16"): products, ("post", "bf16"): products}
    slow_launch = replace(FAST, elementwise_launch_s=1e-5)
    with_products = replace(only(bare), latent_bmm=bmm)
    time_s, _ = latent_generation_s(with_products, slow_launch, DEEPSEEK, 8, "bf16", [1], [1000])
    assert time_s[0, 0] == pytest.approx(1e-3 + 2 * 1e-4 + 4 * 1e-5)


@pytest.mark.parametrize("engine", VERSIONS)
@pytest.mark.parametrize("attention", [DEEPSEEK, SPARSE])
@pytest.mark.parametrize("heads", [1, 12, 16, 128, 200])
def test_decode_is_sane_and_monotone(engine: str, attention: LatentAttention, heads: int) -> None:
    """Decode is sane and monotone."""
    for kv_dtype in ("bf16", "fp8"):
        time_s, label = latent_generation_s(
            table(engine), H100, attention, heads, kv_dtype, BATCHES, CONTEXTS
        )
        assert np.isfinite(time_s).all()
        assert (time_s > 0).all()
        assert_monotone(time_s, 0)
        assert_monotone(time_s, 1)
        assert label.max() < Provenance.ROOFLINE


@pytest.mark.parametrize("engine", VERSIONS)
@pytest.mark.parametrize("attention", [DEEPSEEK, SPARSE])
@pytest.mark.parametrize("heads", [1, 16, 24, 128])
def test_prompts_are_sane_and_monotone(engine: str, attention: LatentAttention, heads: int) -> None:
    """Prompts are sane and monotone."""
    kernel = (table(engine), H100, attention, heads, "bf16")
    time_s, launch_s, _ = latent_context_s(*kernel, LENGTHS)
    underfill_s, _ = latent_underfill_s(*kernel, LENGTHS)
    for array in (time_s, underfill_s):
        assert np.isfinite(array).all()
        assert array[0] == 0
        assert (array >= 0).all()
        assert_monotone(array, 0)
    assert (time_s[1:] > 0).all()
    assert launch_s >= 0


def test_prompts_add_up_to_the_measured_batches() -> None:
    """Prompts add up to the measured batches."""
    kernel = (table("vllm"), H100, DEEPSEEK, 16, "bf16")
    batch, length = np.array([1, 2, 4, 8]), np.array([512, 1024, 2048, 4096, 8192])
    measured_s, _ = latent_context_batch_s(*kernel, batch, length)
    prompt_s, launch_s, _ = latent_context_s(*kernel, length)
    tokens = np.outer(batch, length)
    underfill_s = latent_underfill_s(*kernel, tokens.ravel())[0].reshape(tokens.shape)
    error = (launch_s + np.outer(batch, prompt_s) + underfill_s) / measured_s - 1
    assert np.median(np.abs(error)) < 0.05
    assert np.abs(error).max() < 0.25


def test_a_chunk_after_cached_tokens_costs_what_was_measured() -> None:
    """A chunk after cached tokens costs what was measured."""
    # Sparse modules were measured after 128 cached tokens too; long chunks show their kernel.
    (whole,) = [
        one
        for one in table("vllm").latent
        if one.phase == CONTEXT and one.index_topk and one.hidden_size == HIDDEN
        if (one.weight_dtype, one.kv_dtype) == ("bf16", "bf16")
    ]
    i, long = whole.heads.tolist().index(16), whole.length >= 4096
    kernel = (table("vllm"), H100, SPARSE, 16, "bf16")
    cached = int(whole.prefix[1])
    chunk_s = latent_context_s(*kernel, whole.length + cached)[0]
    chunk_s -= latent_context_s(*kernel, [cached])[0]
    first_s = latent_context_s(*kernel, whole.length)[0]
    more_s = whole.time_s[1, i, 0] - whole.time_s[0, i, 0]
    error = (chunk_s - first_s - more_s)[long] / whole.time_s[0, i, 0][long]
    assert np.abs(error).max() < 0.06


def test_a_hole_is_filled_from_its_neighbours() -> None:
    """A hole is filled from its neighbours."""
    measured = table("vllm")
    ((one, _),) = nearest_grids(measured, GENERATION, DEEPSEEK, "bf16")
    time_s = one.time_s.copy()
    place = (0, 4, 5, 9)
    true_s, time_s[place] = time_s[place], np.nan
    holed = replace(measured, latent=(replace(one, time_s=time_s),))
    kernel = (H100, DEEPSEEK, int(one.heads[4]), "bf16", [one.batch[5]], [one.length[9]])
    filled_s, label = latent_generation_s(holed, *kernel)
    whole_s, whole_label = latent_generation_s(measured, *kernel)
    assert filled_s[0, 0] != whole_s[0, 0]
    assert abs(filled_s[0, 0] - whole_s[0, 0]) < 0.02 * true_s
    assert (whole_label[0, 0], label[0, 0]) == (Provenance.MEASURED, Provenance.INTERPOLATED)


def test_a_head_count_between_measured_ones_is_interpolated() -> None:
    """A head count between measured ones is interpolated."""
    size = ([32], [8192])
    time_s, label = zip(
        *(
            latent_generation_s(table("vllm"), H100, DEEPSEEK, heads, "bf16", *size)
            for heads in (16, 24, 32)
        ),
        strict=True,
    )
    assert time_s[0] < time_s[1] < time_s[2]
    assert label[1] == Provenance.INTERPOLATED


def test_sparse_attention_without_its_table_is_dense_over_what_it_keeps() -> None:
    """Sparse attention without its table is dense over what it keeps."""
    dense_only = only(*(one for one in table("vllm").latent if not one.index_topk))
    sparse_s, label = latent_generation_s(dense_only, H100, SPARSE, 16, "bf16", [8], CONTEXTS)
    dense_s, _ = latent_generation_s(dense_only, H100, DEEPSEEK, 16, "bf16", [8], CONTEXTS)
    kept = SPARSE.index_topk >= CONTEXTS
    assert (sparse_s[0, kept] >= dense_s[0, kept]).all()
    assert sparse_s[0, -1] < dense_s[0, -1]
    assert (label == Provenance.EXTRAPOLATED).all()
    assert_monotone(sparse_s, 1)
    prompt_s, _, label = latent_context_s(dense_only, H100, SPARSE, 16, "bf16", LENGTHS)
    assert_monotone(prompt_s, 0)
    assert prompt_s[-1] < latent_context_s(dense_only, H100, DEEPSEEK, 16, "bf16", LENGTHS)[0][-1]
    assert label.min() == Provenance.EXTRAPOLATED


def test_a_table_without_latent_attention_leaves_the_roofline() -> None:
    """A table without latent attention leaves the roofline."""
    for attention in (DEEPSEEK, SPARSE):
        kernel = (only(), H100, attention, 16, "bf16")
        time_s, label = latent_generation_s(*kernel, BATCHES, CONTEXTS)
        assert (time_s > 0).all()
        assert (label == Provenance.ROOFLINE).all()
        prompt_s, launch_s, label = latent_context_s(*kernel, LENGTHS)
        assert (prompt_s[0], launch_s) == (0.0, 0.0)
        assert (label == Provenance.ROOFLINE).all()
    with pytest.raises(ValueError, match="no prefill"):
        latent_context_batch_s(only(), H100, DEEPSEEK, 16, "bf16", [1], [1])


MOVES = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_topk"]


@pytest.mark.parametrize("engine", VERSIONS)
@pytest.mark.parametrize("field", MOVES)
@pytest.mark.parametrize("attention", [DEEPSEEK, SPARSE])
def test_a_width_moved_by_a_hundredth_moves_no_time_much(
    engine: str, field: str, attention: LatentAttention
) -> None:
    """A width moved by a hundredth moves no time much."""
    width = getattr(attention, field)
    if not width:
        pytest.skip("dense attention keeps everything")
    step = max(1, round(0.01 * width))
    batches, contexts = [1, 16, 256], [128, 2048, 16_384]
    for moved in (width - step, width + step):
        other = replace(attention, **{field: moved})
        allowed = 0.03 * max(1.0, 100 * step / width)
        for at in (attention, other):
            kernel = (table(engine), H100, at, 16, "bf16")
            decode_s = latent_generation_s(*kernel, batches, contexts)[0]
            prompt_s = latent_context_s(*kernel, contexts)[0]
            if at is attention:
                before = decode_s, prompt_s
        assert np.abs(decode_s / before[0] - 1).max() < allowed
        assert np.abs(prompt_s / before[1] - 1).max() < allowed


@pytest.mark.parametrize("engine", VERSIONS)
def test_heads_moved_by_a_hundredth_move_no_time_much(engine: str) -> None:
    """Heads moved by a hundredth move no time much."""
    at = ([1, 16, 256], [128, 2048, 16_384])
    for attention in (DEEPSEEK, SPARSE):
        before_s = latent_generation_s(table(engine), H100, attention, 128, "bf16", *at)[0]
        for heads in (127, 129):
            time_s = latent_generation_s(table(engine), H100, attention, heads, "bf16", *at)[0]
            assert np.abs(time_s / before_s - 1).max() < 0.03


def test_sizes_moved_by_a_hundredth_move_no_time_much() -> None:
    """Sizes moved by a hundredth move no time much."""
    kernel = (table("vllm"), H100, SPARSE, 16, "bf16")
    batches, contexts = np.array([100, 300, 900]), np.array([1000, 2000, 10_000, 100_000])
    before_s = latent_generation_s(*kernel, batches, contexts)[0]
    after_s = latent_generation_s(*kernel, batches * 101 // 100, contexts * 101 // 100)[0]
    assert (after_s / before_s - 1).max() < 0.03


def test_only_sparse_modules_have_a_floor() -> None:
    """Only sparse modules have a floor."""
    assert latent_context_floor_s(table("vllm"), H100, DEEPSEEK, 16, "bf16") == 0
    floor_s = latent_context_floor_s(table("vllm"), H100, SPARSE, 16, "bf16")
    assert 1.1e-3 < floor_s < 1.3e-3  # measured: flat at 1.2 to 1.3 ms up to a thousand tokens


def test_sizes_out_of_range_are_refused() -> None:
    """Sizes out of range are refused."""
    kernel = (table("vllm"), H100, DEEPSEEK)
    with pytest.raises(ValueError, match="batch"):
        latent_generation_s(*kernel, 16, "bf16", [0], [1])
    with pytest.raises(ValueError, match="context"):
        latent_generation_s(*kernel, 16, "bf16", [1], [0])
    with pytest.raises(ValueError, match="heads"):
        latent_generation_s(*kernel, 0, "bf16", [1], [1])
    with pytest.raises(ValueError, match="length"):
        latent_context_s(*kernel, 16, "bf16", [-1])
    with pytest.raises(ValueError, match="tokens"):
        latent_underfill_s(*kernel, 16, "bf16", [-1])


def test_local_quadratic_meets_a_quadratic() -> None:
    """Local quadratic meets a quadratic."""
    random = np.random.default_rng(0)
    points = random.uniform(-2, 2, (200, 3))

    def value(at: np.ndarray) -> np.ndarray:
        return 1 + at[:, 0] - 2 * at[:, 1] * at[:, 2] + at[:, 2] ** 2

    at = random.uniform(-1, 1, (20, 3))
    assert local_quadratic(points, value(points), at) == pytest.approx(value(at), abs=0.02)


def test_local_quadratic_stays_within_its_neighbours() -> None:
    """Local quadratic stays within its neighbours."""
    points, values = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([1.0, 2.0])
    far = local_quadratic(points, values, np.array([[100.0, 0.0], [-100.0, 5.0]]))
    assert ((far >= 1) & (far <= 2)).all()


def test_missing_cells_grow_with_the_work_but_never_below_a_neighbour() -> None:
    """Missing cells grow with the work but never below a neighbour."""
    work = np.outer([1.0, 2.0, 4.0], [1.0, 2.0])
    time_s = np.array([[1.0, 1.5], [2.0, np.nan], [9.0, np.nan]])
    assert grown(time_s, work).tolist() == [[1, 1.5], [2, 3], [9, 9]]
    before = np.array([[np.nan, 3.0], [np.nan, np.nan]])
    assert grown(before, work[:2]).tolist() == [[3, 3], [6, 6]]


def test_labels_of_joined_values() -> None:
    """Labels of joined values."""
    axis, label = np.array([1.0, 2.0, 4.0]), np.array([0, 0, 2], dtype=np.int8)
    at = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0])
    assert joined_labels(axis, label, at).tolist() == [2, 0, 1, 0, 2, 2, 2]


def test_a_slipped_measurement_is_dropped_and_only_that() -> None:
    """A slipped measurement is dropped and only that."""
    time_s = np.array([[1.0, 9.0, 2.0], [1.1, 1.5, 2.2], [1.2, 1.9, 0.3], [1.3, 2.0, 2.5]])
    kept = np.array([[1.0, np.nan, 2.0], [1.1, 1.5, 2.2], [1.2, 1.9, np.nan], [1.3, 2.0, 2.5]])
    assert without_spikes(time_s) == pytest.approx(kept, nan_ok=True)
