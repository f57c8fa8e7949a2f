"""The peers' selections and Triton kernels against masks attended densely, in Triton's interpreter on the CPU.

``TRITON_INTERPRET=0`` compiles the kernels and runs all of it on a GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton loads

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peers are PyTorch's and Triton's")

from bench import baselines, selection  # noqa: E402

N, DIM, SEGMENT, HEADS = 1024, 16, 256, 2
SCALE = DIM**-0.5
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
CLOSE = 1e-3 if DEVICE == "cpu" else 2e-2  # products of float32 are rounded there as TensorFloat-32
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET is not 1, and there is no CUDA device", allow_module_level=True)


@pytest.fixture(scope="module")
def gather():
    """The Triton kernels, interpreted; skipped without Triton, and where it was loaded to compile."""
    triton = pytest.importorskip("triton", reason="Triton's interpreter needs triton")
    if triton.knobs.runtime.interpret != (DEVICE == "cpu"):
        pytest.skip("TRITON_INTERPRET was not set before triton was imported")
    from bench import gather

    return gather


@pytest.fixture(scope="module")
def arrays():
    """q (2, N, D), k and v (1, N, D), float32, on the device, with a first token that all queries like."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, N, DIM, generator=generator) for heads in (HEADS, 1, 1))
    k[:, 0] += q.mean((0, 1)) * 40
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)


def attended(q, k, v, mask):
    """Attention of float64 under a mask (Hq, N, N)."""
    logit = (q.double() @ k.double().transpose(1, 2)) * SCALE
    return logit.masked_fill(~mask, float("-inf")).softmax(-1) @ v.double()


