"""How much of MaxSim is held at a time. Free of torch: the algorithm and the memory plan read the same
numbers."""

PRODUCTS_CPU = 1 << 20
"""Entries of the product held at a time on a CPU: 4 MB in fp32, which stays in cache until the max has read
it."""

PRODUCTS_CUDA = 1 << 26
"""The same on CUDA: 256 MB, large enough to fill the device."""


def products_at_a_time(on_gpu: bool) -> int:
    """Entries of (query rows × passage rows) that are formed before the next ones."""
    return PRODUCTS_CUDA if on_gpu else PRODUCTS_CPU


def rows_widened_at_a_time(products: int, width: int, on_gpu: bool) -> int:
    """Rows of `width` copied to the accumulation's precision at a time in the backward pass.

    On a CPU the copies may be larger than a product, which has to stay in cache.
    """
    return max(1, (products if on_gpu else 4 * products) // max(width, 1))


def passages_at_a_time(products: int, num_query_rows: int) -> int:
    """Passages whose entries (one a query row) are sorted at a time in the backward pass."""
    return max(1, products // max(num_query_rows, 1))
