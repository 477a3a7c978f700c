"""What the launches of kernels of our own check before they are put on a stream."""

from __future__ import annotations

from collections.abc import Mapping


def checked_addresses(
    kernel: str, needed: Mapping[str, tuple[int, bool]], *problems: str
) -> dict[str, int]:
    """The addresses, each given if and only if it is needed.

    Args:
        kernel: name of the variant, for the error.
        needed: each argument's address, 0 for none, and whether the variant reads or writes it.
        *problems: what else is wrong; told in the same error.

    Raises:
        ValueError: an address that is missing or that has no use, or a problem was named.
    """
    found = [
        f"{name} {'missing' if need else 'unused'}"
        for name, (address, need) in needed.items()
        if bool(address) != need
    ]
    if found or problems:
        raise ValueError(f"{kernel}: {', '.join((*found, *problems))}")
    return {name: address for name, (address, _) in needed.items()}


def checked_batch(batch: int, largest: int) -> int:
    """The number of sequences.

    Raises:
        ValueError: it is not 1 to `largest`.
    """
    if not 1 <= batch <= largest:
        raise ValueError(f"a batch of {batch}, expected 1 to {largest}, which it was made for")
    return batch