def walked_mask(lists, walked):
    """What a walk sees: the rows' own segment causally, and as many key tiles of their list as were walked."""
    mask = torch.zeros(HEADS, N, N, dtype=torch.bool, device=DEVICE)
    for h in range(HEADS):
        for tile in range(N // 128):
            rows, segment = slice(tile * 128, tile * 128 + 128), tile * 128 // SEGMENT
            mask[h, rows, segment * SEGMENT : rows.stop] = True
            start = lists.starts[h, segment]
            mask[h, rows, lists.order[start : start + walked[h, tile] * 128].long()] = True
    return mask & torch.ones(N, N, dtype=torch.bool, device=DEVICE).tril()


def stop(q, k, lists, h, tile, tau):
    """Key tiles that a row tile walks: up to the first that adds less than tau to every row."""
    rows, segment = slice(tile * 128, tile * 128 + 128), tile * 128 // SEGMENT
    weight = (q[h, rows].double() @ k[0].double().T * SCALE).exp()
    before = (weight * torch.ones(N, N, device=DEVICE).tril()[rows])[:, segment * SEGMENT :].sum(1)
    keys = lists.order[lists.starts[h, segment] :][: segment * SEGMENT].long()
    for done in range(segment * SEGMENT // 128):
        added = weight[:, keys[done * 128 : done * 128 + 128]].sum(1)
        if (added / before).max() < tau:
            return done + 1
        before = before + added
    return segment * SEGMENT // 128


def relative(out, wanted):
    return float((out.double() - wanted).norm() / wanted.norm())


def histories(lists):
    """(head, segment, listed keys) of every list that has any."""
    for h, s in np.ndindex(HEADS, N // SEGMENT):
        if s:
            start = lists.starts[h, s]
            yield h, s, lists.order[start : start + s * SEGMENT].long()


def test_the_full_sort_orders_every_history(arrays):
    q, k, _ = arrays
    score = selection.mean_scores(q, k, SEGMENT)
    assert torch.allclose(score[1, 2], k[0] @ q[1, 512:768].mean(0), atol=1e-5)
    lists = selection.Lists(HEADS, N, SEGMENT, DEVICE)
    lists.sort(score)
    for h, s, keys in histories(lists):
        assert sorted(keys.tolist()) == list(range(s * SEGMENT))
        assert (score[h, s, keys].diff() <= 0).all()


def test_tiers_are_counted_from_the_histogram_and_keep_position_order_inside(arrays, gather):
    q, k, _ = arrays
    score = selection.mean_scores(q, k, SEGMENT)
    lists = selection.Lists(HEADS, N, SEGMENT, DEVICE)
    lists.order.fill_(-1)
    gather.rank_in_tiers(score, lists.starts, SEGMENT, lists.order)
    for h, s, keys in histories(lists):
        x = score[h, s, : s * SEGMENT].cpu().numpy()
        width = (x.max() - x.min()) / np.float32(gather.BINS)
        place = np.minimum(((x.max() - x) / width).astype(int), gather.BINS - 1)
        reached = np.cumsum(np.bincount(place, minlength=gather.BINS))
        wanted = len(x) * 1.5 ** (np.arange(gather.TIERS - 1) - (gather.TIERS - 1))
        tier = (place[:, None] > np.searchsorted(reached, wanted)).sum(axis=1)
        assert len(set(tier)) > 5
        assert keys.tolist() == np.argsort(tier, kind="stable").tolist()


@pytest.mark.parametrize("how", [{}, {"tau": -1.0, "chunk": 2}, {"tau": 0.4, "chunk": 1}, {"tau": 1e9, "chunk": 2}])
def test_the_gather_kernel_attends_what_it_says_it_walked(arrays, gather, how):
    q, k, v = (x.half() for x in arrays)
    lists = selection.Lists(HEADS, N, SEGMENT, DEVICE)
    lists.sort(selection.mean_scores(q.float(), k.float(), SEGMENT))
    depths = selection.tile_depths(HEADS, N, SEGMENT, 128, DEVICE, 1.0 if how else 0.6)
    out, walked = gather.attend(q, k, v, lists.order, lists.starts, depths, SCALE, segment=SEGMENT, **how)
    if how.get("tau") == 1e9:
        assert (walked == depths.clamp(max=2)).all()
    elif how.get("tau") == 0.4:
        assert walked.tolist() == [[stop(q, k, lists, h, tile, 0.4) for tile in range(N // 128)] for h in range(HEADS)]
        assert 0 < walked.sum() < depths.sum()
    else:
        assert (walked == depths).all()
    assert relative(out, attended(q, k, v, walked_mask(lists, walked))) < 2e-3


def test_a_chunk_that_would_read_past_a_list_is_refused(arrays, gather):
    q, k, v = arrays
    lists = selection.Lists(HEADS, N, SEGMENT, DEVICE)
    depths = selection.tile_depths(HEADS, N, SEGMENT, 128, DEVICE)
    with pytest.raises(ValueError, match="chunk is 4 at segment 256; allowed: whole chunks of 128 keys in a segment"):
        gather.attend(q, k, v, lists.order, lists.starts, depths, SCALE, segment=SEGMENT, tau=0.1, chunk=4)


def test_every_gather_peer_walks_whole_chunks(gather):
    from bench import rivals

    for name, make in rivals.sparse_peers():
        if name.startswith("S2O Triton"):
            peer = make()
            assert peer.segment % (max(peer.chunk, 1) * 128) == 0, name


def test_depths_are_shares_of_a_history():
    depths = selection.tile_depths(1, N, SEGMENT, 128, "cpu", 0.3)
    assert depths.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
def test_pbs_attention_takes_the_blocks_of_its_rule(arrays, share):
    q, k, v = arrays
    moved, _, first = selection.permute_keys(q, k, v, SCALE)
    blocks, counts = selection.top_cdf_blocks(q, moved, 256, SCALE, first, share)
    own = (N // 256) * 256 * 257 // 2
    for h in range(HEADS):
        points = baselines.pbs_attention(q[h].cpu().numpy(), k[0].cpu().numpy(), v[0].cpu().numpy(), SCALE, (share,))
        density = (int(counts[h].sum()) * 128**2 + own) / (N * (N + 1) / 2)
        assert density == pytest.approx(points.density[0])
        for row, count in enumerate(counts[h].tolist()):
            assert len(set(blocks[h, row, :count].tolist())) == count


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_pbs_attention_over_the_kernel_has_the_error_of_its_rule(arrays, gather, share):
    q, k, v = arrays
    moved_k, moved_v, first = selection.permute_keys(q, k, v, SCALE)
    blocks, counts = selection.top_cdf_blocks(q, moved_k, 256, SCALE, first, share)
    starts = torch.arange(counts.numel(), device=DEVICE).view(counts.shape) * blocks.shape[-1]
    out, walked = gather.attend(
        q, moved_k, moved_v, blocks, starts, counts, SCALE, segment=256, own=(k, v), blocks=True
    )
    assert (walked == counts).all()
    exact = attended(q, k, v, torch.ones(HEADS, N, N, dtype=torch.bool, device=DEVICE).tril())
    for h in range(HEADS):
        points = baselines.pbs_attention(q[h].cpu().numpy(), k[0].cpu().numpy(), v[0].cpu().numpy(), SCALE, (share,))
        assert float((out[h].double() - exact[h]).square().sum()) == pytest.approx(points.gap[0], rel=CLOSE, abs=1e-8)


def test_pooled_blocks_are_those_of_the_baseline(arrays):
    q, k, v = arrays
    _, counts = selection.top_cdf_blocks(q, k, 128, SCALE, torch.zeros(HEADS, dtype=torch.int64, device=DEVICE), 0.6)
    own = (N // 128) * 128 * 129 // 2
    for h in range(HEADS):
        points = baselines.block_attention(q[h].cpu().numpy(), k[0].cpu().numpy(), v[0].cpu().numpy(), SCALE, (0.6,))
        assert (int(counts[h].sum()) * 128**2 + own) / (N * (N + 1) / 2) == pytest.approx(points.density[0])


@pytest.mark.parametrize("loss", [0.4, 0.0])
@pytest.mark.filterwarnings("ignore")  # PyTorch says that it was not compiled
def test_flex_attention_attends_its_own_block_and_the_chosen_ones(arrays, monkeypatch, loss):
    from bench import rivals

    if DEVICE == "cpu" and loss:
        pytest.skip("FlexAttention reads the blocks of a mask only where it is compiled: on a GPU")
    rivals._flex_attention.cache_clear()
    if DEVICE == "cpu":  # a compiler may be missing
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = arrays if DEVICE == "cpu" else (x.half() for x in arrays)
    method = rivals.Flex()
    chosen = method.choose(method.rank(q, k, v, SCALE), loss)
    out, pairs = method.walk(chosen)
    rivals._flex_attention.cache_clear()
    taken, counts = selection.top_cdf_blocks(
        q, k, 128, SCALE, torch.zeros(HEADS, dtype=torch.int64, device=DEVICE), 1 - loss
    )
    mask = torch.zeros(HEADS, N, N, dtype=torch.bool, device=DEVICE)
    for h, row in np.ndindex(HEADS, N // 128):
        for block in [row, *taken[h, row, : counts[h, row]].tolist()]:
            mask[h, row * 128 : row * 128 + 128, block * 128 : block * 128 + 128] = True
    mask &= torch.ones(N, N, dtype=torch.bool, device=DEVICE).tril()
    assert relative(out, attended(q, k, v, mask)) < (1e-5 if DEVICE == "cpu" else 2e-3)
    assert pairs() == int(mask.sum())
    assert (pairs() == HEADS * N * (N + 1) // 2) == (loss == 0)
