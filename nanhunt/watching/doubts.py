"""What may differ between a step and its replay: operations whose result depends on their turn."""

from collections.abc import Iterable, Mapping

from nanhunt.causes import base_name
from nanhunt.records import OpEvent

# From the documentation of torch.use_deterministic_algorithms, as the aten ops that do the work.
_ON_CPU = frozenset(
    ["index_put_", "index_put", "_index_put_impl_", "put_", "index_copy", "index_copy_",
     "max_unpool2d", "max_unpool3d"]
)  # fmt: skip
_ON_CUDA = _ON_CPU | frozenset(
    ["scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "scatter", "scatter_",
     "gather_backward", "index_add", "index_add_", "cumsum", "histc", "bincount", "median",
     "nll_loss2d_forward", "embedding_dense_backward", "_embedding_bag_dense_backward",
     "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward",
     "fractional_max_pool2d_backward", "max_pool3d_with_indices_backward",
     "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
     "upsample_trilinear3d_backward", "reflection_pad2d_backward", "replication_pad2d_backward",
     "_ctc_loss_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
     "convolution_backward", "_scaled_dot_product_flash_attention_backward",
     "_scaled_dot_product_efficient_attention_backward"]
)  # fmt: skip
_BY_DEVICE: Mapping[str, frozenset[str]] = {"cpu": _ON_CPU, "cuda": _ON_CUDA}


def changeable_ops(events: Iterable[OpEvent], device: str) -> list[str]:
    """The recorded ops that are known to be non-deterministic on a device."""
    known = _BY_DEVICE.get(device, _ON_CUDA)
    return [op for op in dict.fromkeys(base_name(event.op) for event in events) if op in known]


def told(ops: list[str], device: str) -> str:
    """One sentence about them."""
    if not ops:
        return f"no recorded operation is known to be non-deterministic on {device}"
    return f"known to be non-deterministic on {device}: {', '.join(ops)}"
