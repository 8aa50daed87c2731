"""Log-sum-exp over columns of which the far ones are stood for by their cluster's mean."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.tiles import slices
from vlm.similarity.top_k import ROW_BLOCK, top_negatives

Places = tuple[Tensor, Tensor]


def meta_node_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    labels: Int64[Tensor, " columns"],
    scale: Float[Tensor, "1"],
    excluded: EqualKeys,
    num_nearest: int,
) -> Float[Tensor, " rows"]:
    """log( sum_{j near} exp(a <x_i, y_j>) + sum_c n_ic exp(a <x_i, c_i>) ) of each row; -inf where no entry counts.

    The `num_nearest` columns of a row are exact; of the others, cluster c has n_ic left with mean c_i. Excluded entries
    are in neither. By Jensen's inequality no more than the exact sum, and equal to it where clusters are tight or have
    one column. Differentiable in rows, columns (all members of a cluster) and scale. Memory is O(columns dim + block
    (clusters + nearest dim)): blocks of rows are computed again in the backward. Finding the nearest costs the product
    of rows and columns once, in blocks; without it, only products with clusters are left.
    """
    sizes = torch.bincount(labels)
    sums = columns.new_zeros(len(sizes), columns.shape[1]).index_add(0, labels, columns)
    searched = columns.detach() if num_nearest else columns.detach()[:0]
    nearest, places = top_negatives(rows.detach(), searched, num_nearest, (excluded,) if num_nearest else ())
    out_rows, out_columns = _listed(excluded)
    results = []
    for block in slices(len(rows), ROW_BLOCK):
        bounds = torch.tensor([block.start, block.stop], device=rows.device)
        first, last = torch.searchsorted(out_rows, bounds).tolist()
        log_sums = checkpoint(
            _block,
            rows[block],
            columns,
            (sums, sizes, labels),
            scale,
            (nearest[block].isfinite(), places[block]),
            (out_rows[first:last] - block.start, out_columns[first:last]),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        results.append(log_sums)
    return torch.cat(results) if results else rows.sum(1)


def _block(
    rows: Tensor, columns: Tensor, clusters: tuple[Tensor, Tensor, Tensor], scale: Tensor, near: Places, out: Places
) -> Tensor:
    sums, sizes, labels = clusters
    exists, places = near
    exact = (columns[places] @ rows[:, :, None]).squeeze(2)
    # What is taken out of the clusters: excluded entries, and those that are counted exactly.
    near_rows = torch.arange(len(rows), device=rows.device)[:, None].expand_as(places)[exists]
    taken_from = (torch.cat([out[0], near_rows]), labels[torch.cat([out[1], places[exists]])])
    taken = torch.cat([(rows[out[0]] * columns[out[1]]).sum(1), exact[exists]])
    totals = (rows @ sums.T).index_put(taken_from, -taken, accumulate=True)
    counts = sizes.to(totals).repeat(len(rows), 1).index_put(taken_from, -torch.ones_like(taken), accumulate=True)
    left = counts.clamp(min=1)
    nothing = totals.new_tensor(float("-inf"))
    cluster_logits = torch.where(counts > 0, scale * totals / left + left.log(), nothing)
    return torch.cat([torch.where(exists, scale * exact, nothing), cluster_logits], 1).logsumexp(1)


def _listed(excluded: EqualKeys) -> Places:
    """All entries of equal keys as rows and columns, sorted by row."""
    if excluded.listed is not None:
        return excluded.listed
    blocks = []
    for block in slices(len(excluded.row_keys), ROW_BLOCK):
        equal = (excluded.row_keys[block, None] == excluded.column_keys).nonzero()
        blocks.append(equal + torch.tensor([block.start, 0], device=equal.device))
    places = torch.cat(blocks).T.contiguous()
    return places[0], places[1]
